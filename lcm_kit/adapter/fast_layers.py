"""peft's LoRA layers with a forward of our own, and linear layers of one input that are one product.

A layer stays peft's object: the same parameters, names, flags and merging; its class becomes a subclass with
another `forward`. It takes the way of peft where ours is not exact or not known: under autocast, where the
dtypes are autocast's affair, with merged weights, and for what peft's forward can be asked beyond x.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lcm_kit.adapter import fast_math
from lcm_kit.adapter.fast_math import Pair


def under_autocast(device: torch.device) -> bool:
    """Whether a pass on `device` would be under autocast; the meta device has none."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def is_fast(layer: Any) -> bool:
    """Whether `layer` has our forward."""
    return isinstance(layer, _Fast)


def make_fast(layer: Any) -> bool:
    """Give a LoRA layer of peft our forward; False, and nothing changed, for a kind that has none.

    There is one for frozen linear layers, also in 4 and 8 bits, and for convolutions, with plain LoRAs.
    """
    from peft.tuners.lora.layer import Conv2d, Linear

    base = layer.base_layer
    plain = not any(layer.use_dora.values()) and not getattr(layer, "lora_variant", None)
    plain = plain and all(type(drop) is nn.Identity for drop in layer.lora_dropout.values())
    plain = plain and not any(up.bias is not None for up in layer.lora_B.values())
    if not plain or any(p.requires_grad for p in base.parameters()):
        return False
    if type(layer) is Linear and type(base) is nn.Linear:
        kind: type[_Fast] = FastLinear
    elif type(layer) is Conv2d and type(base) is nn.Conv2d and base.groups == 1:
        if base.padding_mode != "zeros" or isinstance(base.padding, str):
            return False
        kind = _FastConvolution
    elif type(layer).__module__.startswith("peft.tuners.lora.bnb"):
        kind = _FastQuantized
    else:
        return False
    layer.__class__ = _subclass(kind, type(layer))  # type: ignore[arg-type]
    layer.__dict__ |= {"pairs": {}, "given": ()}
    return True


@lru_cache
def _subclass(kind: Any, of: Any) -> Any:
    return type(of.__name__, (kind, of), {})


class _Fast:
    """What our layers have in common.

    `pairs`: by name of a LoRA what a pass sees of it. `given`: inputs and what the layer makes of them, where
    that was computed with other layers beforehand. `FastPath` sets both.
    """

    pairs: dict[str, Pair]
    given: Sequence[tuple[Tensor, Tensor]]
    _disable_adapters: bool
    _active_adapter: Sequence[str]

    def on(self, x: Tensor) -> list[Pair] | None:
        """The LoRAs that are on; None where peft's forward is to be taken."""
        if under_autocast(x.device) or self.merged_adapters:  # type: ignore[attr-defined]
            return None
        if self._disable_adapters:
            return []
        found = [self.pairs.get(name) for name in self._active_adapter]
        return None if None in found else found  # type: ignore[return-value]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        for known, output in self.given:
            if known is x:
                return output
        on = None if args or kwargs else self.on(x)
        if on is None:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        return self.computed(x, on)

    def computed(self, x: Tensor, on: Sequence[Pair]) -> Tensor:
        raise NotImplementedError


class FastLinear(_Fast):
    """A frozen `nn.Linear` with its LoRAs: peft's layer with our forward."""

    lora_A: nn.ModuleDict
    lora_B: nn.ModuleDict
    scaling: dict[str, float]

    base_layer: nn.Linear

    def computed(self, x: Tensor, on: Sequence[Pair]) -> Tensor:
        """Of x [..., in] with the LoRAs `on`: [..., out]."""
        return linear(x, self.base_layer.weight, self.base_layer.bias, on)


class _FastQuantized(_Fast):
    base_layer: Any

    def computed(self, x: Tensor, on: Sequence[Pair]) -> Tensor:
        y = self.base_layer(x)
        for pair in on:
            y = fast_math.added(y, x, pair)
        return y


class _FastConvolution(_Fast):
    base_layer: nn.Conv2d

    def computed(self, x: Tensor, on: Sequence[Pair]) -> Tensor:
        base = self.base_layer
        if not on:
            return base(x)
        geometry = list(base.stride), [int(pad) for pad in base.padding], list(base.dilation)
        rows = len(x) * x.shape[2] * x.shape[3] // (geometry[0][0] * geometry[0][1])
        if len(on) == 1 and fast_math.merging_pays(rows, base.weight, on[0]):
            return F.conv2d(x, fast_math.merged(base.weight, on[0]), base.bias, *geometry)
        y = fast_math.convolution(x, base.weight, base.bias, geometry, on[0])
        for pair in on[1:]:
            y = y + fast_math.convolved(x, geometry, pair)
        return y


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, on: Sequence[Pair]) -> Tensor:
    """Frozen linear layers of one input, as `fast_math.linear`, with any number of LoRAs."""
    if not on:
        return F.linear(x, weight, bias)
    rows = x.numel() // x.shape[-1]
    if len(on) == 1 and fast_math.merging_pays(rows, weight, on[0]):
        return F.linear(x, fast_math.merged(weight, on[0]), bias)
    y = fast_math.linear(x, weight, bias, on[0])
    for pair in on[1:]:
        y = fast_math.added(y, x, pair)
    return y


class Together:
    """Linear layers of one input, in units of one width: their weights are views of one, and one product.

    No memory is added. Each layer remains usable alone.
    """

    def __init__(self, units: Sequence[Sequence[FastLinear]]) -> None:
        """`units`: fast linear layers of peft, as `fit_together`."""
        self.units = units
        self.layers = [layer for unit in units for layer in unit]
        bases = [layer.base_layer for layer in self.layers]
        self._weight = _in_one([base.weight for base in bases])
        self._bias = None if bases[0].bias is None else _in_one([base.bias for base in bases])
        self._widths = [sum(layer.base_layer.out_features for layer in unit) for unit in units]
        self.pairs: dict[str, Pair] = {}
        self.usable = True

    def on(self, x: Tensor) -> list[Pair] | None:
        """The LoRAs that are on, of all layers at once; None where each is to be asked alone."""
        first, *others = self.layers
        if not self.usable or first.on(x) is None:
            return None
        if any(layer._disable_adapters != first._disable_adapters for layer in others):
            return None
        if first._disable_adapters:
            return []
        names = first._active_adapter
        if any(layer._active_adapter != names for layer in others):
            return None
        found = [self.pairs.get(name) for name in names]
        return None if None in found else found  # type: ignore[return-value]

    def look(self) -> None:
        """See whether the layers' weights still lie in one: no longer after they were moved or replaced."""
        first = self.layers[0].base_layer.weight
        moved = first.device != self._weight.device or first.data_ptr() != self._weight.data_ptr()
        self.usable = not moved

    def __call__(self, x: Tensor, on: Sequence[Pair]) -> list[Sequence[Tensor]]:
        """What each layer of each unit makes of x [..., in] with the LoRAs `on`."""
        y = linear(x, self._weight, self._bias, on)
        parts = [y] if len(self.units) == 1 else y.split(self._widths, -1)
        return [
            [part] if len(unit) == 1 else part.unflatten(-1, (len(unit), -1)).unbind(-2)
            for unit, part in zip(self.units, parts, strict=True)
        ]

    def show(self, name: str, pair: Pair) -> None:
        """Let all layers, together and alone, see `pair` as the LoRA `name`."""
        self.pairs[name] = pair
        downs = iter(pair.down.chunk(len(self.layers)))
        for unit, up in zip(self.units, pair.ups, strict=True):
            for layer, own in zip(unit, up.split(1), strict=True):
                layer.pairs[name] = Pair(next(downs), [own], pair.scale)


def fit_together(units: Sequence[Sequence[Any]]) -> bool:
    """Whether these are fast linear layers of one input width and dtype, of one output width in a unit."""
    layers = [layer for unit in units for layer in unit]
    if len(layers) < 2 or not all(isinstance(layer, FastLinear) for layer in layers):
        return False
    bases = [layer.base_layer for layer in layers]
    if len({(base.in_features, base.weight.dtype, base.bias is None) for base in bases}) > 1:
        return False
    return all(len({layer.base_layer.out_features for layer in unit}) == 1 for unit in units)


def _in_one(parameters: Sequence[Tensor]) -> Tensor:
    one = torch.cat([p.detach() for p in parameters])
    for p, part in zip(parameters, one.split([len(p) for p in parameters]), strict=True):
        p.data = part
    return one
