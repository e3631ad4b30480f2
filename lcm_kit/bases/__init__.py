"""The code of the families of bases: a module each with the functions of `Code`, by `family_of(base)`.

Which families there are, and all else about them, says the table `lcm_kit.families`. What their code
shares is in `base.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from lcm_kit.bases.base import (
    BaseInfo,
    decode_latents,
    decoded_at_once,
    encode_images,
    inspect_base,
    load_part,
    load_unet,
    load_vae,
    lora_targets,
    require_fit,
    weight_files,
)  # fmt: skip
from lcm_kit.bases.condition import Condition, Framing
from lcm_kit.bases.emphasis import Prompt
from lcm_kit.bases.tokens import counts, load_tokenizer, load_tokenizers, room, too_long
from lcm_kit.families import Family

__all__ = [
    "BaseInfo", "Code", "Parts", "code_of", "counts", "decode_latents", "decoded_at_once", "encode_images",
    "family_of", "inspect_base", "load", "load_part", "load_text", "load_tokenizer", "load_tokenizers",
    "load_unet", "load_vae", "lora_targets", "require_fit", "room", "too_long", "weight_files",
]  # fmt: skip


class Code(Protocol):
    """The functions of a family's module; `text` is what its own `text_of` makes."""

    def text_of(self, tokenizers: Sequence[Any], encoders: Sequence[Any], zeros_when_empty: bool) -> Any:
        """A named tuple of tokenizers and text encoders, given in the order of the family's parts."""

    def encode_text(self, text: Any, captions: Sequence[Prompt], chunks: int | None = 1) -> Condition:
        """The condition of B captions, without sizes: of each chunk as the family's pipeline makes it.

        Of up to `chunks` chunks (`texts.in_chunks`); None: of all that they take.
        """

    def empty_condition(self, text: Any, n: int) -> Condition:
        """The condition of classifier-free guidance's unconditional pass, n times."""

    def text_lora_targets(self, text: Any) -> dict[str, tuple[Any, list[str]]]:
        """Each text encoder by its part, and its modules that a LoRA adapts."""

    def sizes(self, framings: Sequence[Framing]) -> Tensor | None:
        """What the UNet is told of how pictures were cut, [B, k] float32; None: nothing."""


def code_of(family: Family) -> Code:
    """The module with a family's functions."""
    return cast(Code, import_module(family.module))


def family_of(base: BaseInfo) -> Code:
    """The functions of a base's family; what it is otherwise is `base.family`."""
    return code_of(base.family)


def load_text(base: BaseInfo, dtype: torch.dtype = torch.float32) -> Any:
    """The base's tokenizers and text encoders, frozen, in eval mode, as its family's `text_of` has them."""
    tokenizers = [load_tokenizer(base, part) for part in base.family.tokenizers]
    encoders = [load_part(base, part, dtype) for part in base.family.text_parts]
    return family_of(base).text_of(tokenizers, encoders, base.zeros_when_empty)


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
        load_text(info) if "text" in parts else None,
    )
