"""Which records a step sees, and its randomness: pure functions of (seed, step, slot); nothing is stored.

A slot is a sample's place in the global batch, over all processes. Two processes with n samples each hold
the slots 0..n-1 and n..2n-1; together they see what one process with 2n samples sees, with the same noise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lcm_kit.bases.condition import Condition
from lcm_kit.core.transfer import sent


class Samples(Protocol):
    """What batches are drawn from: `lcm_kit.data.cache.Cache`."""

    @property
    def ids(self) -> list[str]:
        """Names of the records, in order."""

    def latents(self, index: list[int]) -> Tensor:
        """Latents [n, C, h, w] of the records at `index`."""

    def condition(self, index: list[int]) -> Condition:
        """Conditions of the records at `index`."""


def _seed(*parts: object) -> int:
    """A 63-bit seed that depends on every part."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator_at(seed: int, step: int, slot: int, purpose: str) -> torch.Generator:
    """The generator (CPU) of one sample's randomness for one purpose, as "noise", "times" or "guidance"."""
    return torch.Generator().manual_seed(_seed(seed, step, slot, purpose))


def draw(
    seed: int, step: int, slots: Iterable[int], purpose: str, f: Callable[[torch.Generator], Tensor]
) -> Tensor:
    """`f` of each slot's own generator, stacked: [n, ...] for n slots."""
    return torch.stack([f(generator_at(seed, step, slot, purpose)) for slot in slots])


@lru_cache(maxsize=4)  # two epochs within a batch, of each source of a mix
def permutation(n: int, seed: int, epoch: int) -> Tensor:
    """The order in which an epoch visits n records: int64 [n], a function of (n, seed, epoch)."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(_seed(seed, epoch, "epoch")))


def _nth(n: int, seed: int, place: int) -> int:
    """The record at `place` of the epochs of n records, one after the other."""
    epoch, place = divmod(place, n)
    return int(permutation(n, seed, epoch)[place])


@dataclass(frozen=True)
class Batch:
    """One process's share of a global batch."""

    latents: Tensor  # [B, C, h, w] float32
    condition: Condition  # B conditions, float32
    ids: list[str]
    slots: range  # places in the global batch, for `generator_at` and `draw`

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`; the host does not wait for it (`transfer.sent`)."""
        return replace(self, latents=sent(self.latents, device), condition=self.condition.to(device))

    def without_captions(self, dropped: Tensor, empty: Condition) -> Batch:
        """The same with the text of `empty` (B = 1) where `dropped` bool [B], on the host, is true."""
        return replace(self, condition=self.condition.replaced(dropped, empty)) if dropped.any() else self


class Mix(NamedTuple):
    """Two sources in one list of records, each with its own epochs."""

    first: int  # records of the first source; the rest are the second's
    share: Fraction  # of the places of a batch that the second has, 0 to 1


@dataclass(frozen=True)
class Batches:
    """An endless sequence of batches. Epoch follows epoch without a gap, within a batch too."""

    cache: Samples
    batch_size: int  # on each process
    seed: int
    rank: int = 0
    world: int = 1
    mix: Mix | None = None

    def index(self, step: int) -> list[int]:
        """The records of `step` (it counts forwards, from 0) on this process, one for each slot.

        Of a mix, any run of n places in a row has n times the share of the second source, to within one.
        """
        first = step * self.batch_size * self.world
        return [self._record(first + slot) for slot in self.slots]

    def _record(self, place: int) -> int:
        """The record at `place` of the endless sequence."""
        n = len(self.cache.ids)
        if self.mix is None:
            return _nth(n, self.seed, place)
        size, share = self.mix
        before, after = int(place * share), int((place + 1) * share)  # of the second source
        if after == before:
            return _nth(size, self.seed, place - before)
        return size + _nth(n - size, _seed(self.seed, "second source"), before)

    @property
    def slots(self) -> range:
        """This process's places in the global batch."""
        return range(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)

    def at(self, step: int) -> Batch:
        """The batch of `step`."""
        index = self.index(step)
        ids = [self.cache.ids[i] for i in index]
        return Batch(self.cache.latents(index), self.cache.condition(index), ids, self.slots)
