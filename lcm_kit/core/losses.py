"""Distances between two batches of latents, one number a sample."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Distance = Callable[[Tensor, Tensor, float], Tensor]
"""(a [B, C, h, w], b [B, C, h, w], c) -> float32 [B], the mean over each sample's elements."""


def huber(a: Tensor, b: Tensor, c: float) -> Tensor:
    """Pseudo-Huber distance [B]: mean of sqrt(d^2 + c^2) - c with d = a - b; c > 0, in units of latents."""
    square = (a.float() - b.float()) ** 2
    # The same value as the difference of roots, which would lose every digit of d much smaller than c.
    return (square / (torch.sqrt(square + c**2) + c)).flatten(1).mean(1)


def huber_norm(a: Tensor, b: Tensor, c: float) -> Tensor:
    """Pseudo-Huber distance of whole samples [B]: sqrt(r^2 + c^2) - c with r the RMS of a - b.

    Improved consistency training's (arXiv:2310.14189, section 3.3) with c = 0.00054 sqrt(d) on the norm of d
    elements is this with c = 0.00054 times a constant factor: the RMS is the norm over sqrt(d).
    """
    square = ((a.float() - b.float()) ** 2).flatten(1).mean(1)
    return square / (torch.sqrt(square + c**2) + c)


def l2(a: Tensor, b: Tensor, c: float) -> Tensor:
    """Squared distance [B]: mean of (a - b)^2. It has no constant: c is there for the signature."""
    return ((a.float() - b.float()) ** 2).flatten(1).mean(1)


def cauchy(a: Tensor, b: Tensor, c: float) -> Tensor:
    """Cauchy distance of whole samples [B]: c log(1 + r^2 / (2 c^2)) with r the RMS of a - b.

    That of arXiv:2502.01441 times c, so that it is pseudo-Huber's r^2 / (2 c) near zero, and its slope is at
    most 1 / sqrt(2) (at r = sqrt(2) c) whatever c is, where Huber's is at most 1: a learning rate or a clip
    of gradients that suits the one suits the other. Far out it is 2 c log(r) and a constant: the pull of an
    outlier fades as 2 c / r.
    """
    square = ((a.float() - b.float()) ** 2).flatten(1).mean(1)
    return c * torch.log1p(square / (2 * c**2))


def adapted_c(c: float, intervals: int, last: int) -> float:
    """The constant on a grid of `intervals`, where it is `c` on the last one: c (last / intervals)^1.15.

    What a student and its target differ by falls with the length of an interval, and the constant has to fall
    with it, or all differences become small ones: the adaptive scaling c of arXiv:2502.01441, whose authors'
    code has exp(-1.15 log(intervals) - 0.85) on the RMS of latents of standard deviation 0.5.
    """
    return float(c * (last / intervals) ** ADAPTED)


ADAPTED = 1.15  # power by which the constant falls with the number of intervals
LOSSES: dict[str, Distance] = {"huber": huber, "huber_norm": huber_norm, "cauchy": cauchy, "l2": l2}
