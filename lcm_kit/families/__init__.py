"""The families of bases: each is a module with the same functions, found by `of(base)`.

Stable Diffusion 1.x and 2.x (`sd.py`), SDXL and UNets pruned from it (`sdxl.py`). What they share is in
`base.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lcm_kit.families import sd, sdxl
from lcm_kit.families.base import (
    BaseInfo,
    decode_latents,
    encode_images,
    inspect_base,
    load_part,
    load_unet,
    load_vae,
    lora_targets,
    require_fit,
    weight_files,
)  # fmt: skip
from lcm_kit.families.tokens import load_tokenizer, too_long

__all__ = [
    "BaseInfo", "Parts", "decode_latents", "encode_images", "inspect_base", "load", "load_part",
    "load_tokenizer", "load_unet", "load_vae", "lora_targets", "of", "require_fit", "too_long",
    "weight_files",
]  # fmt: skip

_MODULES: dict[str, Any] = {"sd": sd, "sdxl": sdxl}


def of(base: BaseInfo) -> Any:
    """The module of a base's family: `load_text`, `encode_text`, `empty_condition`, `adapted`, `sizes`."""
    return _MODULES[base.family]


@dataclass(frozen=True)
class Parts:
    """The parts of a base that were asked for, frozen and in eval mode; the others are None."""

    info: BaseInfo
    unet: Any = None
    vae: Any = None
    text: Any = None  # the family's Text: tokenizers and text encoders


def load(
    path: str,
    *,
    parts: Sequence[str] = ("unet", "vae", "text"),
    revision: str | None = None,
    variant: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Parts:
    """Load `parts` (of "unet", "vae", "text") of a base: a diffusers folder, a hub id or `asset:NAME`.

    `dtype` is the UNet's; VAE and text encoders are float32. Raises `UserError` as `inspect_base` does.
    """
    info = inspect_base(path, revision=revision, variant=variant)
    return Parts(
        info,
        load_unet(info, dtype) if "unet" in parts else None,
        load_vae(info) if "vae" in parts else None,
        of(info).load_text(info) if "text" in parts else None,
    )
