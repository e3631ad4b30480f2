"""Which records a step sees, and its randomness: pure functions of (seed, step, slot); nothing is stored.

A slot is a sample's place in the global batch, over all processes. Two processes with n samples each hold
the slots 0..n-1 and n..2n-1; together they see what one process with 2n samples sees, with the same noise.
All of a global batch have one shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lcm_kit.bases.condition import Condition
from lcm_kit.core.transfer import sent
from lcm_kit.data.order import Order, Run, Turns, seed_of
from lcm_kit.data.told import picked


class Samples(Protocol):
    """What batches are drawn from: `lcm_kit.data.cache.Cache`."""

    @property
    def ids(self) -> Sequence[str]:
        """Names of the records, in order."""

    @property
    def runs(self) -> Sequence[Run]:
        """All rows in order, by shape."""

    @property
    def several(self) -> bool:
        """Whether any row has several captions."""

    def latents(self, index: list[int]) -> Tensor:
        """Latents [n, C, h, w] of the records at `index`, which have one shape."""

    def weights(self, index: list[int]) -> Tensor | None:
        """How much each of their cells counts, [n, 1, h, w]; None: all alike."""

    def condition(self, index: list[int], chances: Sequence[float] | None = None) -> Condition:
        """Their conditions; `chances`: for each a number from 0 to 1 that says which of its captions."""


def generator_at(seed: int, step: int, slot: int, purpose: str) -> torch.Generator:
    """The generator (CPU) of one sample's randomness for one purpose, as "noise", "times" or "guidance"."""
    return torch.Generator().manual_seed(seed_of(seed, step, slot, purpose))


def draw(
    seed: int, step: int, slots: Iterable[int], purpose: str, f: Callable[[torch.Generator], Tensor]
) -> Tensor:
    """`f` of each slot's own generator, stacked: [n, ...] for n slots."""
    return torch.stack([f(generator_at(seed, step, slot, purpose)) for slot in slots])


@dataclass(frozen=True)
class Batch:
    """One process's share of a global batch."""

    latents: Tensor  # [B, C, h, w] float32
    condition: Condition  # B conditions, float32
    ids: Sequence[str]
    slots: range  # places in the global batch, for `generator_at` and `draw`
    weights: Tensor | None = None  # [B, 1, h, w] how much each cell of the latents counts; None: all alike

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`; the host does not wait for it (`transfer.sent`)."""
        weights = None if self.weights is None else sent(self.weights, device)
        latents, condition = sent(self.latents, device), self.condition.to(device)
        return replace(self, latents=latents, condition=condition, weights=weights)

    def weights_of(self, part: slice) -> Tensor | None:
        """`weights` of some of its samples."""
        return None if self.weights is None else self.weights[part]

    def without_captions(self, dropped: Tensor, empty: Condition) -> Batch:
        """The same with the text of `empty` (B = 1) where `dropped` bool [B], on the host, is true."""
        return replace(self, condition=self.condition.replaced(dropped, empty)) if dropped.any() else self


class Mix(NamedTuple):
    """Two sources in one list of records, each with its own epochs."""

    first: int  # records of the first source; the rest are the second's
    share: Fraction  # of the places of a batch that the second has, 0 to 1


class _Source(NamedTuple):
    """Rows that have epochs of their own."""

    runs: tuple[tuple[int, Run], ...]  # each with its first row
    seed: int
    share: Fraction  # of all batches

    @property
    def rows(self) -> int:
        return sum(run.rows * run.repeats for _, run in self.runs)

    def of(self, shape: tuple[int, ...]) -> Order:
        """Its rows of one shape."""
        own = [(first, run) for first, run in self.runs if run.shape == shape]
        return Order(tuple((first, run.rows) for first, run in own for _ in range(run.repeats)), self.seed)


@dataclass(frozen=True)
class Batches:
    """An endless sequence of batches of one shape each.

    Where all rows have one shape, epoch follows epoch without a gap, within a batch too. Where there are
    several, each has its own epochs, and batches are shared out by the number of rows (`order.Turns`).
    """

    cache: Samples
    batch_size: int  # on each process
    seed: int
    rank: int = 0
    world: int = 1
    mix: Mix | None = None

    def index(self, step: int) -> list[int]:
        """The records of `step` (it counts forwards, from 0) on this process, one for each slot.

        Of a mix of one shape, any run of n places in a row has n times the share of the second source, to
        within one; of several shapes whole batches are of one source.
        """
        if self._turns is not None:
            group, number = self._turns.at(step)
            first = number * self.batch_size * self.world
            return [self._groups[group].at(first + slot) for slot in self.slots]
        first = step * self.batch_size * self.world
        return [self._record(first + slot) for slot in self.slots]

    def _record(self, place: int) -> int:
        """The record at `place` of the endless sequence, where all have one shape."""
        if len(self._groups) == 1:
            return self._groups[0].at(place)
        share = self._sources[1].share
        before, after = int(place * share), int((place + 1) * share)  # of the second source
        return self._groups[0].at(place - before) if after == before else self._groups[1].at(before)

    @cached_property
    def _sources(self) -> list[_Source]:
        runs, first = [], 0
        for run in self.cache.runs:
            if self.mix is not None and first < self.mix.first < first + run.rows:
                of_first = self.mix.first - first
                runs += [(first, run._replace(rows=of_first))]
                runs += [(self.mix.first, run._replace(rows=run.rows - of_first))]
            else:
                runs.append((first, run))
            first += run.rows
        if self.mix is None:
            return [_Source(tuple(runs), self.seed, Fraction(1))]
        size, share = self.mix
        one, other = (tuple(run for run in runs if (run[0] < size) == own) for own in (True, False))
        second = _Source(other, seed_of(self.seed, "second source"), share)
        return [_Source(one, self.seed, 1 - share), second]

    @cached_property
    def _shapes(self) -> list[tuple[int, ...]]:
        return sorted({run.shape for run in self.cache.runs if run.rows})

    @cached_property
    def _of_sources(self) -> list[tuple[_Source, Order]]:
        """The rows of each source and shape."""
        found = [(source, source.of(shape)) for source in self._sources for shape in self._shapes]
        return [(source, order) for source, order in found if order.rows]

    @cached_property
    def _groups(self) -> list[Order]:
        return [order for _, order in self._of_sources]

    @cached_property
    def _turns(self) -> Turns | None:
        """Whose turn it is; None where all rows have one shape."""
        if len(self._shapes) == 1:
            return None
        total = sum(source.rows for source in self._sources)
        demands = (total * source.share * order.rows / source.rows for source, order in self._of_sources)
        return Turns(tuple(demands), self.batch_size * self.world, self.seed)

    @property
    def slots(self) -> range:
        """This process's places in the global batch."""
        return range(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)

    def at(self, step: int) -> Batch:
        """The batch of `step`."""
        index, chances = self.index(step), None
        if self.cache.several:
            chances = draw(
                self.seed, step, self.slots, "caption", lambda g: torch.rand((), generator=g)
            ).tolist()
        condition = self.cache.condition(index, chances)
        ids, weights = picked(self.cache.ids, index), self.cache.weights(index)
        return Batch(self.cache.latents(index), condition, ids, self.slots, weights)
