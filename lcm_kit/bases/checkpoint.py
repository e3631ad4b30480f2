"""What a checkpoint in one file is, read from its header (names, shapes, dtypes) before a tensor is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lcm_kit.bases.checkpoint_names import Names, names_of
from lcm_kit.bases.headers import Entry, read_header
from lcm_kit.errors import UserError
from lcm_kit.families import Generation, by_checkpoint, listed
from lcm_kit.families.kinds import CHECKPOINT_UNET, CHECKPOINT_VAE, FIRST_EMBEDDER, SECOND_EMBEDDER

_LORA = ("lora_A.", "lora_B.", "lora_up.", "lora_down.", "lora.up.", "lora.down.", "hada_w1", "lokr_w1")
# 8-bit floats are for storage alone, and half precision holds all of their values
_DTYPES = {
    "F64": torch.float32, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float16, "F8_E5M2": torch.float16,
}  # fmt: skip


@dataclass(frozen=True)
class Contents:
    """What a file's header says; no tensor is read."""

    generation: Generation
    dtypes: Mapping[str, torch.dtype]  # of each part that it has: that of most of its tensors
    counts: Mapping[str, int]  # tensors of each part that it has
    scheduler: Mapping[str, Any]  # what the file itself says of its noise: keys of a scheduler's config
    names: Names
    lacking: tuple[str, ...] = ()  # parts of such a base that it does not have; never the UNet


def contents_of(file: Path) -> Contents:
    """What the checkpoint `file` holds, by its header. Raises `UserError` if it is not a base of ours."""
    if file.suffix.lower() != ".safetensors":
        raise UserError(
            f"base {str(file)!r} is a file but not .safetensors; such a file can run code when it is loaded, "
            "so give the .safetensors of this model or a diffusers pipeline folder"
        )
    raw, metadata = read_header(file, f"base {str(file)!r}")
    names = names_of(raw)
    entries = {name: raw[own] for name, own in names.tensors.items()}
    if fault := _fault(entries):
        raise UserError(f"base {str(file)!r} {fault}")
    generation = _generation(entries)
    found = {
        part: [e for name, e in entries.items() if name.startswith(prefixes)]
        for part, prefixes in generation.checkpoint.items()
    }
    lacking = tuple(part for part in found if not found.get(part))
    found = {part: held for part, held in found.items() if held}
    said = _said(entries, metadata)
    known = generation.epsilon_at_step
    if known is not None and _step(file, raw) == known:
        said = {"prediction_type": "epsilon"} | said
    counts = {part: len(held) for part, held in found.items()}
    dtypes = {part: most_common_dtype(held) for part, held in found.items()}
    return Contents(generation, dtypes, counts, said, names, lacking)


def _step(file: Path, entries: Mapping[str, Entry]) -> int | None:
    """The training step, where the file has it."""
    from safetensors import safe_open

    counter = entries.get("global_step")
    if counter is None or counter.shape not in ((), (1,)):
        return None
    with safe_open(file, framework="pt") as handle:
        return int(handle.get_tensor("global_step"))


def _fault(entries: Mapping[str, Entry]) -> str | None:
    """The rest of the sentence that begins with the file, if it is not a base that this kit can take."""

    def has(*pieces: str) -> bool:
        return any(piece in name for name in entries for piece in pieces)

    ours = f"give an {listed()} checkpoint"
    first = entries.get(f"{CHECKPOINT_UNET}input_blocks.0.0.weight")
    if has(*_LORA) or any(name.startswith("lora_") for name in entries):
        return (
            "is a LoRA, not a checkpoint; give it as --adapter, and the checkpoint that it was made for here"
        )
    if has("double_blocks.", "joint_blocks."):
        return f"is a checkpoint of {'Flux' if has('double_blocks.') else 'SD3'}; {ours}"
    if first is None and (part := _lone_part(entries)):
        return f"is one part of a model and not a whole checkpoint: {part}"
    if first is None or len(first.shape) != 4:
        return f"is not a checkpoint that this kit knows; {ours}"
    if first.shape[1] != 4:
        kind = "an inpainting model" if first.shape[1] == 9 else "not a plain text-to-image model"
        return f"is {kind} (its UNet takes {first.shape[1]} channels, not 4); {ours} without that"
    if "edm_mean" in entries or "edm_vpred.sigma_max" in entries:
        return f"was trained with EDM's noise, which this kit does not have; {ours}"
    if has(f"{FIRST_EMBEDDER}model.") and not has(SECOND_EMBEDDER):
        return "is SDXL's refiner, which has one text encoder; give the SDXL base"
    return None


def _lone_part(entries: Mapping[str, Entry]) -> str | None:
    """Which part a file without a UNet of the original layout is, and what to do with it."""

    def has(*beginnings: str) -> bool:
        return any(name.startswith(beginnings) for name in entries)

    place = "copy the diffusers folder of a base, put this file there in place of {} and give that folder"
    if has("down_blocks."):
        return "a UNet in diffusers' names; " + place.format("unet/diffusion_pytorch_model.safetensors")
    if has("text_model."):
        return "a text encoder; " + place.format("text_encoder/model.safetensors")
    if has("encoder.down.", "decoder.up.", *CHECKPOINT_VAE):
        return (
            "a VAE in the original names; copy the diffusers folder of a base as FOLDER, run "
            "diffusers' AutoencoderKL.from_single_file(THIS, config='FOLDER/vae').save_pretrained('FOLDER/"
            "vae') in Python, and give FOLDER"
        )
    if has("encoder.", "decoder."):
        return "a VAE in diffusers' names; " + place.format("vae/diffusion_pytorch_model.safetensors")
    return None


def _generation(entries: Mapping[str, Entry]) -> Generation:
    """SD2's projections are linear layers, SD1's convolutions: what tells a UNet without text encoder."""
    linear = any(
        name.endswith(".proj_in.weight") and len(entry.shape) == 2 for name, entry in entries.items()
    )
    return by_checkpoint(entries, linear)


def most_common_dtype(entries: Iterable[Entry]) -> torch.dtype:
    """Of the tensors with these entries; float32 where none is a float."""
    kinds = Counter(_DTYPES[entry.dtype] for entry in entries if entry.dtype in _DTYPES)
    return kinds.most_common(1)[0][0] if kinds else torch.float32


def _said(entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> dict[str, Any]:
    """Tensors named v_pred and ztsnr are marks of SDXL files; the metadata is Stability's ModelSpec."""
    kinds = {"epsilon": "epsilon", "v": "v_prediction"}
    kind = kinds.get(metadata.get("modelspec.prediction_type", ""))
    if "v_pred" in entries:
        kind = "v_prediction"
    said: dict[str, Any] = {"prediction_type": kind} if kind else {}
    return said | ({"rescale_betas_zero_snr": True} if "ztsnr" in entries else {})
