"""Frechet distance between two sets of features (Heusel et al. 2017, arXiv:1706.08500, equation 6).

The estimate is biased upwards by the finite samples, by about (features / n), so only figures with the same n
on both sides compare. `results.json` of `evaluation/quality` therefore gives the floor as well: the distance
of as many real renders, which is what a perfect sampler would get; and `frechet_interval` takes most of the
bias off.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lcm_kit.evaluation.metrics.bootstrap import Resamples
from lcm_kit.evaluation.metrics.jackknife import Jackknife, jackknife

ENOUGH = 4  # samples a feature, for the bias to be of order 1/N; tests/test_metrics_frechet.py tries it


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
    if min(len(a), len(b)) > a.shape[1]:
        return frechet_gaussians(a.mean(0), torch.cov(a.T), b.mean(0), torch.cov(b.T))
    # fewer samples than features: with C = X^T X of centred rows, tr (C_a C_b)^1/2 is the sum of the singular
    # values of X_a X_b^T, a smaller matrix
    x, y = ((each - each.mean(0)) / (len(each) - 1) ** 0.5 for each in (a, b))
    cross = torch.linalg.svdvals(x @ y.T).sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + x.square().sum() + y.square().sum() - 2 * cross)


def frechet_jackknife(a: Tensor, b: Tensor, images_per_prompt: int, paired: bool = False) -> Jackknife:
    """Frechet distance of features `a` [N, F] to `b` [M, F] with its bias and error, by leaving prompts out.

    `paired`: b_i has the prompt of a_i, and both are left out together; the value is then the distance
    between the two laws. Otherwise `b` is taken as it is: the value is the distance to these M pictures, and
    the bias of their number stays in it (the same for all sets that are held against them).

    The bias is of order 1/N, which is what the jackknife takes off, only with `ENOUGH` times as many samples
    as features. With twice as many it takes off too much, with fewer than features far too little.
    """

    def statistic(index: Tensor) -> float:
        return frechet(a[index], b[index] if paired else b)

    return jackknife(statistic, len(a) // images_per_prompt, images_per_prompt)


def frechet_interval(
    a: Tensor, b: Tensor, resamples: Resamples, confidence: float, paired: bool = False
) -> tuple[float, float, float]:
    """Of `frechet_jackknife`: the value without most of its bias, which can be below 0, and its interval.

    With fewer than `ENOUGH` samples a feature nothing takes the bias off, and the interval reaches from a
    lower bound, the distance of the means alone, to an upper one, the biased estimate: wide, and true. The
    percentile bootstrap would be wrong at any number: a resample has about 63% of the samples, and the
    distance grows as samples get fewer, so that its whole interval can lie above the truth.
    """
    per = resamples.images_per_prompt
    found = frechet_jackknife(a, b, per, paired)
    low, high = found.interval(confidence)
    if min(len(a), len(b)) < ENOUGH * a.shape[1]:

        def means(index: Tensor) -> float:
            other = b[index] if paired else b
            return float((a[index].double().mean(0) - other.double().mean(0)).square().sum())

        least = jackknife(means, len(a) // per, per).interval(confidence)[0]
        low, high = min(low, least), max(high, found.whole + (high - low) / 2)
    return found.value, low, high
