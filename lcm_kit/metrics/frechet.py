"""Frechet distance between two sets of probe features (Heusel et al. 2017, arXiv:1706.08500, equation 6).

The estimate is biased upwards by the finite samples, by about (features / n), so only figures with the same n
on both sides compare. `results.json` therefore gives the floor as well: the distance of as many real renders,
which is what a perfect sampler would get.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
