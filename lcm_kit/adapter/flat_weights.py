"""A LoRA's float32 weights in one buffer, and what a pass sees of them: all cast by one kernel.

The parameters stay peft's, under their names; they become views of the buffer. `FlatWeights.cast` gives each
layer its `Pair`, in the dtype that the layers compute in. Its backward gathers all gradients, whatever
their dtype, into one float32 buffer, of which the parameters' gradients are then views: clipping, averaging
over processes and an EMA find the buffer again (`lcm_kit.core.flat.whole`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import Parameter

from lcm_kit.adapter.fast_math import Pair
from lcm_kit.core.flat import whole


class Slot(NamedTuple):
    """The weights of layers that have one input, in units of one width; or of one convolution."""

    downs: Sequence[Parameter]  # of each layer [r, in], or one [r, in, kh, kw]
    ups: Sequence[Sequence[Parameter]]  # of each unit, of each of its layers [out, r], or one [out, r, 1, 1]
    scale: float


class FlatWeights:
    """All weights of one LoRA, in the order of its slots: A of a slot's layers, then B of each."""

    def __init__(self, slots: Sequence[Slot], *, channels_last: bool = False) -> None:
        """`channels_last`: the memory format of convolutions' A, which cuDNN else makes anew in every pass.

        Values are kept; the parameters' storage is left.
        """
        self.slots = slots
        sides = [side for slot in slots for side in (slot.downs, *slot.ups)]
        self.parameters = [p for side in sides for p in side]
        self._channels_last = channels_last
        buffer = torch.cat([self._line(p.detach()) for p in self.parameters]).float()
        sizes = [p.numel() for p in self.parameters]
        for p, part in zip(self.parameters, buffer.split(sizes), strict=True):
            p.data = self._shaped(part, p.shape)
        # numbers of what a pass sees: of each slot its down and its ups
        self.sizes = [sum(p.numel() for p in side) for side in sides]

    def cast(self, dtype: torch.dtype, done: Callable[[], None]) -> list[Pair]:
        """Each slot's pair in `dtype`, with gradient where it is asked for: one kernel, in float32 none.

        They show the parameters' values of this moment. `done` is called when all that was computed with them
        has had its backward.
        """
        seen = iter(_Cast.apply(self, dtype, done, *self.parameters))
        return [Pair(next(seen), [next(seen) for _ in slot.ups], slot.scale) for slot in self.slots]

    # -- Layout ----------------------------------------------------------------------------------------------

    def _line(self, tensor: Tensor) -> Tensor:
        """The values of a parameter, or of what has its shape, in the order of the buffer: 1-D."""
        if self._channels_last and tensor.ndim == 4:
            tensor = tensor.permute(0, 2, 3, 1)
        return tensor.reshape(-1)

    def _shaped(self, line: Tensor, shape: Sequence[int]) -> Tensor:
        """The reverse of `_line`, a view."""
        if self._channels_last and len(shape) == 4:
            r, n, kh, kw = shape
            return line.view(r, kh, kw, n).permute(0, 3, 1, 2)
        return line.view(shape)

    def together(self) -> Tensor:
        """All values in one, float32; the buffer itself unless the parameters hold other storage by now."""
        one = whole(self.parameters, in_order=True)
        return torch.cat([self._line(p.detach()) for p in self.parameters]) if one is None else one

    def pairs(self, line: Tensor) -> list[Tensor]:
        """The down and the ups of each slot, as `Pair` has them: views of `line`."""
        found = []
        parts = iter(line.split(self.sizes))
        for slot in self.slots:
            down = slot.downs[0]
            shape = (len(slot.downs) * len(down), *down.shape[1:])
            found.append(self._shaped(next(parts), shape))
            found += [next(parts).view(len(unit), *unit[0].shape[:2]) for unit in slot.ups]
        return found

    def gradients(self, seen: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        """Each parameter's gradient, views of one float32 tensor, from those of `pairs`; None is zero."""
        some = next(grad for grad in seen if grad is not None)
        lines = [
            some.new_zeros(size) if grad is None else self._line(grad)
            for grad, size in zip(seen, self.sizes, strict=True)
        ]
        one = torch.cat(lines).float()
        parts = one.split([p.numel() for p in self.parameters])
        return tuple(self._shaped(part, p.shape) for part, p in zip(parts, self.parameters, strict=True))


class _Cast(Function):
    @staticmethod
    def forward(
        ctx: Any, weights: FlatWeights, dtype: torch.dtype, done: Callable[[], None], *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.weights, ctx.done = weights, done
        ctx.set_materialize_grads(False)
        return tuple(weights.pairs(weights.together().to(dtype)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *seen: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.done()
        return None, None, None, *ctx.weights.gradients(seen)
