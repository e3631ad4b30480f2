"""Records of a parquet file, read a few rows at a time by pyarrow; nothing else of it is held."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from lcm_kit.config.schema import Data
from lcm_kit.data.caption_files import Bad
from lcm_kit.data.caption_tags import of_cell
from lcm_kit.data.cells import content_of
from lcm_kit.data.records import Record
from lcm_kit.data.rights import Rights, columns_of
from lcm_kit.errors import UserError, first_line
from lcm_kit.io.reading import Reader
from lcm_kit.io.urls import At

_ROWS = 8  # that are in memory at once
_BUFFER = 1 << 22  # bytes of a column that are read at once: without it a row group's column would be


def records(place: At, name: str, data: Data) -> Iterator[Record | Bad]:
    """The rows of the parquet file at `place`, ids `name`/NUMBER; or what is wrong with each.

    Raises `UserError` if the file lacks `data.image_column` or `data.caption_column`, is cut off, broken or
    cannot be read, which says how many rows came before.
    """
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    columns, row = [data.image_column, data.caption_column], 0
    try:
        with Reader(place, ahead=False) as reader:
            file = ParquetFile(reader, buffer_size=_BUFFER, pre_buffer=False)
            _require(columns, file.schema_arrow.names, place)
            said = columns_of(file.schema_arrow.names, but=columns)
            for batch in file.iter_batches(_ROWS, columns=[*columns, *said], use_threads=False):
                cells, captions = (batch.column(column) for column in columns)
                for number in range(len(batch)):
                    rights = Rights.of({each: batch.column(each)[number].as_py() for each in said})
                    given = captions[number].as_py()
                    yield _record(f"{name}/{row}", cells[number].as_py(), given, data, rights)
                    row += 1
            if row != file.metadata.num_rows:
                raise EOFError(f"it has {row} of {file.metadata.num_rows} rows")
    except UserError:
        raise
    except (ArrowException, OSError, EOFError, ValueError) as error:
        raise UserError(
            f"{place.shown}: a broken parquet file ({first_line(error)}); {row} rows could be read before "
            "that: fetch or write it again"
        ) from error


def _require(columns: list[str], there: list[str], place: At) -> None:
    for key, column in zip(("image_column", "caption_column"), columns, strict=True):
        if column not in there:
            raise UserError(f"data.{key} {column!r} is no column of {place.shown}; it has {', '.join(there)}")


def _record(id: str, cell: Any, given: Any, data: Data, rights: Rights) -> Record | Bad:
    captions, reason = of_cell(given, data)
    if reason:
        return id, reason
    if isinstance(cell, dict) and cell.get("bytes") is None and cell.get("path") is not None:
        return id, "the path of an image without its bytes; write the parquet file with its images"
    return Record(id, captions, partial(content_of, cell), rights=rights)
