"""In which order rows are seen: shuffled epochs, and batches of one shape; pure functions, nothing stored.

An order is a function of (seed, epoch) whose memory does not grow with the rows: `WINDOW` rows at most are
shuffled at once, a whole small set at a time, of a large one some of its runs (shards), which are drawn in an
order of their own in each epoch.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from itertools import accumulate
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
        if self.rows <= WINDOW:
            place = int(permutation(self.rows, self.seed, epoch)[place])
            return self._row(range(len(self.runs)), self._starts, place)
        order, starts, windows = self._epoch(epoch)
        window = bisect_right(windows, starts_at := place, key=lambda at: starts[at]) - 1
        first, last = windows[window], windows[window + 1] if window + 1 < len(windows) else len(order)
        before, size = starts[first], starts[last] - starts[first]
        place = int(permutation(size, self.seed, epoch, window)[starts_at - before])
        return self._row(order[first:last], [at - before for at in starts[first : last + 1]], place)

    @cached_property
    def _starts(self) -> list[int]:
        return [0, *accumulate(rows for _, rows in self.runs)]

    def _row(self, order: Sequence[int], starts: Sequence[int], place: int) -> int:
        number = bisect_right(starts, place) - 1
        return self.runs[order[number]][0] + place - starts[number]

    def _epoch(self, epoch: int) -> tuple[list[int], list[int], list[int]]:
        """Its runs in order, where each begins, and the runs that begin a window."""
        return _windows(self, epoch)


@lru_cache(maxsize=4)
def _windows(order: Order, epoch: int) -> tuple[list[int], list[int], list[int]]:
    runs = permutation(len(order.runs), order.seed, epoch, -1).tolist()
    starts = [0, *accumulate(order.runs[run][1] for run in runs)]
    begins = [0]
    for k in range(1, len(runs)):
        if starts[k + 1] - starts[begins[-1]] > WINDOW:
            begins.append(k)
    return runs, starts, begins


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
        groups, ranks = _shuffled(self, epoch)
        place = number - sum(before)
        return int(groups[place]), before[int(groups[place])] + int(ranks[place])


@lru_cache(maxsize=4)
def _shuffled(turns: Turns, epoch: int) -> tuple[Tensor, Tensor]:
    """The group of each batch of an epoch, and how many of its group are before it there: int64 [batches]."""
    counts = [
        after - before for before, after in zip(turns._before(epoch), turns._before(epoch + 1), strict=True)
    ]
    groups = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    groups = groups[permutation(len(groups), turns.seed, epoch, -2)]
    ranks = torch.zeros_like(groups)
    for group, count in enumerate(counts):
        ranks[groups == group] = torch.arange(count)
    return groups, ranks
