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


def l2(a: Tensor, b: Tensor, c: float) -> Tensor:
    """Squared distance [B]: mean of (a - b)^2. It has no constant: c is there for the signature."""
    return ((a.float() - b.float()) ** 2).flatten(1).mean(1)


LOSSES: dict[str, Distance] = {"huber": huber, "l2": l2}
