"""The way in which a UNet with LoRAs is trained: float32 weights in one buffer, no cast inside a pass.

peft stays the format: names, parameters, flags and files are its own. Beside it a step of SD1.5 has less than
half the kernels (docs/benchmarks.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from lcm_kit.adapter.fast_layers import Together, is_fast, join, make_fast
from lcm_kit.adapter.flat_weights import FlatWeights, Slot


class FastPath:
    """Our forward in all LoRA layers of a UNet that have one, and the weights that they see in a pass."""

    def __init__(self, unet: nn.Module, layers: Iterable[Any], on: Callable[[], Sequence[str]]) -> None:
        """`layers`: peft's of `unet`, which changes in place. `on()`: the names of LoRAs that are on."""
        self.slow = [layer for layer in layers if not make_fast(layer)]
        self._layers = [layer for layer in unet.modules() if is_fast(layer)]
        self._together = [found for module in _attentions(unet) if (found := join(module))]
        self._weights: dict[str, tuple[FlatWeights, list[Any]]] = {}
        self._on, self._unet = on, unet
        self._dtype = next(p for p in unet.parameters() if p.is_floating_point()).dtype
        for name in sorted({name for layer in self._layers for name in layer.lora_A}):
            self._gather(name)
        unet.register_forward_pre_hook(self._before_pass)

    def _gather(self, name: str) -> None:
        """Put the weights of the LoRA `name` into one buffer. Of layers that are not ours they stay."""
        held = [(group.layers, group) for group in self._together]
        held = [(layers, group) for layers, group in held if _have_alike(layers, name)]
        grouped = {id(layer) for layers, _ in held for layer in layers}
        singles = [layer for layer in self._layers if id(layer) not in grouped and name in layer.lora_A]
        owners = [*held, *(([layer], layer) for layer in singles)]
        slots = [
            Slot(
                [layer.lora_A[name].weight for layer in layers],
                [layer.lora_B[name].weight for layer in layers],
                float(layers[0].scaling[name]),
            )
            for layers, _ in owners
        ]
        if slots:
            self._weights[name] = FlatWeights(slots, channels_last=_channels_last(self._unet)), owners

    def _before_pass(self, unet: nn.Module, args: Any) -> None:
        """Show all layers the weights as they are now. What a pass saw stays for what recomputes it."""
        for name in self._on():
            if name not in self._weights:
                continue
            weights, owners = self._weights[name]
            for (layers, owner), pair in zip(owners, weights.cast(self._dtype), strict=True):
                owner.pairs[name] = pair
                if len(layers) > 1:
                    downs = pair.down.chunk(len(layers))
                    for layer, down, up in zip(layers, downs, pair.up.split(1), strict=True):
                        layer.pairs[name] = pair._replace(down=down, up=up)


def _attentions(unet: nn.Module) -> list[Any]:
    from diffusers.models.attention_processor import Attention

    return [module for module in unet.modules() if isinstance(module, Attention)]


def _have_alike(layers: Sequence[Any], name: str) -> bool:
    """Whether all `layers` have the LoRA `name`, of one rank and strength."""
    if not all(name in layer.lora_A for layer in layers):
        return False
    return len({(len(layer.lora_A[name].weight), layer.scaling[name]) for layer in layers}) == 1


def _channels_last(unet: nn.Module) -> bool:
    first = next(p for p in unet.parameters() if p.ndim == 4 and p.shape[2] > 1)
    return not first.is_contiguous()
