"""A cache whose captions are encoded when a step needs them, because the text encoders are trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

from lcm_kit.adapter.text import Captions, TextLora
from lcm_kit.data.cache import Cache

Found = TypeVar("Found", Cache, Cache | None)


@dataclass(frozen=True, eq=False)
class LiveCache(Cache):
    """A cache's latents and sizes, and its captions for `text` to encode."""

    text: TextLora

    def condition(self, index: int | Sequence[int], chances: Sequence[float] | None = None) -> Captions:
        """The captions of the rows at `index`, as `Cache.condition`; encoded by their `kwargs`."""
        rows = [index] if isinstance(index, int) else index
        cached = super().condition(rows)
        given: Sequence[float | None] = [None] * len(rows) if chances is None else chances
        told = [self.caption(row, chance) for row, chance in zip(rows, given, strict=True)]
        return Captions.of(told, self.text, cached.time_ids)

    def empty(self, n: int = 1) -> Captions:
        """The unconditional pass, n times, as the trained text encoders have it."""
        return Captions.of([None] * n, self.text)


def live(cache: Found, text: TextLora | None) -> Found:
    """`cache` with its captions encoded by `text`; as it is where there is no `text`, or no cache."""
    if text is None or cache is None:
        return cache
    return LiveCache(**{key.name: getattr(cache, key.name) for key in fields(Cache)}, text=text)
