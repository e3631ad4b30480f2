"""Pictures and captions as streams: shard by shard, each read once from begin to end.

For sets that no machine lists or holds: tar files in webdataset's layout, parquet files, and what the
`datasets` library streams; here or at any address that fsspec opens. What is held is the names of the shards
and one record; pictures are neither listed nor counted before they come.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial

from lcm_kit.config.schema import Data
from lcm_kit.data import dataset_shards, parquet_shards, stream_kinds, tar_shards
from lcm_kit.data.caption_files import Bad
from lcm_kit.data.findings import few
from lcm_kit.data.records import Record
from lcm_kit.errors import UserError
from lcm_kit.io.reading import tried
from lcm_kit.io.urls import At, at, fixed_part, identity, info_of, inside, is_pattern, is_url, matches, shown

_READ: dict[stream_kinds.Kind, Callable[[At, str, Data], Iterator[Record | Bad]]] = {
    "webdataset": tar_shards.records,
    "parquet": parquet_shards.records,
}


@dataclass(frozen=True)
class SourceShard:
    """A part of a source that is read in one go."""

    name: str  # the same wherever the set lies; begins the ids of its records
    _identity: Callable[[], str] = field(repr=False)
    _records: Callable[[], Iterator[Record | Bad]] = field(repr=False)

    def identity(self) -> str:
        """What is equal as long as the shard's content is: size and hash or time; "" where nothing is known.

        One request at most. Raises `UserError` if the shard is not there, or not for us.
        """
        return self._identity()

    def records(self) -> Iterator[Record | Bad]:
        """Its records in order, read as they are asked for; ids `name`/KEY. A new stream at every call.

        A picture's bytes live as long as its record is held. Raises `UserError` when the shard turns out to
        be broken, cut off, or cannot be read on: never does it just end early.
        """
        return self._records()


def identities(data: Data, sources: Sequence[SourceShard]) -> list[tuple[str, str]]:
    """(name, identity) of each; of a set at an address "", since it would be a request for each."""
    return [(source.name, "" if is_url(data.path) else source.identity()) for source in sources]


def source_shards(data: Data) -> list[SourceShard]:
    """The shards of the stream that `data.path` is, in a fixed order; no picture is looked at.

    Raises `UserError` if there is none, or if it is no stream (`stream_kinds.is_stream`).
    """
    kind = stream_kinds.kind_of(data)
    if kind == "datasets":
        return _of_dataset(data)
    places, root = _places(data)
    read = _READ[kind or _kind_of_all(places, data)]
    stream_kinds.refuse_without_effect(data)
    names = [place.shown.removeprefix(shown(root)) for place in places]
    return [
        SourceShard(name, partial(_identity_of, place), partial(read, place, name, data))
        for name, place in zip(names, places, strict=True)
    ]


def _places(data: Data) -> tuple[list[At], str]:
    """The files of a set, and what their names leave out: the folder of the pattern, or that they lie in."""
    path = data.path if is_url(data.path) else os.path.abspath(data.path)
    if is_pattern(path) and not os.path.lexists(path):
        places = matches(path)
        if not is_url(path):  # elsewhere it would be a request for each
            absent = [place.shown for place in places if not os.path.exists(place.path)]
            if absent:
                raise UserError(
                    f"data.path {data.path!r}: {len(absent)} of {len(places)} files are not there: "
                    f"{few(absent)}; check the numbers in the pattern"
                )
        return places, fixed_part(path)
    place = at(path)
    info = tried(lambda: info_of(place), path)
    if info.get("type") != "directory":
        return [place], place.shown[: place.shown.rfind("/") + 1]
    endings = stream_kinds.ENDINGS[kind] if (kind := stream_kinds.kind_of(data)) else stream_kinds.ALL
    found = [each for each in inside(place) if each.path.lower().endswith(endings)]
    if not found:
        raise UserError(
            f"data.path {shown(data.path)!r} holds no file that ends in {', '.join(endings)}; pictures one "
            "by one are read from folders of this machine alone: pack them into tar files (docs/scale.md)"
        )
    return found, path.rstrip("/") + "/"


def _kind_of_all(places: list[At], data: Data) -> stream_kinds.Kind:
    kinds = {stream_kinds.by_ending(place.shown) for place in places}
    if len(kinds) != 1 or None in kinds:
        raise UserError(
            f"data.path {shown(data.path)!r}: what it is cannot be told from the names ({places[0].shown}); "
            "say it with data.kind: webdataset or parquet"
        )
    (kind,) = kinds
    assert kind is not None
    return kind


def _identity_of(place: At) -> str:
    return identity(tried(lambda: info_of(place), place.url))


def _of_dataset(data: Data) -> list[SourceShard]:
    open_once = cache(lambda: dataset_shards.opened(data))
    _, count, mark = open_once()

    def shard(index: int) -> SourceShard:
        name = f"{data.split}-{index:05d}-of-{count:05d}"

        def records() -> Iterator[Record | Bad]:
            return dataset_shards.records(open_once()[0], count, index, name, data)

        return SourceShard(name, lambda: f"{name}-{mark}" if mark else "", records)

    return [shard(index) for index in range(count)]
