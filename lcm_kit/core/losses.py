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


LOSSES: dict[str, Distance] = {"huber": huber, "huber_norm": huber_norm, "l2": l2}
