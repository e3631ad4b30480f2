"""A LoRA in memory, whatever file it came from: one name and one strength for each module.

Names are diffusers' with the part of the pipeline in front, as in
`unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q` or
`text_encoder.text_model.encoder.layers.0.self_attn.q_proj`. Everything that reads, writes, repairs or merges
goes through this form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor

PARTS = ("unet", "text_encoder", "text_encoder_2")


class Update(Protocol):
    """What a file does to the weight of one module: `Layer`, or one of `lcm_kit.lora.kinds`."""

    @property
    def kind(self) -> str:
        """LoRA, LoHa, LoKr, full difference, norm, DoRA, PiSSA or OLoRA."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight that it updates: [out, in], [out, in, kh, kw], or [n] of a norm."""

    @property
    def scale(self) -> float:
        """What its factors' product is multiplied by: alpha / rank, or what stands for it."""

    def delta(self, weight: Tensor | None = None) -> Tensor:
        """The update itself, float32, in `shape`; some kinds need the base's `weight`, of that shape."""


@dataclass(frozen=True)
class Layer:
    """The update of a linear or convolution layer: W + (alpha / rank) up @ down (arXiv:2106.09685, eq. 3)."""

    kind: ClassVar[str] = "LoRA"
    down: Tensor  # [r, in], or [r, in, kh, kw] for a convolution
    up: Tensor  # [out, r], or [out, r, 1, 1]
    alpha: float

    @property
    def rank(self) -> int:
        """r."""
        return int(self.down.shape[0])

    @property
    def scale(self) -> float:
        """alpha / rank: what up @ down is multiplied by."""
        return self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight that it updates: [out, in] or [out, in, kh, kw]."""
        return (int(self.up.shape[0]), *map(int, self.down.shape[1:]))

    def delta(self, weight: Tensor | None = None) -> Tensor:
        """The update itself, float32, in the shape of the module's weight, which it does not need."""
        product = self.up.float().flatten(1) @ self.down.float().flatten(1)
        return (self.scale * product).reshape(self.shape)

    def to(self, dtype: torch.dtype) -> Layer:
        """The same layer with its weights in `dtype`."""
        return Layer(self.down.to(dtype), self.up.to(dtype), self.alpha)


@dataclass(frozen=True)
class Lora:
    """All layers by module name, and what the file said of itself (strings, as safetensors keeps them).

    What a stranger's file changes beside plain LoRA layers stands in `others` and `biases`; no file of ours
    has any (`lcm_kit.lora.plain` makes layers of it).
    """

    layers: Mapping[str, Layer]
    metadata: Mapping[str, str] = field(default_factory=dict)
    others: Mapping[str, Update] = field(default_factory=dict)  # LoHa, LoKr, DoRA, ... and norms, by module
    biases: Mapping[str, Tensor] = field(default_factory=dict)  # what a module's bias [out] changes by

    @property
    def updates(self) -> dict[str, Update]:
        """All that changes a weight, by module."""
        return {**self.layers, **self.others}

    @property
    def plain(self) -> bool:
        """Whether its layers are all of it."""
        return not self.others and not self.biases

    def parts(self) -> tuple[str, ...]:
        """Which of `PARTS` it changes."""
        found = {name.split(".", 1)[0] for name in (*self.layers, *self.others, *self.biases)}
        return tuple(part for part in PARTS if part in found)

    @property
    def parameters(self) -> int:
        """Elements of all down and up weights."""
        return sum(layer.down.numel() + layer.up.numel() for layer in self.layers.values())


def layer_group(module: str) -> str:
    """The block of a module, for reports: `unet.down_blocks.1`, `unet.mid_block`, `text_encoder`."""
    part, _, rest = module.partition(".")
    if part != "unet":
        return part
    words = rest.split(".")
    return ".".join([part, *words[: 2 if words[0] in ("down_blocks", "up_blocks") else 1]])
