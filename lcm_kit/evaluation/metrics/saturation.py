"""Are the colours too strong? Few-step students that apply baked guidance again and again over-saturate."""

from __future__ import annotations

from torch import Tensor


def chroma(images: Tensor) -> Tensor:
    """[N, 3, H, W] -> [N]: each picture's mean HSV chroma, max - min of R, G, B taken as [0, 1]."""
    return (images.amax(1) - images.amin(1)).mean(dim=(1, 2)) / 2


def clipped_shares(images: Tensor) -> Tensor:
    """[N, 3, H, W] -> [N]: share of channel values that stand at an end of the range, within half an 8-bit
    step.
    """
    return (images.abs() >= 1 - 1 / 255).double().mean(dim=(1, 2, 3))
