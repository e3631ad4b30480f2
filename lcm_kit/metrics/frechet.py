"""Frechet distance between two sets of probe features (Heusel et al. 2017, arXiv:1706.08500, equation 6).

The estimate is biased upwards by the finite samples, by about (features / n), so only figures with the same n
on both sides compare. `results.json` therefore gives the floor as well: the distance of as many real renders,
which is what a perfect sampler would get.
"""

from __future__ import annotations

from statistics import NormalDist

import torch
from torch import Tensor

from lcm_kit.metrics.bootstrap import Resamples

_GROUPS = 16  # of prompts, for the jackknife


def _root(matrix: Tensor) -> Tensor:
    """The symmetric square root of a positive semi-definite matrix; rounding below zero is cut off."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def frechet_gaussians(mu_a: Tensor, cov_a: Tensor, mu_b: Tensor, cov_b: Tensor) -> float:
    """|mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2); means [F], covariances [F, F].

    The symmetric form stays real where there are fewer samples than features, and so the covariances are
    singular.
    """
    root = _root(cov_a)
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return float(((mu_a - mu_b) ** 2).sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


def frechet(a: Tensor, b: Tensor) -> float:
    """Frechet distance of the Gaussians fitted to features [N, F] and [M, F], N and M >= 2; in float64."""
    if min(len(a), len(b)) < 2:
        raise ValueError(f"a Frechet distance needs 2 pictures or more a side, not {len(a)} and {len(b)}")
    a, b = a.double(), b.double()
    return frechet_gaussians(a.mean(0), torch.cov(a.T), b.mean(0), torch.cov(b.T))


def frechet_interval(
    a: Tensor, b: Tensor, resamples: Resamples, confidence: float
) -> tuple[float, float, float]:
    """Frechet distance of features `a` [N, F] to `b` [M, F] without most of its bias, and an interval for it.

    The plain bootstrap would be wrong here: every resample has fewer different samples, and the distance grows
    as samples get fewer. So groups of prompts are left out in turn (delete-a-group jackknife, Quenouille 1949,
    Tukey 1958): how the distance grows with what is left out gives the bias of order 1/N, which is taken off,
    and its spread the interval (Student's t). The corrected value can be a little below 0.
    """
    per = resamples.images_per_prompt
    prompts = len(a) // per
    groups = min(prompts, _GROUPS)
    group = (torch.arange(prompts) * groups // prompts).repeat_interleave(per)
    whole = frechet(a, b)
    left = torch.tensor([frechet(a[group != g], b) for g in range(groups)], dtype=torch.float64)
    value = groups * whole - (groups - 1) * float(left.mean())
    error = ((groups - 1) / groups * float(((left - left.mean()) ** 2).sum())) ** 0.5
    half = _student_t(1 - (1 - confidence) / 2, groups - 1) * error
    return value, value - half, value + half


def _student_t(p: float, freedom: int) -> float:
    """Quantile of Student's t by Cornish and Fisher's expansion; within 1% from 5 degrees of freedom on."""
    z = NormalDist().inv_cdf(p)
    first = (z**3 + z) / (4 * freedom)
    second = (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    return z + first + second
