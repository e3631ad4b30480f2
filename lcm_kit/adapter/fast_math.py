"""A layer and its LoRA as one autograd function: y = W x + b + s B (A x), with two kernels more than W x + b.

peft computes the same in float32 beside a base in half precision, with a cast before and after every product
and one for every gradient of a cast. Here all tensors have the base's dtype, and the frozen base has no
gradient, so nothing is saved for it. A layer with n outputs of one input (q, k and v) is one product each.

Where torch.compile looks at it the same is said in plain operations, which it fuses itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


class Pair(NamedTuple):
    """A LoRA's weights in the dtype that its layer computes in, or of several layers that have one input.

    Linear layers come in units: n layers of one width each, whose outputs lie beside each other. `down` is
    [sum of all n * r, in], `ups` of each unit [n, out, r]. Of a convolution: down [r, in, kh, kw], one up
    [1, out, r].
    """

    down: Tensor
    ups: Sequence[Tensor]
    scale: float  # s


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, pair: Pair) -> Tensor:
    """Linear layers of one input with their LoRA: x [..., in] -> [..., sum of all n * out].

    `weight` [sum of all n * out, in] and `bias` are frozen.
    """
    if torch.compiler.is_compiling():
        return F.linear(x, weight, bias) + _plain(x, pair)
    y: Tensor = _Linear.apply(x, weight, bias, pair.scale, pair.down, *pair.ups)
    return y


def added(y: Tensor, x: Tensor, pair: Pair) -> Tensor:
    """y [..., sum of all n * out] with the LoRA's part of the same input x [..., in], whatever made y."""
    if torch.compiler.is_compiling():
        return y + _plain(x, pair)
    found: Tensor = _Added.apply(y, x, pair.scale, pair.down, *pair.ups)
    return found


def _plain(x: Tensor, pair: Pair) -> Tensor:
    layers = [up for unit in pair.ups for up in unit]
    hs = F.linear(x, pair.down).chunk(len(layers), dim=-1)
    parts = [F.linear(h, up) for h, up in zip(hs, layers, strict=True)]
    return pair.scale * (parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1))


# What follows sees rows: N of them, [N, ...]; of n layers beside each other [n, N, ...], which is a view.


def _side_by_side(rows: Tensor, n: int) -> Tensor:
    return rows.unflatten(1, (n, -1)).transpose(0, 1)


def _units(y: Tensor, h: Tensor, ups: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Of each unit its columns of y and of h, and its up."""
    if len(ups) == 1:
        yield y, h, ups[0]
        return
    ys = y.split([up.shape[0] * up.shape[1] for up in ups], dim=1)
    hs = h.split([up.shape[0] * up.shape[2] for up in ups], dim=1)
    yield from zip(ys, hs, ups, strict=True)


def _add_up(y: Tensor, h: Tensor, ups: Sequence[Tensor], scale: float) -> None:
    """y += s B h: one kernel for each unit (by `out`, since torch counts no FLOPs of `addmm_`)."""
    for part, low, up in _units(y, h, ups):
        if (n := len(up)) == 1:
            torch.addmm(part, low, up[0].t(), alpha=scale, out=part)
        else:
            wide = _side_by_side(part, n)
            torch.baddbmm(wide, _side_by_side(low, n), up.transpose(1, 2), alpha=scale, out=wide)


def _up_backward(
    dy: Tensor, h: Tensor, ups: Sequence[Tensor], scale: float, trained: bool
) -> tuple[Tensor, list[Tensor | None]]:
    """(dh, as h; of each unit its dup) from dy."""
    dh, dups = torch.empty_like(h), list[Tensor | None]()
    for (wide, low, up), (_, dlow, _) in zip(_units(dy, h, ups), _units(dy, dh, ups), strict=True):
        if (n := len(up)) == 1:
            torch.mm(wide, up[0], out=dlow)
            dups.append(_scaled(wide.t() @ low, scale)[None] if trained else None)
        else:
            wide, low = _side_by_side(wide, n), _side_by_side(low, n)
            torch.bmm(wide, up, out=_side_by_side(dlow, n))
            dups.append(_scaled(wide.transpose(1, 2) @ low, scale) if trained else None)
    return _scaled(dh, scale), dups


def _scaled(value: Tensor, scale: float) -> Tensor:
    return value if scale == 1 else value.mul_(scale)


class _Linear(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, scale: float, down: Tensor, *ups: Tensor
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y = rows @ weight.t() if bias is None else torch.addmm(bias, rows, weight.t())
        h = rows @ down.t()
        _add_up(y, h, ups, scale)
        ctx.save_for_backward(rows, h, weight, down, *ups)
        ctx.scale, ctx.shape = scale, x.shape
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        rows, h, weight, down, *ups = ctx.saved_tensors
        of_x, trained = ctx.needs_input_grad[0], ctx.needs_input_grad[4]
        dy = dy.reshape(-1, dy.shape[-1])
        dh, dups = _up_backward(dy, h, ups, ctx.scale, trained)
        dx = torch.addmm(dy @ weight, dh, down).view(ctx.shape) if of_x else None
        return dx, None, None, None, (dh.t() @ rows if trained else None), *dups


class _Added(Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, scale: float, down: Tensor, *ups: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        h, found = rows @ down.t(), y.reshape(-1, y.shape[-1]).clone()
        _add_up(found, h, ups, scale)
        ctx.save_for_backward(rows, h, down, *ups)
        ctx.scale, ctx.shape = scale, x.shape
        return found.view(y.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        rows, h, down, *ups = ctx.saved_tensors
        of_x, trained = ctx.needs_input_grad[1], ctx.needs_input_grad[3]
        dh, dups = _up_backward(dy.reshape(-1, dy.shape[-1]), h, ups, ctx.scale, trained)
        dx = (dh @ down).view(ctx.shape) if of_x else None
        return dy, dx, None, (dh.t() @ rows if trained else None), *dups


# -- Without gradient ----------------------------------------------------------------------------------------


def merging_pays(rows: int, weight: Tensor, pair: Pair) -> bool:
    """Whether W + s B A is to be made for a pass of `rows` rows, as no backward will want W alone.

    That is fewer products where there are more rows than a weight has (on a CPU a target's pass takes three
    quarters of its time), and one kernel less. In float32 alone: half precision would round small updates
    away. Of one unit alone: the rows of text and time are few.
    """
    if torch.is_grad_enabled() or weight.dtype != torch.float32 or len(pair.ups) > 1:
        return False
    n, out, _ = pair.ups[0].shape
    width = weight.numel() // (n * out)
    return rows * (width + out) > width * out


def merged(weight: Tensor, pair: Pair) -> Tensor:
    """W + s B A of linear layers beside each other [n * out, in], or of a convolution [out, in, kh, kw]."""
    (up,) = pair.ups
    n, out, r = up.shape
    w, down = weight.reshape(n, out, -1), pair.down.reshape(n, r, -1)
    return torch.baddbmm(w, up, down, alpha=pair.scale).view(weight.shape)


# -- Convolutions --------------------------------------------------------------------------------------------

Geometry = tuple[list[int], list[int], list[int]]  # stride, padding, dilation


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, pair: Pair) -> Tensor:
    """A convolution with its LoRA, whose A has the same geometry and whose B is 1x1: x [B, in, h, w]."""
    if torch.compiler.is_compiling():
        return F.conv2d(x, weight, bias, *geometry) + convolved(x, geometry, pair)
    y: Tensor = _Convolution.apply(x, weight, bias, geometry, pair.scale, pair.down, pair.ups[0])
    return y


def convolved(x: Tensor, geometry: Geometry, pair: Pair) -> Tensor:
    """The LoRA's part of a convolution alone, in plain operations."""
    return pair.scale * F.conv2d(F.conv2d(x, pair.down, None, *geometry), pair.ups[0][0, :, :, None, None])


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
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, scale: float,
        down: Tensor, up: Tensor,
    ) -> Tensor:  # fmt: skip
        y = F.conv2d(x, weight, bias, *geometry)
        h = F.conv2d(x, down, None, *geometry)
        flat = y.view(*y.shape[:2], -1)
        torch.baddbmm(flat, up.expand(len(y), -1, -1), h.flatten(2), alpha=scale, out=flat)
        ctx.save_for_backward(x, weight, down, up, h)
        ctx.scale, ctx.geometry = scale, geometry
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, down, up, h = ctx.saved_tensors
        of_x, trained = ctx.needs_input_grad[0], ctx.needs_input_grad[5]
        dh, dup = _conv_backward(dy, h, up[0, :, :, None, None], _POINT, True, trained)
        assert dh is not None
        _scaled(dh, ctx.scale)
        dx, ddown = _conv_backward(dh, x, down, ctx.geometry, of_x, trained)
        if of_x:
            base, _ = _conv_backward(dy, x, weight, ctx.geometry, True, False)
            assert base is not None and dx is not None
            dx = base.add_(dx)
        dup = None if dup is None else _scaled(dup, ctx.scale).view(up.shape)
        return dx, None, None, None, None, ddown, dup
