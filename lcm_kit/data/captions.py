"""A cache whose captions are encoded when a step needs them, because the text encoders are trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

from torch import Tensor

from lcm_kit.adapter.text import Captions, TextLora
from lcm_kit.data.cache import Cache
from lcm_kit.data.parted import PartedCache

Found = TypeVar("Found", Cache, Cache | PartedCache, Cache | None)
Index = int | Sequence[int]


@dataclass(frozen=True, eq=False)
class LiveCache(Cache):
    """A cache's latents and sizes, and its captions for `text` to encode."""

    text: TextLora

    def condition(self, index: Index, chances: Sequence[float] | None = None) -> Captions:
        """The captions of the rows at `index`, as `Cache.condition`; encoded by their `kwargs`."""
        return _told(self, super().condition(index).time_ids, index, chances)

    def empty(self, n: int = 1) -> Captions:
        """The unconditional pass, n times, as the trained text encoders have it."""
        return Captions.of([None] * n, self.text)


@dataclass(frozen=True, eq=False)
class LiveParts(PartedCache):
    """The same of a stream."""

    text: TextLora

    def condition(self, index: Index, chances: Sequence[float] | None = None) -> Captions:
        """As `LiveCache.condition`."""
        return _told(self, super().condition(index).time_ids, index, chances)

    def empty(self, n: int = 1) -> Captions:
        """As `LiveCache.empty`."""
        return Captions.of([None] * n, self.text)


def _told(
    cache: LiveCache | LiveParts, sizes: Tensor | None, index: Index, chances: Sequence[float] | None
) -> Captions:
    rows = [index] if isinstance(index, int) else index
    given: Sequence[float | None] = [None] * len(rows) if chances is None else chances
    told = [cache.caption(row, chance) for row, chance in zip(rows, given, strict=True)]
    return Captions.of(told, cache.text, sizes)


def live(cache: Found, text: TextLora | None) -> Found:
    """`cache` with its captions encoded by `text`; as it is where there is no `text`, or no cache."""
    if text is None or cache is None:
        return cache
    kind = LiveParts if isinstance(cache, PartedCache) else LiveCache
    own = PartedCache if isinstance(cache, PartedCache) else Cache
    return kind(**{key.name: getattr(cache, key.name) for key in fields(own)}, text=text)
