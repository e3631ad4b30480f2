"""What a base is: recognised from its folder, without its weights; and the models that all families share.

Spaces: pixels [B, 3, H, W] in [-1, 1]; raw latents as the VAE gives them; latents = (raw - shift_factor) *
scaling_factor, [B, C, H/f, W/f], which is what the UNet sees. diffusers and transformers are imported on use:
it takes seconds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcm_kit.errors import UserError
from lcm_kit.families.source import STEMS, file_hash, locate, read_json
from lcm_kit.files import sha256_bytes

PARTS = {
    "sd": ("vae", "text_encoder", "tokenizer", "unet", "scheduler"),
    "sdxl": (
        "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "unet", "scheduler",
    ),
}  # fmt: skip
_DENOISERS = {"transformer": "a transformer", "prior": "a prior", "image_encoder": "an image encoder"}
_KINDS = ("epsilon", "v_prediction", "sample")
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_LCM = (
    *_ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "conv_shortcut",
    "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
)  # fmt: skip
_TEXT = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")  # of each block of a text encoder


def lora_targets(kind: str) -> list[str]:
    """Name endings of the layers that a LoRA adapts: `lcm` (LCM-LoRA, arXiv:2311.05556) or `attention`."""
    return list({"lcm": _LCM, "attention": _ATTENTION}[kind])


def text_layers(encoder: Any, unseen: int = 0) -> list[str]:
    """The linear layers of a CLIP text encoder that LoRA files carry, but of its last `unseen` blocks."""
    endings = tuple(f".{name}" for name in _TEXT)
    skipped = range(encoder.config.num_hidden_layers - unseen, encoder.config.num_hidden_layers)
    places = tuple(f"encoder.layers.{k}." for k in skipped)
    names = [name for name, _ in encoder.named_modules() if name.endswith(endings)]
    return [name for name in names if not any(place in name for place in places)]


@dataclass(frozen=True)
class BaseInfo:
    """What a base says of itself on disk; no weights are loaded. Hashes are computed when asked for."""

    path: str  # as it was asked for: folder, hub id or asset:NAME
    folder: Path  # where it lies
    revision: str | None
    variant: str | None
    prediction_type: str  # epsilon, v_prediction or sample
    scheduler_config: Mapping[str, Any]
    latent_channels: int
    factor: int  # f: pixels along one side of a latent
    sample_size: int  # the UNet's own latent size; sample_size * factor pixels
    scaling_factor: float
    shift_factor: float
    width: int  # D of the text embeddings
    family: str = "sd"  # sd (SD1.x and 2.x) or sdxl (SDXL and UNets pruned from it)
    zeros_when_empty: bool = False  # sdxl: the empty condition is zeros, not the encoded ""

    @property
    def parts(self) -> tuple[str, ...]:
        """The folders that make this base."""
        return PARTS[self.family]

    def hash_of(self, part: str) -> str:
        """Content hash of one of `parts`: configuration and weight files (unchanged by a plain re-save)."""
        folder = self.folder / part
        if part.startswith("tokenizer"):
            files = sorted(p for p in folder.iterdir() if p.suffix in (".json", ".txt", ".model"))
            return sha256_bytes("".join(f"{p.name}:{file_hash(p)}\n" for p in files).encode())
        config = read_json(_config_file(folder), self.path)
        own = {key: config[key] for key in sorted(config) if key[0] != "_" and key != "transformers_version"}
        weights = [file_hash(file) for file in weight_files(self, part)] if part in STEMS else []
        return sha256_bytes(json.dumps([own, weights]).encode())

    @property
    def base_hash(self) -> str:
        """Content hash of the whole base."""
        return sha256_bytes("".join(self.hash_of(part) for part in self.parts).encode())


def weight_files(base: BaseInfo, part: str) -> list[Path]:
    """The safetensors files of a part that has weights, in the base's variant.

    Raises `UserError` if there is none.
    """
    mark = re.escape(f".{base.variant}") if base.variant else ""
    piece = r"(-\d+-of-\d+)?"
    name = re.compile(rf"{STEMS[part]}({piece}{mark}|{mark}{piece})\.safetensors")
    files = sorted(p for p in (base.folder / part).iterdir() if name.fullmatch(p.name))
    if not files:
        wanted = f" of variant {base.variant!r}" if base.variant else ""
        raise UserError(
            f"base {base.path!r} has no safetensors weights{wanted} in {part}/; choose another base.variant, "
            "or save the base again with diffusers' save_pretrained"
        )
    return files


def inspect_base(path: str, *, revision: str | None = None, variant: str | None = None) -> BaseInfo:
    """Read a base's configuration, without its weights.

    `path` is a diffusers folder, a hub id or `asset:NAME`. Raises `UserError` if it is not found, not a
    pipeline folder, not of this family, or without safetensors weights.
    """
    folder = locate(path, revision, variant)
    index = read_json(folder / "model_index.json", path)
    family = _family(folder, index, path)
    configs = {
        part: read_json(_config_file(folder / part), path)
        for part in PARTS[family]
        if not part.startswith("tokenizer")
    }
    place = {"path": path, "folder": folder, "revision": revision, "variant": variant, "family": family}
    try:
        info = _describe(configs, index, **place)
    except KeyError as error:
        raise UserError(f"base {path!r}: its configuration lacks {error}; save the base again") from error
    for part in info.parts:
        if part in STEMS:
            weight_files(info, part)
    return info


def _config_file(folder: Path) -> Path:
    return folder / ("scheduler_config.json" if folder.name == "scheduler" else "config.json")


def _family(folder: Path, index: Mapping[str, Any], path: str) -> str:
    """`sd` or `sdxl`, by which parts the pipeline has."""
    parts = {part for part, kind in index.items() if isinstance(kind, list) and any(kind)}
    name = index.get("_class_name")
    if other := next((words for part, words in _DENOISERS.items() if part in parts), None):
        raise UserError(f"base {path!r} ({name}) has {other}; give an SD1.x, SD2.x or SDXL base")
    family = "sdxl" if "text_encoder_2" in parts else "sd"
    missing = [part for part in PARTS[family] if not (folder / part).is_dir()]
    if missing:
        raise UserError(
            f"base {path!r} ({name}) has no {', '.join(missing)}; give an SD1.x, SD2.x or SDXL base"
        )
    return family


def _describe(configs: Mapping[str, Mapping[str, Any]], index: Mapping[str, Any], **place: Any) -> BaseInfo:
    vae, unet, scheduler = configs["vae"], configs["unet"], configs["scheduler"]
    channels = vae.get("latent_channels", 4)
    if unet.get("in_channels", 4) != channels:
        raise UserError(
            f"base {place['path']!r}: its UNet takes {unet.get('in_channels')} channels, its VAE gives "
            f"{channels}; inpainting and depth bases are not supported, give the plain one"
        )
    kind = scheduler.get("prediction_type", "epsilon")
    if kind not in _KINDS:
        raise UserError(
            f"base {place['path']!r}: prediction_type {kind!r} is not supported, only {', '.join(_KINDS)}"
        )
    return BaseInfo(
        prediction_type=kind,
        scheduler_config=scheduler,
        latent_channels=channels,
        factor=2 ** (len(vae["block_out_channels"]) - 1),
        sample_size=unet["sample_size"],
        scaling_factor=vae.get("scaling_factor") or 0.18215,
        shift_factor=vae.get("shift_factor") or 0.0,
        width=sum(configs[part]["hidden_size"] for part in configs if part.startswith("text_encoder")),
        zeros_when_empty=bool(index.get("force_zeros_for_empty_prompt", place["family"] == "sdxl")),
        **place,
    )


def load_part(kind: Any, base: BaseInfo, part: str, dtype: torch.dtype) -> Any:
    """One model of a base, frozen, in eval mode. Raises `UserError` if its files do not give one."""
    try:
        model = kind.from_pretrained(
            base.folder / part, variant=base.variant, dtype=dtype, use_safetensors=True, local_files_only=True
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"base {base.path!r}: {part} cannot be loaded ({reason}); download or save the base again"
        ) from error
    return model.eval().requires_grad_(False)


def load_unet(base: BaseInfo, dtype: torch.dtype = torch.float32) -> Any:
    """The base's `UNet2DConditionModel`, frozen, in eval mode."""
    from diffusers import UNet2DConditionModel

    return load_part(UNet2DConditionModel, base, "unet", dtype)


def load_vae(base: BaseInfo, dtype: torch.dtype = torch.float32) -> Any:
    """The base's `AutoencoderKL`, frozen, in eval mode."""
    from diffusers import AutoencoderKL

    return load_part(AutoencoderKL, base, "vae", dtype)


@torch.no_grad()
def encode_images(vae: Any, pixels: Tensor) -> Tensor:
    """Pixels [B, 3, H, W] to latents [B, C, H/f, W/f]: (posterior mean - shift_factor) * scaling_factor."""
    raw = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mean
    return (raw - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor


@torch.no_grad()
def decode_latents(vae: Any, latents: Tensor) -> Tensor:
    """Latents [B, C, H/f, W/f] to pixels [B, 3, H, W], about [-1, 1], not clipped."""
    raw = latents.to(vae.device, vae.dtype) / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
    return vae.decode(raw).sample
