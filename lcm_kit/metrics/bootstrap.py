"""Intervals by resampling prompts: the percentile bootstrap (Efron 1979), clustered and paired.

The prompts are drawn with replacement and all pictures of each come along, because pictures of one prompt
resemble each other. All cells of a sweep share the same draws, so that what varies from prompt to prompt
cancels in their differences. Below about 20 prompts such intervals are too narrow by some percent.
"""

from __future__ import annotations

from dataclasses import dataclass

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

    @property
    def counts(self) -> Tensor:
        """[rounds, N] float64: how often each sample is in each round."""
        rounds, n = self.index.shape
        ones = torch.ones(rounds, n, dtype=torch.float64)
        return torch.zeros(rounds, n, dtype=torch.float64).scatter_add_(1, self.index, ones)


def percentiles(resampled: Tensor, confidence: float) -> tuple[float, float]:
    """The ends of the interval that holds the middle `confidence` of the values [rounds]."""
    tail = (1 - confidence) / 2
    low, high = resampled.double().quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def two_sided_p(differences: Tensor) -> float:
    """Twice the smaller share of resampled differences [rounds] on either side of 0, at most 1."""
    below, above = ((differences <= 0).double().mean(), (differences >= 0).double().mean())
    return min(1.0, 2 * float(torch.minimum(below, above)))
