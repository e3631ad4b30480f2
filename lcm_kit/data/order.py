"""In which order rows are seen: shuffled epochs, and batches of one shape; pure functions, nothing stored.

An order is a function of (seed, epoch) whose memory does not grow with the rows: `WINDOW` rows at most are
shuffled at once, a whole small set at a time, of a large one some of its runs (shards), which are drawn in an
order of their own in each epoch.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

WINDOW = 2**18  # rows


def seed_of(*parts: object) -> int:
    """A 63-bit seed that depends on every part."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class Run(NamedTuple):
    """Rows of one shape, one after the other."""

    rows: int
    shape: tuple[int, ...] = ()  # () of the square of the resolution
    repeats: int = 1  # times an epoch that each is seen


@lru_cache(maxsize=8)  # two epochs within a batch, of each source of a mix
def permutation(n: int, seed: int, epoch: int, *place: int) -> Tensor:
    """The order in which an epoch visits n rows: int64 [n], a function of (n, seed, epoch)."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed_of(seed, epoch, "epoch", *place)))


@dataclass(frozen=True)
class Order:
    """The endless sequence of the rows of some runs, epoch after epoch, each in an order of its own."""

    runs: tuple[tuple[int, int], ...]  # (first row, rows); a run that is seen twice an epoch is there twice
    seed: int

    @cached_property
    def rows(self) -> int:
        """Of an epoch."""
        return sum(rows for _, rows in self.runs)

    def at(self, place: int) -> int:
        """The row at `place`."""
        epoch, place = divmod(place, self.rows)
        order, starts, begins = self._arranged(epoch)
        window = bisect_right(begins, place) - 1
        first, end = begins[window : window + 2]
        own = (window,) if self.rows > WINDOW else ()
        place = first + int(permutation(end - first, self.seed, epoch, *own)[place - first])
        number = bisect_right(starts, place) - 1
        return self.runs[order[number]][0] + place - starts[number]

    @cached_property
    def _arranged(self) -> Callable[[int], _Arranged]:
        return lru_cache(maxsize=2)(self._arrange)  # two epochs within a batch; held by this order alone

    def _arrange(self, epoch: int) -> _Arranged:
        several = self.rows > WINDOW
        order = (
            permutation(len(self.runs), self.seed, epoch, -1).tolist() if several else range(len(self.runs))
        )
        starts, begins = [0], [0]
        for run in order:
            end = starts[-1] + self.runs[run][1]
            if end - begins[-1] > WINDOW and starts[-1] > begins[-1]:
                begins.append(starts[-1])
            starts.append(end)
        return _Arranged(order, starts, [*begins, self.rows])


class _Arranged(NamedTuple):
    """An epoch: its runs in order, the places where each begins and all end, and where each window does."""

    order: Sequence[int]
    starts: list[int]
    begins: list[int]


@dataclass(frozen=True)
class Turns:
    """Which of several groups of rows each batch is of: in the long run each as often as it has rows.

    After e epochs, of `size` rows a batch, a group of demand d an epoch has had floor(e d / size) batches: no
    group is ever a batch ahead or behind, and which batch of which group a number is of follows from the
    number alone. Within an epoch the batches are shuffled.
    """

    demands: tuple[Fraction, ...]  # rows of each an epoch
    size: int  # rows a batch
    seed: int

    def _before(self, epoch: int) -> list[int]:
        """Batches of each group before `epoch`."""
        return [int(epoch * demand / self.size) for demand in self.demands]

    def at(self, number: int) -> tuple[int, int]:
        """The group of batch `number`, and how many batches of that group are before it."""
        least = int(number * self.size / sum(self.demands))
        most = least + int((len(self.demands) + 1) * self.size / sum(self.demands)) + 2
        epoch = bisect_right(range(least, most), number, key=lambda e: sum(self._before(e))) - 1 + least
        before = self._before(epoch)
        groups, ranks = self._shuffled(epoch)
        place = number - sum(before)
        return int(groups[place]), before[int(groups[place])] + int(ranks[place])

    @cached_property
    def _shuffled(self) -> Callable[[int], tuple[Tensor, Tensor]]:
        return lru_cache(maxsize=2)(self._shuffle)

    def _shuffle(self, epoch: int) -> tuple[Tensor, Tensor]:
        """The group of each batch of an epoch, and how many of its group are before it: int64 [batches]."""
        counts = [
            after - before for before, after in zip(self._before(epoch), self._before(epoch + 1), strict=True)
        ]
        groups = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        groups = groups[permutation(len(groups), self.seed, epoch, -2)]
        ranks = torch.zeros_like(groups)
        for group, count in enumerate(counts):
            ranks[groups == group] = torch.arange(count)
        return groups, ranks
