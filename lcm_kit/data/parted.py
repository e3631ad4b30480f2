"""A cache of a stream, read by rows: its parts are opened as they are asked for, and few are kept open."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import overload

from lcm_kit.bases import BaseInfo
from lcm_kit.bases.condition import Condition
from lcm_kit.config.schema import Data
from lcm_kit.data import parts, rights, shards, vae_precision
from lcm_kit.data.cache import Cache, caption_of, mapped
from lcm_kit.data.joined import Joined, shares
from lcm_kit.data.order import Run
from lcm_kit.data.shards import Entry
from lcm_kit.data.told import Told
from lcm_kit.errors import UserError
from lcm_kit.io import own_shapes
from lcm_kit.io.files import sha256_bytes
from lcm_kit.io.remote import Folder

_OPEN = 64  # parts whose rows are known at once


@dataclass(frozen=True, eq=False)
class PartedCache(Joined):
    """A finished cache of a stream, as `cache.Cache`; what it holds in memory is a line for each part."""

    folder: Folder
    _parts: list[own_shapes.Part] = field(repr=False)
    _empty_content: str = field(repr=False)

    @staticmethod
    def open(folder: Folder, *, base: BaseInfo, data: Data) -> PartedCache:
        """The cache in `folder`, if it was made for this base and these settings.

        Raises `UserError` if it is missing, unfinished, damaged, or was made for another config.
        """
        found = parts.read_json(folder, parts.PARTS, own_shapes.Parts)
        if found is None:
            raise UserError(
                f"there is no finished cache in {folder.shown!r}; run `lcm-kit encode` with this config first"
            )
        given = vae_precision.of(found["settings"])
        wanted = shards.settings(base, data, given if data.vae_precision == "auto" else data.vae_precision)
        if changed := shards.differences(found["settings"], wanted):
            raise UserError(
                f"cache {folder.shown!r} was made for another config ({'; '.join(changed)}); run `lcm-kit "
                "encode` with this config first"
            )
        held = [part for part in found["parts"] if part["rows"]]
        if not held:
            raise UserError(f"cache {folder.shown!r} holds no row; check what the config's data.path is")
        return PartedCache(folder, held, shards.content_hash(wanted))

    def __len__(self) -> int:
        """Rows."""
        return self.starts[-1]

    @property
    def ids(self) -> Sequence[str]:
        """Names of the rows, in order."""
        return Told(lambda row: self._entry(row).name, len(self))

    @property
    def captions(self) -> Sequence[str]:
        """The first caption of each row."""
        return Told(lambda row: self._entry(row).caption, len(self))

    @property
    def images(self) -> Sequence[str]:
        """Hash of each row's image file."""
        return Told(lambda row: self._entry(row).image, len(self))

    @cached_property
    def runs(self) -> list[Run]:
        """The rows, in order, by shape."""
        return [Run(rows, tuple(shape)) for part in self._parts for rows, shape in part["runs"]]

    @cached_property
    def several(self) -> bool:
        """Whether any row has several captions."""
        return any(part["several"] for part in self._parts)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all that the cached tensors were made from."""
        return sha256_bytes("".join(s["content"] for part in self._parts for s in part["shards"]).encode())

    @property
    def rights(self) -> own_shapes.Rights | None:
        """What metadata says of the pictures, in numbers."""
        return rights.merged([(part.get("rights"), part["pictures"]) for part in self._parts])

    @property
    def first(self) -> range:
        """The rows of the first part, from which pictures are held out: all are never known at once."""
        return range(self._parts[0]["rows"])

    @cached_property
    def starts(self) -> list[int]:
        """As `Joined.starts`."""
        return [0, *accumulate(part["rows"] for part in self._parts)]

    def source(self, number: int) -> Cache:
        """As `Joined.source`."""
        if number not in self._opened:  # a few hundred bytes each: its files are mapped elsewhere
            part = self._parts[number]
            folder = self.folder.below(parts.folder_name(part["source"]))
            self._opened[number] = _Part(folder, [], part["shards"], "", None, part["weighted"])
        return self._opened[number]

    def caption(self, row: int, chance: float | None = None) -> str:
        """As `Cache.caption`."""
        return caption_of(self._entry(row), chance)

    def empty(self, n: int = 1) -> Condition:
        """As `Cache.empty`."""
        return Condition(**mapped(self.folder, shards.EMPTY, self._empty_content)).expand(n)

    @cached_property
    def _opened(self) -> dict[int, Cache]:
        return {}

    def _entry(self, row: int) -> Entry:
        (share,) = shares([row], self.starts)
        part = self._parts[share.source]
        known = _records(self.folder.below(parts.folder_name(part["source"])), _Files(part["shards"]))
        return known[share.rows[0]]


@dataclass(frozen=True, eq=False)
class _Part(Cache):
    """A part's files. What its rows are called is not known here: it would be read for each of them."""

    masked: bool

    @property
    def weighted(self) -> bool:
        """Whether any row has a mask."""
        return self.masked


class _Files(list[own_shapes.Shard]):
    """A part's files, told apart by what they are made from."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(shard["content"] for shard in self))


@lru_cache(maxsize=_OPEN)
def _records(part: Folder, files: _Files) -> list[Entry]:
    """The rows of a part; `files` are in the key so that one that was made anew is read anew."""
    found = parts.read_json(part, parts.RECORDS, own_shapes.PartRecords)
    if found is None:
        raise UserError(
            f"{part.shown}/{parts.RECORDS} is missing; run `lcm-kit encode` with this config again"
        )
    return [Entry.of(row) for row in found["records"]]


@dataclass(frozen=True)
class AllBut(Sequence[int]):
    """All rows but some: their numbers are worked out, not held."""

    rows: int
    without: tuple[int, ...]  # ascending

    def __len__(self) -> int:
        """Rows that are left."""
        return self.rows - len(self.without)

    @overload
    def __getitem__(self, place: int) -> int: ...
    @overload
    def __getitem__(self, place: slice) -> list[int]: ...
    def __getitem__(self, place: int | slice) -> int | list[int]:
        """The row at `place` of those that are left, or those of some places."""
        if isinstance(place, slice):
            return [self[each] for each in range(*place.indices(len(self)))]
        if not 0 <= place < len(self):
            raise IndexError(place)
        # of those left out before a row, as many as are not above it: each moves it one on
        before = bisect_right(range(len(self.without)), place, key=lambda k: self.without[k] - k)
        return place + before

    def __iter__(self) -> Iterator[int]:
        """The rows, in order."""
        return (self[place] for place in range(len(self)))
