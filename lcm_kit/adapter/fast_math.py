"""A layer and its LoRA as one autograd function: y = W x + b + s B (A x), with two kernels more than W x + b.

peft computes the same in float32 beside a base in half precision, with a cast before and after every product
and one for every gradient of a cast. Here all tensors have the base's dtype, and the frozen base has no
gradient, so nothing is saved for it. A layer with n outputs of one input (q, k and v) is one product each.

Where torch.compile looks at it the same is said in plain operations, which it fuses itself.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


class Pair(NamedTuple):
    """A LoRA's weights in the dtype that its layer computes in.

    Of linear layers of one input, n of them: down [n * r, in], up [n, out, r]. Of a convolution: down
    [r, in, kh, kw], up [1, out, r].
    """

    down: Tensor
    up: Tensor
    scale: float  # s


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, pair: Pair) -> Tensor:
    """n linear layers of one input with their LoRA: x [..., in] -> [..., n * out].

    `weight` [n * out, in] and `bias` [n * out] are frozen.
    """
    if torch.compiler.is_compiling():
        return F.linear(x, weight, bias) + _plain(x, pair)
    y: Tensor = _Linear.apply(x, weight, bias, *pair)
    return y


def added(y: Tensor, x: Tensor, pair: Pair) -> Tensor:
    """y [..., n * out] with the LoRA's part of the same input x [..., in], whatever made y."""
    if torch.compiler.is_compiling():
        return y + _plain(x, pair)
    found: Tensor = _Added.apply(y, x, *pair)
    return found


def _plain(x: Tensor, pair: Pair) -> Tensor:
    n, out, r = pair.up.shape
    h = F.linear(x, pair.down)
    parts = [F.linear(h[..., k * r : (k + 1) * r], pair.up[k]) for k in range(n)]
    return pair.scale * (parts[0] if n == 1 else torch.cat(parts, dim=-1))


# What follows sees rows: N of them, [N, ...]; of n layers beside each other [n, N, ...], which is a view.


def _side_by_side(rows: Tensor, n: int) -> Tensor:
    return rows.view(len(rows), n, -1).transpose(0, 1)


def _add_up(y: Tensor, h: Tensor, up: Tensor, scale: float) -> None:
    """y [N, n * out] += s B h, h [N, n * r]: one kernel."""
    if len(up) == 1:
        y.addmm_(h, up[0].t(), alpha=scale)
    else:
        n = len(up)
        _side_by_side(y, n).baddbmm_(_side_by_side(h, n), up.transpose(1, 2), alpha=scale)


def _up_backward(dy: Tensor, h: Tensor, up: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(dh [N, n * r], dup [n, out, r]) from dy [N, n * out]."""
    n, _, r = up.shape
    if n == 1:
        dh, dup = dy @ up[0], (dy.t() @ h)[None]
    else:
        dh = dy.new_empty(len(dy), n * r)
        wide = _side_by_side(dy, n)
        torch.bmm(wide, up, out=_side_by_side(dh, n))
        dup = wide.transpose(1, 2) @ _side_by_side(h, n)
    return _scaled(dh, scale), _scaled(dup, scale)


def _scaled(value: Tensor, scale: float) -> Tensor:
    return value if scale == 1 else value.mul_(scale)


class _Linear(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y = rows @ weight.t() if bias is None else torch.addmm(bias, rows, weight.t())
        h = rows @ down.t()
        _add_up(y, h, up, scale)
        ctx.save_for_backward(rows, weight, down, up, h)
        ctx.scale, ctx.shape = scale, x.shape
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, down, up, h = ctx.saved_tensors
        dy = dy.reshape(-1, dy.shape[-1])
        dh, dup = _up_backward(dy, h, up, ctx.scale)
        dx = torch.addmm(dy @ weight, dh, down).view(ctx.shape) if ctx.needs_input_grad[0] else None
        trained = ctx.needs_input_grad[3]
        return dx, None, None, (dh.t() @ rows if trained else None), (dup if trained else None), None


class _Added(Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        h, found = rows @ down.t(), y.reshape(-1, y.shape[-1]).clone()
        _add_up(found, h, up, scale)
        ctx.save_for_backward(rows, down, up, h)
        ctx.scale, ctx.shape = scale, x.shape
        return found.view(y.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        rows, down, up, h = ctx.saved_tensors
        dh, dup = _up_backward(dy.reshape(-1, dy.shape[-1]), h, up, ctx.scale)
        dx = (dh @ down).view(ctx.shape) if ctx.needs_input_grad[1] else None
        trained = ctx.needs_input_grad[2]
        return dy, dx, (dh.t() @ rows if trained else None), (dup if trained else None), None


# -- Convolutions --------------------------------------------------------------------------------------------

Geometry = tuple[list[int], list[int], list[int]]  # stride, padding, dilation


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, pair: Pair) -> Tensor:
    """A convolution with its LoRA, whose A has the same geometry and whose B is 1x1: x [B, in, h, w]."""
    if torch.compiler.is_compiling():
        return F.conv2d(x, weight, bias, *geometry) + convolved(x, geometry, pair)
    y: Tensor = _Convolution.apply(x, weight, bias, geometry, *pair)
    return y


def convolved(x: Tensor, geometry: Geometry, pair: Pair) -> Tensor:
    """The LoRA's part of a convolution alone, in plain operations."""
    return pair.scale * F.conv2d(F.conv2d(x, pair.down, None, *geometry), pair.up[0, :, :, None, None])


def _conv_backward(
    dy: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, of_x: bool, of_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    dx, dweight, _ = torch.ops.aten.convolution_backward(
        dy, x, weight, None, *geometry, False, [0, 0], 1, [of_x, of_weight, False]
    )
    return dx, dweight


_POINT: Geometry = [1, 1], [0, 0], [1, 1]


class _Convolution(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry,
        down: Tensor, up: Tensor, scale: float,
    ) -> Tensor:  # fmt: skip
        y = F.conv2d(x, weight, bias, *geometry)
        h = F.conv2d(x, down, None, *geometry)
        y.view(*y.shape[:2], -1).baddbmm_(up.expand(len(y), -1, -1), h.flatten(2), alpha=scale)
        ctx.save_for_backward(x, weight, down, up, h)
        ctx.scale, ctx.geometry = scale, geometry
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, down, up, h = ctx.saved_tensors
        of_x, trained = ctx.needs_input_grad[0], ctx.needs_input_grad[4]
        dh, dup = _conv_backward(dy, h, up[0, :, :, None, None], _POINT, True, trained)
        assert dh is not None
        _scaled(dh, ctx.scale)
        dx, ddown = _conv_backward(dh, x, down, ctx.geometry, of_x, trained)
        if of_x:
            base, _ = _conv_backward(dy, x, weight, ctx.geometry, True, False)
            assert base is not None
            dx = base.add_(dx)
        dup = None if dup is None else _scaled(dup, ctx.scale).view(up.shape)
        return dx, None, None, None, ddown, dup, None
