"""bitsandbytes' linear layers, frozen, that hold and return under autocast what a plain layer does.

The library's own int8 layer keeps its input on the autograd context, outside of what a checkpoint can drop,
and says at each pass that it casts; both of its layers return the dtype of their input, which behind a norm
that autocast computes in float32 makes all that follows float32. Import this only where bitsandbytes is.
"""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
from torch import Tensor

_LARGEST = 127.0  # of int8; a row of weights is its integers times its scale over this


def _as_autocast(x: Tensor) -> Tensor:
    """`x` in the dtype in which a plain linear layer would take it."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


class Linear4bit(bnb.nn.Linear4bit):
    """The library's, which returns autocast's dtype where autocast is on, as `torch.nn.Linear` does."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        return super().forward(_as_autocast(x))


class Linear8bitLt(bnb.nn.Linear8bitLt):
    """The library's, with a forward of its own for frozen weights and no outlier columns (threshold 0).

    On a GPU activations are rounded to int8 as well, row by row, and the product is one of integers; on
    other devices the weight is expanded for each product, which is faster there and rounds less.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out], in the dtype of `x`, or autocast's where autocast is on."""
        x = _as_autocast(x)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return _Int8.apply(x, self.weight, self.state.SCB, bias, x.device.type == "cuda")


class _Int8(torch.autograd.Function):
    """x W^T + b. For the backward it saves W, which is there anyway, and nothing of x."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, few: bool
    ) -> Tensor:
        ctx.save_for_backward(weight, scales)
        if not few or not x.numel():
            return F.linear(x, _expanded(weight, scales, x.dtype), bias)
        rows, of_rows, _ = bnb.functional.int8_vectorwise_quant(x.reshape(-1, x.shape[-1]).to(torch.float16))
        product = torch.ops.bitsandbytes.int8_scaled_mm.default
        y = product(rows, weight, of_rows, scales, bias=bias, dtype=x.dtype)
        return y.view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weight, scales = ctx.saved_tensors
        (of_y,) = gradients
        return of_y @ _expanded(weight, scales, of_y.dtype), None, None, None, None


def _expanded(weight: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight [out, in] in `dtype`, of its integers and one scale a row."""
    return weight.to(dtype).mul_(scales.unsqueeze(1).mul(1 / _LARGEST))
