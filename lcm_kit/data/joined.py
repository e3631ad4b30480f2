"""Rows of several sources, one after the other, asked for in any order: who has which, put in place."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from lcm_kit.bases.condition import Condition
from lcm_kit.data.batches import Samples

T = TypeVar("T")


class Share(NamedTuple):
    """What one source has of the rows that were asked for."""

    source: int  # its number
    rows: list[int]  # there
    places: list[int]  # among those that were asked for


def shares(index: Sequence[int], starts: Sequence[int]) -> list[Share]:
    """The sources that have any of the rows at `index`: source k those from starts[k] to starts[k + 1]."""
    found: dict[int, Share] = {}
    for place, row in enumerate(index):
        number = bisect_right(starts, row) - 1
        share = found.setdefault(number, Share(number, [], []))
        share.rows.append(row - starts[number])
        share.places.append(place)
    return list(found.values())


class Joined(ABC):
    """Several caches as one."""

    @property
    @abstractmethod
    def starts(self) -> Sequence[int]:
        """The first row of each, and behind the last the number of all."""

    @abstractmethod
    def source(self, number: int) -> Samples:
        """The cache of that number."""

    def latents(self, index: int | Sequence[int]) -> Tensor:
        """Latents [n, C, h, w], float32, of the rows at `index`, which have one shape."""
        found, order = self._each(index, lambda source, share: source.latents(share.rows))
        return torch.cat(found)[order]

    def weights(self, index: int | Sequence[int]) -> Tensor | None:
        """How much their cells count, as `Cache.weights`."""
        found, order = self._each(index, lambda source, share: (source.weights(share.rows), len(share.rows)))
        shape = next((weights.shape[1:] for weights, _ in found if weights is not None), None)
        if shape is None:
            return None
        return torch.cat([torch.ones(n, *shape) if own is None else own for own, n in found])[order]

    def condition(self, index: int | Sequence[int], chances: Sequence[float] | None = None) -> Condition:
        """The conditions of the rows at `index`, float32, as `Cache.condition`."""

        def of(source: Samples, share: Share) -> Condition:
            return source.condition(
                share.rows, None if chances is None else [chances[place] for place in share.places]
            )

        found, order = self._each(index, of)
        return Condition.cat(found)[order]

    def _each(self, index: int | Sequence[int], of: Callable[[Samples, Share], T]) -> tuple[list[T], Tensor]:
        """What `of` makes of each source's share; where in all of that, in order, each place's row is."""
        asked = shares([index] if isinstance(index, int) else index, self.starts)
        places = torch.tensor([place for share in asked for place in share.places])
        return [of(self.source(share.source), share) for share in asked], places.argsort()
