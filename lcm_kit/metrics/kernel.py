"""Distance between two sets of features by a kernel: the squared maximum mean discrepancy (MMD).

KID (Binkowski et al. 2018, arXiv:1801.01401): the unbiased estimate with the kernel (x.y / F + 1)^3. Unlike the
Frechet distance it has no bias from few samples, and so it can be a little below 0.
CMMD (Jayasumana et al. 2024, arXiv:2401.09603): the Gaussian kernel of width 10 on features of length 1, times
1000, meant for CLIP features.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lcm_kit.metrics.bootstrap import Resamples

Kernel = Literal["polynomial", "gaussian"]
_WIDTH, _SCALE = 10.0, 1000.0


def gram(a: Tensor, b: Tensor, kernel: Kernel) -> Tensor:
    """k(a_i, b_j) of features [N, F] and [M, F]: [N, M], float64."""
    a, b = a.double(), b.double()
    if kernel == "polynomial":
        return (a @ b.T / a.shape[1] + 1) ** 3
    a, b = torch.nn.functional.normalize(a), torch.nn.functional.normalize(b)
    return torch.exp(-(2 - 2 * a @ b.T) / (2 * _WIDTH**2))


def kernel_distance(
    a: Tensor, b: Tensor, resamples: Resamples, *, paired: bool, kernel: Kernel = "polynomial"
) -> tuple[float, Tensor]:
    """Unbiased squared MMD of features `a` [N, F] and `b` [M, F], and what it is in every resample [rounds].

    `paired`: b_i belongs to the prompt of a_i and is drawn along with it; pairs i, i are left out of the cross
    term too, since they are not independent. Otherwise `b` stays as it is. A resample holds a sample several
    times: such a pair of equals is not a pair of independent samples, so pairs of equal samples are left out
    and the means are over what is left.
    """
    n, counts = len(a), resamples.counts
    weights = torch.cat([torch.ones(1, n, dtype=torch.float64), counts])  # the first row: the set itself
    within_a = _pairs(gram(a, a, kernel), weights)
    if paired:
        found = within_a + _pairs(gram(b, b, kernel), weights) - 2 * _pairs(gram(a, b, kernel), weights)
    else:
        k = gram(b, b, kernel)
        m = len(b)
        within_b = (k.sum() - k.diagonal().sum()) / (m * (m - 1))
        cross = (weights @ gram(a, b, kernel).mean(1)) / weights.sum(1)
        found = within_a + within_b - 2 * cross
    found = found * (_SCALE if kernel == "gaussian" else 1.0)
    return float(found[0]), found[1:]


def _pairs(k: Tensor, weights: Tensor) -> Tensor:
    """The mean of k_ij over pairs of different i and j, each counted w_i w_j times: [rounds]."""
    off = k - torch.diag(k.diagonal())
    total = weights.sum(1) ** 2 - (weights**2).sum(1)
    return ((weights @ off) * weights).sum(1) / total
