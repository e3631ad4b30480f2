"""LoRAs in the weights while many pictures are drawn, and out of them again, bit for bit.

peft adds each LoRA beside its layer, in every pass: 8 to 12% of the arithmetic, several times the kernels.
What is drawn many times with the same adapters is cheaper with W + sum_i scale_i B_i A_i in W's place. A
layer's sum is exact in float32 and rounded once, to the dtype of the base; it is taken where that moves the
weight by no more than `TOLERANCE` of it. bfloat16 has too few digits for that, and other kinds of layers
(quantised, DoRA, a LoRA with biases) have no such sum: they stay with peft.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lcm_kit.bases.out_of_memory import out_of_memory

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3}  # ||stored - exact|| / ||exact||, by dtype of the base


@dataclass
class _Layer:
    """A peft layer whose adapters are in its base's weight."""

    module: Any
    own: Tensor  # the weight as it was


@dataclass
class Fused:
    """What `fuse` did."""

    layers: list[_Layer] = field(default_factory=list)
    left: int = 0  # layers with an adapter that stay with peft

    def undo(self) -> None:
        """Put the weights back that were there, bit for bit, and the adapters beside them; once."""
        while self.layers:
            layer = self.layers.pop()
            weight = layer.module.base_layer.weight
            weight.data = layer.own.to(weight.device)
            layer.module._disable_adapters = False
            layer.module.__dict__.pop("forward", None)


@torch.no_grad()
def fuse(pipe: Any, *, keep: bool = True, keep_on: str | torch.device = "cpu") -> Fused:
    """Put the active adapters of a pipeline, at their weights, into its weights; `Fused.undo` takes them out.

    `keep` keeps the weights that were there, on the CPU, so that a GPU holds one set of them: as much memory
    as the layers have that a LoRA changes. On `keep_on`, if that is the GPU, they are put back in no time,
    and lie there twice. Without it they are gone, and there is no way back: for a pipeline
    that draws with these adapters alone. Until it is undone no adapter may be loaded, set or taken away.
    Layers that cannot be fused exactly enough are drawn by peft, as before.
    """
    done = Fused()
    with _exact_products():
        for module in _adapted(pipe):
            weight = module.base_layer.weight
            try:
                held = _fused(module, weight)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                held = None  # this layer is drawn by peft, which needs no more
            if held is None:
                done.left += 1
                continue
            if keep:
                done.layers.append(_Layer(module, weight.data.to(keep_on)))
            weight.data = held
            module._disable_adapters = True
            if pipe.unet._compiled_call_impl is None:  # else it is gone anyway, and what was traced may stay
                module.forward = module.base_layer.forward  # peft's own, which looks for adapters, costs time
    return done


@contextlib.contextmanager
def _exact_products() -> Iterator[None]:
    """Without TensorFloat-32, which a training in the same process may have allowed."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _adapted(pipe: Any) -> Iterator[Any]:
    """The layers of a pipeline's models whose adapters are on."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for model in (pipe.unet, getattr(pipe, "text_encoder", None), getattr(pipe, "text_encoder_2", None)):
        for module in () if model is None else model.modules():
            if isinstance(module, BaseTunerLayer) and not module.disable_adapters and _active(module):
                yield module


def _active(module: Any) -> list[str]:
    return [name for name in module.active_adapters if name in getattr(module, "lora_A", ())]


def _fused(module: Any, weight: Tensor) -> Tensor | None:
    """The weight with the adapters in it, in its own dtype and layout; None if that is not exact enough."""
    from peft.tuners.lora import layer as peft_layers

    plain = type(module) in (peft_layers.Linear, peft_layers.Conv2d)
    if not plain or type(module.base_layer) not in (nn.Linear, nn.Conv2d) or weight.dtype not in TOLERANCE:
        return None
    if module.merged or getattr(module, "fan_in_fan_out", False):
        return None
    exact = weight.float() if weight.dtype != torch.float32 else weight.clone()
    for name in _active(module):
        down, up = module.lora_A[name].weight, module.lora_B[name].weight
        if name in module.lora_variant or module.lora_B[name].bias is not None:
            return None
        if any(side != 1 for side in up.shape[2:]) or getattr(module.base_layer, "groups", 1) != 1:
            return None
        product = up.float().flatten(1) @ down.float().flatten(1)
        exact += module.scaling[name] * product.view_as(exact)
    stored = torch.empty_like(weight).copy_(exact)
    error = (stored.float() - exact).norm()
    return stored if error <= TOLERANCE[weight.dtype] * exact.norm() else None
