"""The families of bases: each is a module with the same functions.

Stable Diffusion 1.x and 2.x (`sd.py`) so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lcm_kit.families import sd
from lcm_kit.families.sd import BaseInfo, Text, inspect_base

__all__ = ["BaseInfo", "Parts", "Text", "inspect_base", "load"]


@dataclass(frozen=True)
class Parts:
    """The parts of a base that were asked for, frozen and in eval mode; the others are None."""

    info: BaseInfo
    unet: Any = None
    vae: Any = None
    text: Any = None  # Text(tokenizer, text_encoder)


def load(
    path: str,
    *,
    parts: Sequence[str] = ("unet", "vae", "text"),
    revision: str | None = None,
    variant: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Parts:
    """Load `parts` (of "unet", "vae", "text") of a base: a diffusers folder, a hub id or `asset:NAME`.

    `dtype` is the UNet's; VAE and text encoder are float32. Raises `UserError` as `inspect_base` does.
    """
    info = inspect_base(path, revision=revision, variant=variant)
    return Parts(
        info,
        sd.load_unet(info, dtype) if "unet" in parts else None,
        sd.load_vae(info) if "vae" in parts else None,
        sd.load_text(info) if "text" in parts else None,
    )
