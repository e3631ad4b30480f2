"""Is the picture blurred, or noisy? Two figures that fall and rise with the finest detail."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv2d

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
_LAPLACIAN = ((0.0, 1.0, 0.0), (1.0, -4.0, 1.0), (0.0, 1.0, 0.0))


def luma(images: Tensor) -> Tensor:
    """[N, 3, H, W] -> [N, H, W] float64: the weighted sum of R, G and B."""
    return torch.einsum("nchw,c->nhw", images.double(), images.new_tensor(_LUMA, dtype=torch.float64))


def laplacian_energy(images: Tensor) -> Tensor:
    """[N, 3, H, W] in [-1, 1] -> [N]: variance of the 3x3 Laplacian of the luma, within the picture's edges.

    A common measure of focus (Pech-Pacheco et al. 2000). Only its ratio to another picture's of the same
    content says anything: below 1 is blurred, above 1 is sharper or noisier.
    """
    kernel = images.new_tensor(_LAPLACIAN, dtype=torch.float64)[None, None]
    return conv2d(luma(images)[:, None], kernel).flatten(1).var(1, unbiased=False)


def spectral_slope(images: Tensor) -> Tensor:
    """[N, 3, H, W] -> [N]: the slope of log power over log frequency, from a line of least squares.

    The power spectrum of the luma is averaged over rings one cycle (along the shorter side) wide, around 1,
    2, ... up to the shorter side's Nyquist frequency; all rings weigh the same. Photographs have about -2
    (Field 1987, J. Opt. Soc. Am. A 4); blur makes it steeper, noise flatter. 0 for a flat picture.
    """
    y = luma(images)
    power = torch.fft.fft2(y - y.mean((1, 2), keepdim=True)).abs() ** 2
    short = min(y.shape[1:])
    down, across = (
        torch.fft.fftfreq(n, 1 / short, dtype=torch.float64, device=y.device) for n in y.shape[1:]
    )
    ring = (down[:, None] ** 2 + across[None] ** 2).sqrt().round().long().flatten()
    inside = (ring >= 1) & (ring <= short // 2)
    members = torch.bincount(ring[inside] - 1).double()
    sums = torch.zeros(len(y), len(members), dtype=torch.float64, device=y.device)
    sums.index_add_(1, ring[inside] - 1, power.flatten(1)[:, inside])
    values = (sums / members).clamp(min=1e-20).log()  # less is the rounding of a flat picture
    x = torch.arange(1, len(members) + 1, dtype=torch.float64, device=y.device).log()
    x = x - x.mean()
    return (values * x).sum(1) / (x * x).sum()
