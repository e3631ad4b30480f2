"""Is the picture blurred, or noisy? Two figures that fall and rise with the finest detail."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv2d

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
_LAPLACIAN = ((0.0, 1.0, 0.0), (1.0, -4.0, 1.0), (0.0, 1.0, 0.0))


def luma(images: Tensor) -> Tensor:
    """[N, 3, H, W] -> [N, H, W]: the weighted sum of R, G and B."""
    return (images.double() * torch.tensor(_LUMA, dtype=torch.float64).view(3, 1, 1)).sum(1)


def laplacian_energy(images: Tensor) -> Tensor:
    """[N, 3, H, W] in [-1, 1] -> [N]: variance of the 3x3 Laplacian of the luma, within the picture's edges.

    A common measure of focus (Pech-Pacheco et al. 2000). Only its ratio to another picture's of the same content
    says anything: below 1 is blurred, above 1 is sharper or noisier.
    """
    kernel = torch.tensor(_LAPLACIAN, dtype=torch.float64)[None, None]
    return conv2d(luma(images)[:, None], kernel).flatten(1).var(1, unbiased=False)


def spectral_slope(images: Tensor) -> Tensor:
    """[N, 3, H, W], H = W -> [N]: the slope of log power over log frequency, from a line of least squares.

    The power spectrum of the luma is averaged over rings of equal frequency, from 1 to H / 2 cycles a picture.
    Photographs have about -2 (Field 1987); blur makes it steeper, noise flatter.
    """
    y = luma(images)
    side = y.shape[-1]
    power = torch.fft.fft2(y - y.mean((1, 2), keepdim=True)).abs() ** 2
    f = torch.fft.fftfreq(side, 1 / side, dtype=torch.float64)
    ring = (f[:, None] ** 2 + f[None] ** 2).sqrt().round().long().flatten()
    rings = side // 2 + 1
    inside = ring < rings
    sums = torch.zeros(len(y), rings, dtype=torch.float64)
    sums.index_add_(1, ring[inside], power.flatten(1)[:, inside])
    mean = sums / torch.bincount(ring[inside], minlength=rings)
    x = torch.arange(1, rings, dtype=torch.float64).log()
    x = x - x.mean()
    values = mean[:, 1:].clamp(min=1e-300).log()
    return (values * x).sum(1) / (x * x).sum()
