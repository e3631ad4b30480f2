"""The way in which a UNet with LoRAs is trained: float32 weights in one buffer, no cast inside a pass.

peft stays the format: names, parameters, flags and files are its own. Beside it a step has less than half the
kernels (docs/benchmarks.md).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lcm_kit.adapter.fast_blocks import (
    join_attention,
    make_fast_resnet,
    make_fast_transformer,
    time_once,
)
from lcm_kit.adapter.fast_layers import Together, is_fast, make_fast, under_autocast
from lcm_kit.adapter.fast_math import Pair
from lcm_kit.adapter.flat_weights import FlatWeights, Slot


class FastPath:
    """Our forward in all LoRA layers of a UNet that have one, and the weights that they see in a pass."""

    def __init__(self, unet: Any, layers: Iterable[Any], on: Callable[[], Sequence[str]]) -> None:
        """`layers`: peft's of `unet`, which changes in place. `on()`: the names of LoRAs that are on."""
        self.slow = [layer for layer in layers if not make_fast(layer)]
        self._layers = [layer for layer in unet.modules() if is_fast(layer)]
        self._on, self._unet = on, unet
        self._dtype = next(p for p in unet.parameters() if p.is_floating_point()).dtype
        for block in list(unet.modules()):
            make_fast_resnet(block)
            make_fast_transformer(block)
        self._last: dict[str, list[Pair]] = {}  # of each LoRA what the last pass with gradient saw
        self._pass = object()  # a name for the pass that is being made
        time = time_once(unet, lambda: self._pass)
        own, self._text = join_attention(unet)
        self._shared = [shared for shared in (time, self._text) if shared]
        self._together = [*own, *(shared.together for shared in self._shared)]
        names = sorted({name for layer in self._layers for name in layer.lora_A})
        self._weights = {name: self._gathered(name) for name in names}
        unet.register_forward_pre_hook(self._before_pass, with_kwargs=True)
        unet.register_forward_hook(self._after_pass, always_call=True)

    def _gathered(self, name: str) -> tuple[FlatWeights, list[Callable[[str, Pair], None]]]:
        """The weights of the LoRA `name` in one buffer, and of each of its slots who is shown it."""
        groups = [group for group in self._together if _have_alike(group, name)]
        grouped = {id(layer) for group in groups for layer in group.layers}
        singles = [layer for layer in self._layers if id(layer) not in grouped and name in layer.lora_A]
        units = [*(group.units for group in groups), *([[layer]] for layer in singles)]
        slots = [
            Slot(
                [layer.lora_A[name].weight for unit in each for layer in unit],
                [[layer.lora_B[name].weight for layer in unit] for unit in each],
                float(each[0][0].scaling[name]),
            )
            for each in units
        ]
        show = [*(group.show for group in groups), *(layer.pairs.__setitem__ for layer in singles)]
        return FlatWeights(slots, channels_last=_channels_last(self._unet)), show

    def gradient_bytes(self, name: str) -> set[int]:
        """Sizes of the tensors in which the gradients of the LoRA `name` come."""
        sizes = self._weights[name][0].sizes
        return {size * self._dtype.itemsize for size in (*sizes, sum(sizes))} | {4 * sum(sizes)}

    def _before_pass(
        self, unet: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """Show all layers the weights as they are now. What a pass saw stays for what recomputes it.

        Latents and text get the UNet's dtype, for which autocast cared before: text encoders that are trained
        are float32. Times and sizes stay, which half precision would round.
        """
        if not under_autocast(next(unet.parameters()).device):
            args = [value if place == 1 else _to(value, self._dtype) for place, value in enumerate(args)]
            kwargs = {
                key: value if key == "timestep" else _to(value, self._dtype) for key, value in kwargs.items()
            }
        self._pass = whose = object()
        for group in self._together:
            group.look()
        for name in self._on():
            if name in self._weights:
                pairs = self._weights[name][0].cast(self._dtype, partial(_forget, weakref.ref(self), whose))
                self._show(name, pairs)
                if torch.is_grad_enabled():
                    self._last[name] = pairs
        text = args[2] if len(args) > 2 else kwargs.get("encoder_hidden_states")
        if self._text and isinstance(text, Tensor):
            text = text.view_as(text)  # an object of this pass alone, by which its layers know it
            if len(args) > 2:
                args = [*args[:2], text, *args[3:]]
            else:
                kwargs = {**kwargs, "encoder_hidden_states": text}
            self._text.give(text, whose)
        return tuple(args), kwargs

    def _after_pass(self, unet: nn.Module, args: Sequence[Any], output: Any) -> None:
        """Forget what no backward will ask for: of a pass without gradient, or that failed.

        After one without gradient, which may have seen an average, layers see again what the last one with
        gradient saw: gradient checkpointing computes that one's blocks anew.
        """
        if output is None or not torch.is_grad_enabled():
            self._forget(self._pass)
            for name in self._on():
                if name in self._last:
                    self._show(name, self._last[name])

    def _show(self, name: str, pairs: Sequence[Pair]) -> None:
        for show, pair in zip(self._weights[name][1], pairs, strict=True):
            show(name, pair)

    def _forget(self, whose: object) -> None:
        for shared in self._shared:
            shared.forget(whose)


def _forget(path: weakref.ref[FastPath], whose: object) -> None:
    """For autograd's nodes, which the layers hold: a strong one would be a ring that no collector sees."""
    found = path()
    if found:
        found._forget(whose)


def _have_alike(group: Together, name: str) -> bool:
    """Whether all layers of `group` have the LoRA `name`, of one rank and strength."""
    if not all(name in layer.lora_A for layer in group.layers):
        return False
    return len({(layer.lora_A[name].weight.shape, layer.scaling[name]) for layer in group.layers}) == 1


def _channels_last(unet: nn.Module) -> bool:
    first = next(p for p in unet.parameters() if p.ndim == 4 and p.shape[2] > 1)
    return not first.is_contiguous()


def _to(value: Any, dtype: torch.dtype) -> Any:
    """`value`, a tensor or a dict of some, with `dtype` in the place of other floating ones; sizes stay."""
    if isinstance(value, dict):
        return {key: item if key == "time_ids" else _to(item, dtype) for key, item in value.items()}
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
