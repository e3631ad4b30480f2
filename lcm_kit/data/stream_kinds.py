"""Which sources are read as streams, and as what: from the config and from names, without a request."""

from __future__ import annotations

import os
from typing import Literal

from lcm_kit.config.schema import Data
from lcm_kit.data.image_files import SUFFIXES
from lcm_kit.errors import UserError
from lcm_kit.io.urls import is_pattern, is_url, shown

Kind = Literal["webdataset", "parquet", "datasets"]
ENDINGS: dict[Kind, tuple[str, ...]] = {"webdataset": (".tar", ".tar.gz", ".tgz"), "parquet": (".parquet",)}
ALL = tuple(ending for endings in ENDINGS.values() for ending in endings)


def is_stream(data: Data) -> bool:
    """Whether `data.path` is read by `streams.source_shards`, and not by `records.open_records`.

    With `data.kind: auto` that are addresses, patterns, tar files and folders of nothing but tar files. A
    parquet file or a folder of this machine stays with `datasets` unless `data.kind` or `data.streaming` say
    otherwise.
    """
    if kind_of(data) is not None:
        return True
    given = is_url(data.path) or (is_pattern(data.path) and not os.path.lexists(data.path))
    return data.kind == "auto" and (given or _is_tar_set(data.path))


def kind_of(data: Data) -> Kind | None:
    """What the config itself says that is streamed; None: nothing, or what the names say."""
    if data.streaming:
        return "datasets"
    return data.kind if data.kind in ("webdataset", "parquet") else None


def by_ending(name: str) -> Kind | None:
    """What a shard's name says that it is."""
    name = name.lower()
    return next((kind for kind, endings in ENDINGS.items() if name.endswith(endings)), None)


def _is_tar_set(path: str) -> bool:
    if os.path.isfile(path):
        return by_ending(path) == "webdataset"
    if not os.path.isdir(path):
        return False
    tars, others = False, (*SUFFIXES, ".zip", ".parquet", ".arrow")
    with os.scandir(path) as entries:
        for entry in entries:
            name = entry.name.lower()
            if not name.startswith(".") and (entry.is_dir() or name.endswith(others)):
                return False
            tars = tars or name.endswith(ENDINGS["webdataset"])
    return tars


def refuse_without_effect(data: Data) -> None:
    """Raise `UserError` for a split of what has none: it would be passed over in silence."""
    if data.split != "train":
        raise UserError(
            f"data.split {data.split!r} has no effect on {shown(data.path)!r}, which `datasets` does not "
            "read; name the files of the split in data.path, and remove it"
        )
