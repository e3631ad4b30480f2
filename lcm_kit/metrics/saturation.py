"""Are the colours too strong? Few-step students that apply baked guidance again and again over-saturate."""

from __future__ import annotations

from torch import Tensor


def chroma(images: Tensor) -> Tensor:
    """[N, 3, H, W] -> [N]: each picture's mean HSV chroma, max - min of R, G, B taken as [0, 1]."""
    return (images.amax(1) - images.amin(1)).mean(dim=(1, 2)) / 2


def clipped(images: Tensor) -> float:
    """Share of channel values that stand at an end of the range, within half an 8-bit step."""
    return float((images.abs() >= 1 - 1 / 255).float().mean())


def clipped_shares(images: Tensor) -> Tensor:
    """[N, 3, H, W] -> [N]: `clipped` of each picture."""
    return (images.abs() >= 1 - 1 / 255).double().mean(dim=(1, 2, 3))


def saturation(images: Tensor, teacher: Tensor) -> dict[str, float]:
    """`saturation`: mean chroma over the teacher's (1 = as colourful); `clipped`: share of clipped values."""
    return {"saturation": float(chroma(images).mean() / chroma(teacher).mean()), "clipped": clipped(images)}
