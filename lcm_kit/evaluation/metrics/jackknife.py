"""Value and interval of a statistic that the bootstrap would get wrong: leave groups of prompts out in turn.

A statistic whose mean over N samples is truth + c / N keeps that bias in every resample, and adds to it,
since a resample has fewer different samples. What changes when a group is left out gives both: how much on
average the bias, how differently the spread (Quenouille 1956, Tukey 1958; for groups of unequal size Busing,
Meijer & van der Leeden 1999, Statistics and Computing 9, equations 6 to 9).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

GROUPS = 20
_SEED = 0  # of the prompts' order, so that how the list is sorted means nothing


@dataclass(frozen=True)
class Jackknife:
    """A statistic on all samples, `whole`, without each group, `left` [g], and the groups' `shares` [g]."""

    whole: float
    left: Tensor
    shares: Tensor

    @property
    def value(self) -> float:
        """The statistic without its bias of order 1/N."""
        return float(len(self.left) * self.whole - ((1 - self.shares) * self.left).sum())

    @property
    def error(self) -> float:
        """The standard error of `value`."""
        h = 1 / self.shares
        pseudo = h * self.whole - (h - 1) * self.left
        return float(((pseudo - self.value) ** 2 / (h - 1)).mean().sqrt())

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Student's, with one degree of freedom fewer than groups."""
        half = student_t((1 + confidence) / 2, len(self.left) - 1) * self.error
        return self.value - half, self.value + half

    @property
    def p(self) -> float:
        """Two-sided p-value of the truth being 0; for differences."""
        if self.error == 0:
            return 1.0 if self.value == 0 else 0.0
        return 1 - t_share(abs(self.value) / self.error, len(self.left) - 1)

    def minus(self, other: Jackknife) -> Jackknife:
        """The difference of two statistics of the same prompts in the same groups: paired."""
        return Jackknife(self.whole - other.whole, self.left - other.left, self.shares)


def jackknife(
    statistic: Callable[[Tensor], float], prompts: int, images_per_prompt: int = 1, groups: int = GROUPS
) -> Jackknife:
    """`statistic` of sample indices, on all and without each of `groups` groups of prompts.

    Raises `ValueError` for fewer than two prompts.
    """
    if prompts < 2:
        raise ValueError(f"a jackknife needs 2 prompts or more, not {prompts}")
    groups = min(groups, prompts)
    order = torch.randperm(prompts, generator=torch.Generator().manual_seed(_SEED))
    group = (order % groups).repeat_interleave(images_per_prompt)
    samples = torch.arange(prompts * images_per_prompt)
    left = [statistic(samples[group != g]) for g in range(groups)]
    shares = torch.bincount(group, minlength=groups).double() / len(samples)
    return Jackknife(statistic(samples), torch.tensor(left, dtype=torch.float64), shares)


def t_share(t: float, freedom: int) -> float:
    """P(|T| <= t) of Student's t with whole degrees of freedom (Abramowitz & Stegun 26.7.3, 26.7.4)."""
    theta = math.atan(t / math.sqrt(freedom))
    cosine, odd = math.cos(theta), freedom % 2
    term, total = cosine if odd else 1.0, 0.0
    for k in range(freedom // 2):
        total += term
        term *= cosine**2 * (2 * k + 1 + odd) / (2 * k + 2 + odd)
    share = math.sin(theta) * total
    return (theta + share) * 2 / math.pi if odd else share


def student_t(p: float, freedom: int) -> float:
    """The quantile of p >= 0.5: the t with P(T <= t) = p, by bisection; to 1e-9 relative."""
    low, high = 0.0, 1.0
    while t_share(high, freedom) < 2 * p - 1:
        high *= 2
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if t_share(middle, freedom) < 2 * p - 1 else (low, middle)
    return (low + high) / 2
