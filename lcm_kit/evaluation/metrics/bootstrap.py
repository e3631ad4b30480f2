"""Intervals by resampling prompts: the percentile bootstrap (Efron 1979), clustered and paired.

Prompts are drawn with replacement and all pictures of each come along, because pictures of one prompt
resemble each other. All cells of a sweep share the same draws, so that what varies from prompt to prompt
cancels in their differences.

Limits: below about 20 prompts the intervals are too narrow (with 10, a 95% interval holds the truth about 90%
of the time). They speak of other prompts like these and other noise, not of another training run. Statistics
that depend on how many *different* samples there are (Frechet distance) are biased in resamples: they have
their own intervals (`lcm_kit.evaluation.metrics.jackknife`). Nothing is corrected for many comparisons.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Resamples:
    """`index` [rounds, N]: the samples of each round; sample i has prompt i // images_per_prompt."""

    index: Tensor
    images_per_prompt: int

    @classmethod
    def draw(cls, prompts: int, images_per_prompt: int = 1, rounds: int = 1000, seed: int = 0) -> Resamples:
        """`rounds` draws of `prompts` prompts; a function of its arguments alone."""
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randint(prompts, (rounds, prompts), generator=generator)
        inside = torch.arange(images_per_prompt)
        index = chosen[:, :, None] * images_per_prompt + inside
        return cls(index.reshape(rounds, -1), images_per_prompt)

    @cached_property
    def counts(self) -> Tensor:
        """[rounds, N] float64: how often each sample is in each round."""
        ones = torch.ones(self.index.shape, dtype=torch.float64)
        return torch.zeros_like(ones).scatter_add_(1, self.index, ones)

    def means(self, values: Tensor) -> Tensor:
        """Of values [N]: their mean in each round, [rounds] float64."""
        return values.double()[self.index].mean(1)


class Difference(NamedTuple):
    """Of two means on the same samples: a - b, the ends of its interval, and a two-sided p-value."""

    difference: float
    low: float
    high: float
    p: float


def interval(
    statistic: Callable[[Tensor], float], resamples: Resamples, confidence: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of any statistic of sample indices [N] (repeats among them).

    Slow: one call a round. For means take `percentiles(resamples.means(values), confidence)`.
    """
    found = [statistic(index) for index in resamples.index]
    return percentiles(torch.tensor(found, dtype=torch.float64), confidence)


def percentiles(resampled: Tensor, confidence: float) -> tuple[float, float]:
    """The ends of the interval that holds the middle `confidence` of the values [rounds].

    Rounds where the statistic is not defined (NaN: one prompt drawn again and again) are left out.
    """
    tail = (1 - confidence) / 2
    ends = torch.tensor([tail, 1 - tail], dtype=torch.float64)
    low, high = resampled.double().cpu().nanquantile(ends).tolist()
    return low, high


def two_sided_p(differences: Tensor) -> float:
    """Twice the smaller share of resampled differences [rounds] on either side of 0, at most 1.

    One is added to count and rounds (Davison & Hinkley 1997, section 4.2), so that p is never 0: with 1000
    rounds it is 0.002 or more. It is below 1 - confidence where the percentile interval leaves out 0.
    """
    known = differences[~differences.isnan()]
    fewer = min(int((known <= 0).sum()), int((known >= 0).sum()))
    return min(1.0, 2 * (fewer + 1) / (len(known) + 1))


def paired_difference(a: Tensor, b: Tensor, resamples: Resamples, confidence: float = 0.95) -> Difference:
    """Mean of `a` less mean of `b`, both [N] and of the same samples (prompt and noise)."""
    each = a.double() - b.double()
    resampled = resamples.means(each)
    return Difference(float(each.mean()), *percentiles(resampled, confidence), two_sided_p(resampled))
