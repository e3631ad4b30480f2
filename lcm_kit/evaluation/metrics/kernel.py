"""Distance between two sets of features by a kernel: the squared maximum mean discrepancy (MMD).

    MMD^2 = mean k(a, a') + mean k(b, b') - 2 mean k(a, b)      (Gretton et al. 2012, JMLR 13, equation 3)

over pairs of independent samples, so it is unbiased at any number of samples, and can be a little below 0.
KID (Binkowski et al. 2018, arXiv:1801.01401): the kernel (x.y / F + 1)^3. CMMD (Jayasumana et al. 2024,
arXiv:2401.09603): the Gaussian kernel of width 10 on features of length 1, times 1000, meant for CLIP's.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lcm_kit.evaluation.metrics.bootstrap import Resamples

Kernel = Literal["polynomial", "gaussian"]
_WIDTH = 10.0
_SCALE = {"polynomial": 1.0, "gaussian": 1000.0}


def gram(a: Tensor, b: Tensor, kernel: Kernel) -> Tensor:
    """k(a_i, b_j) of features [N, F] and [M, F]: [N, M], float64."""
    a, b = a.double(), b.double()
    if kernel == "polynomial":
        return (a @ b.T / a.shape[1] + 1) ** 3
    return torch.exp((normalize(a) @ normalize(b).T - 1) / _WIDTH**2)  # |x - y|^2 = 2 - 2 x.y


def mmd2(a: Tensor, b: Tensor, kernel: Kernel = "polynomial") -> float:
    """Unbiased squared MMD of two independent sets of features, [N, F] and [M, F], all samples independent.

    `polynomial` is KID, on all samples at once rather than averaged over subsets; `gaussian` is CMMD. Raises
    `ValueError` for fewer than two samples a side.
    """
    if min(len(a), len(b)) < 2:
        raise ValueError(f"a kernel distance needs 2 pictures or more a side, not {len(a)} and {len(b)}")
    cross = float(gram(a, b, kernel).mean())
    return _SCALE[kernel] * (
        _off_diagonal(gram(a, a, kernel)) + _off_diagonal(gram(b, b, kernel)) - 2 * cross
    )


def kernel_distance(
    a: Tensor, b: Tensor, resamples: Resamples, *, paired: bool, kernel: Kernel = "polynomial"
) -> tuple[float, Tensor]:
    """Unbiased squared MMD of pictures `a` [N, F] of prompts to `b` [M, F], and of every resample [rounds].

    `paired`: b_i has the prompt of a_i and is drawn along with it. Otherwise `b` are independent pictures,
    the same in all rounds: the interval then speaks of these M pictures, not of others like them.

    Pairs of one prompt are left out of the means wherever they occur, since they are not independent: k(x, x)
    itself, which a resample would have many of, other pictures of the prompt, and a_i with b_i. Away from 0
    the interval of the resamples is right; near 0, where the linear part of the statistic vanishes, it is
    wider than it need be (Arcones & Gine 1992). Raises `ValueError` for one prompt.
    """
    if len(a) <= resamples.images_per_prompt or len(b) < 2:
        raise ValueError("a kernel distance needs 2 prompts or more, and 2 pictures to compare with")
    prompt = torch.arange(len(a)) // resamples.images_per_prompt
    apart = (prompt[:, None] != prompt).double()
    weights = torch.cat(
        [torch.ones(1, len(a), dtype=torch.float64), resamples.counts]
    )  # first: the set itself
    total = ((weights @ apart) * weights).sum(1)

    def mean(k: Tensor) -> Tensor:
        """Of k_ij over pairs of different prompts, each counted w_i w_j times: [1 + rounds]."""
        return ((weights @ (k * apart)) * weights).sum(1) / total

    found = mean(gram(a, a, kernel))
    cross = gram(a, b, kernel)
    if paired:
        found = found + mean(gram(b, b, kernel)) - 2 * mean(cross)
    else:
        found = found + _off_diagonal(gram(b, b, kernel)) - 2 * (weights @ cross.mean(1)) / len(a)
    found = found * _SCALE[kernel]
    return float(found[0]), found[1:]


def _off_diagonal(k: Tensor) -> float:
    """The mean of k_ij over i != j."""
    return float(k.sum() - k.diagonal().sum()) / (len(k) * (len(k) - 1))
