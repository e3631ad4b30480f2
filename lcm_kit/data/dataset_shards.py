"""Records of a data set of the `datasets` library as it streams them, by its own shards."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from typing import Any

from lcm_kit.assets import place
from lcm_kit.config.schema import Data
from lcm_kit.data.caption_files import Bad
from lcm_kit.data.caption_tags import of_cell
from lcm_kit.data.cells import content_of
from lcm_kit.data.records import Record
from lcm_kit.data.rights import Rights, columns_of
from lcm_kit.errors import UserError, first_line
from lcm_kit.io.files import sha256_bytes

_MOST = 4096  # shards that are made of a data set's: some have one for each picture


def opened(data: Data) -> tuple[Any, int, str]:
    """The streamed rows of `data.path`, how many shards they come in, and an identity ("": none is known).

    Nothing of the rows is read. Raises `UserError` if there is no such data set, split or column.
    """
    import datasets

    path = place(data.path)
    try:
        builder = datasets.load_dataset_builder(str(path) if path.is_dir() else data.path)
        rows = builder.as_streaming_dataset(split=data.split)
        names = rows.column_names or list(next(iter(rows.take(1)), {}))
    # a wrong name or split, the network, a broken file: `datasets` raises of all kinds, and none is our bug
    except Exception as error:
        raise UserError(
            f"data.path {data.path!r} is no data set that can be streamed with split {data.split!r} "
            f"({first_line(error)}); check data.path and data.split"
        ) from error
    for key, column in (("image_column", data.image_column), ("caption_column", data.caption_column)):
        if column not in names:
            raise UserError(f"data.{key} {column!r} is no column of {data.path!r}; it has {', '.join(names)}")
    read = [data.image_column, data.caption_column]
    rows = rows.select_columns([*dict.fromkeys(read), *columns_of(names, but=read)])
    rows = rows.cast_column(data.image_column, datasets.Image(decode=False))
    return rows, min(rows.num_shards, _MOST), _identity(builder, data.split)


def _identity(builder: Any, split: str) -> str:
    """A hash of which files there are, and their versions: of the hub the commit, else a time or an ETag."""
    files = (getattr(builder.config, "data_files", None) or {}).get(split)
    origin = getattr(files, "origin_metadata", None)
    return sha256_bytes(json.dumps([list(files), origin], default=str).encode()) if files and origin else ""


def records(rows: Any, shards: int, index: int, name: str, data: Data) -> Iterator[Record | Bad]:
    """The rows of one of so many shards, ids `name`/NUMBER; or what is wrong with each.

    A stream that breaks is tried again by `datasets`. Raises `UserError` if that does not help, which says
    how many rows came before.
    """
    row = 0
    stream = iter(rows.shard(num_shards=shards, index=index))
    while True:
        try:
            cells = next(stream, None)
        except Exception as error:  # of all kinds, as above
            raise UserError(
                f"data.path {data.path!r}, {name}: cannot be read on after {row} rows ({first_line(error)}); "
                "check the connection and the data set, and run the same command again"
            ) from error
        if cells is None:
            return
        captions, reason = of_cell(cells[data.caption_column], data)
        id = f"{name}/{row}"
        row += 1
        read = partial(content_of, cells[data.image_column])
        rights = Rights.of(cells, but=(data.image_column, data.caption_column))
        yield (id, reason) if reason else Record(id, captions, read, rights=rights)
