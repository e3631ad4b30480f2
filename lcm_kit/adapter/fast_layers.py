"""peft's LoRA layers with a forward of our own, and attention that asks for q, k and v at once.

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
        kind: type[_Fast] = _FastLinear
    elif type(layer) is Conv2d and type(base) is nn.Conv2d and base.groups == 1:
        if base.padding_mode != "zeros" or isinstance(base.padding, str):
            return False
        kind = _FastConvolution
    elif type(layer).__module__.startswith("peft.tuners.lora.bnb"):
        kind = _FastQuantized
    else:
        return False
    layer.__class__ = _subclass(kind, type(layer))
    layer.__dict__["pairs"] = {}
    return True


@lru_cache
def _subclass(kind: type, of: type) -> type:
    return type(of.__name__, (kind, of), {})


class _Fast:
    """What our layers have in common. `pairs`: by name of a LoRA what a pass sees of it, set by `FastPath`."""

    pairs: dict[str, Pair]
    _disable_adapters: bool
    _active_adapter: Sequence[str]

    def on(self, x: Tensor) -> list[Pair] | None:
        """The LoRAs that are on; None where peft's forward is to be taken."""
        if torch.is_autocast_enabled(x.device.type) or self.merged_adapters:  # type: ignore[attr-defined]
            return None
        if self._disable_adapters:
            return []
        found = [self.pairs.get(name) for name in self._active_adapter]
        return None if None in found else found  # type: ignore[return-value]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        on = None if args or kwargs else self.on(x)
        if on is None:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        return self.computed(x, on)

    def computed(self, x: Tensor, on: Sequence[Pair]) -> Tensor:
        raise NotImplementedError


class _FastLinear(_Fast):
    base_layer: nn.Linear

    def computed(self, x: Tensor, on: Sequence[Pair]) -> Tensor:
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
        geometry = list(base.stride), list(base.padding), list(base.dilation)
        y = fast_math.convolution(x, base.weight, base.bias, geometry, on[0])
        for pair in on[1:]:
            y = y + fast_math.convolved(x, geometry, pair)
        return y


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, on: Sequence[Pair]) -> Tensor:
    """Frozen linear layers of one input, as `fast_math.linear`, with any number of LoRAs."""
    if not on:
        return F.linear(x, weight, bias)
    y = fast_math.linear(x, weight, bias, on[0])
    for pair in on[1:]:
        y = fast_math.added(y, x, pair)
    return y


# -- Attention -----------------------------------------------------------------------------------------------


class Together:
    """Linear layers of one input: their weights are views of one, so that they are one product.

    No memory is added. Each layer remains usable alone.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        """`layers`: fast linear layers of peft, all with a bias or none."""
        self.layers = list(layers)
        bases = [layer.base_layer for layer in layers]
        self._weight = _in_one([base.weight for base in bases])
        self._bias = None if bases[0].bias is None else _in_one([base.bias for base in bases])
        self.pairs: dict[str, Pair] = {}

    def whole(self) -> bool:
        """Whether the layers' weights still lie in one: no longer after they were moved or replaced."""
        first = self.layers[0].base_layer.weight
        return first.device == self._weight.device and first.data_ptr() == self._weight.data_ptr()

    def on(self, x: Tensor) -> list[Pair] | None:
        """The LoRAs that are on, of all layers at once; None where each is to be asked alone."""
        first = self.layers[0]
        if first.on(x) is None or not self.whole():
            return None
        if first._disable_adapters:
            return None if any(not layer._disable_adapters for layer in self.layers) else []
        names = first._active_adapter
        if any(layer._disable_adapters or layer._active_adapter != names for layer in self.layers[1:]):
            return None
        found = [self.pairs.get(name) for name in names]
        return None if None in found else found  # type: ignore[return-value]

    def __call__(self, x: Tensor, on: Sequence[Pair]) -> Sequence[Tensor]:
        """What each layer makes of x [..., in]."""
        y = linear(x, self._weight, self._bias, on)
        return y.view(*y.shape[:-1], len(self.layers), -1).unbind(-2)


def _in_one(parameters: Sequence[nn.Parameter]) -> Tensor:
    one = torch.cat([p.detach() for p in parameters])
    for p, part in zip(parameters, one.split([len(p) for p in parameters]), strict=True):
        p.data = part
    return one


class Attention:
    """diffusers' scaled dot-product attention, by fewer kernels: a processor for `Attention.processor`.

    Self-attention asks for q, k and v at once, cross-attention for k and v. Where something is asked for that
    it does not have (a mask, another input) the processor that was there before answers.
    """

    def __init__(self, before: Any, together: Together) -> None:
        """`together`: of q, k and v, or of k and v."""
        self.before, self.together = before, together
        self.of_self = len(together.layers) == 3

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """As diffusers' `AttnProcessor2_0`."""
        x, context = hidden_states, encoder_hidden_states
        on = None
        if attention_mask is None and x.ndim == 3 and not args and not kwargs:
            on = self.together.on(x) if self.of_self == (context is None) else None
        if on is None:
            found: Tensor = self.before(attn, x, context, attention_mask, temb, *args, **kwargs)
            return found
        if self.of_self:
            q, k, v = self.together(x, on)
        else:
            assert context is not None
            q, (k, v) = attn.to_q(x), self.together(context, on)
        q, k, v = (part.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for part in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](y))


def join(attn: Any) -> Together | None:
    """Let an `Attention` of diffusers ask for q, k and v at once; None where its layers or ways do not fit."""
    from diffusers.models.attention_processor import AttnProcessor2_0

    if not (
        type(attn.processor) is AttnProcessor2_0
        and attn.spatial_norm is None and attn.group_norm is None and not attn.norm_cross
        and getattr(attn, "norm_q", None) is None and getattr(attn, "norm_k", None) is None
        and not attn.residual_connection and attn.rescale_output_factor == 1
    ):  # fmt: skip
        return None
    layers = [attn.to_k, attn.to_v] if attn.is_cross_attention else [attn.to_q, attn.to_k, attn.to_v]
    if not all(isinstance(layer, _FastLinear) for layer in layers):
        return None
    bases = [layer.base_layer for layer in layers]
    if len({(base.weight.shape, base.weight.dtype, base.bias is None) for base in bases}) > 1:
        return None
    together = Together(layers)
    attn.processor = Attention(attn.processor, together)
    return together
