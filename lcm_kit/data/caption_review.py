"""The table in which captions of a model wait for a person: `captions.csv` in the folder of the pictures.

No training reads it. What a person lets stand becomes caption files (`captioning.accept`).
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from lcm_kit.errors import UserError
from lcm_kit.io.files import atomic_write
from lcm_kit.io.written import decoded, tidied

REVIEW = "captions.csv"
_COLUMNS = ("picture", "caption", "status")
HEAD = 512  # bytes of a file that its headings are within
_SEPARATORS = ",;\t"  # the second is what spreadsheets write where the comma is in numbers

Status = Literal["new", "ok", "rejected", "written"]
_STATUSES: tuple[Status, ...] = get_args(Status)


@dataclass(frozen=True)
class Row:
    """A picture's caption and what became of it. `new` is as good as `ok`: nobody rejected it."""

    picture: str  # path within the folder
    caption: str
    status: Status = "new"


def is_review(head: bytes) -> bool:
    """Whether a file that begins so is such a table."""
    try:
        return _separator(decoded(head).partition("\n")[0]) is not None
    except UnicodeDecodeError:
        return False


def _separator(line: str) -> str | None:
    """What separates the columns of a line of headings; None if it has not those of the table."""
    for separator in _SEPARATORS:
        if {*_COLUMNS} <= {each.strip().strip('"').lower() for each in line.split(separator)}:
            return separator
    return None


def read_review(path: Path) -> list[Row]:
    """The rows of a table, in its order. Raises `UserError` for one that is not there or not as written."""
    try:
        text = decoded(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such table; write one with `lcm-kit caption`") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); save it as CSV in UTF-8") from error
    separator = _separator(text.partition("\n")[0])
    if separator is None:
        raise UserError(f"{path}: has not the columns {', '.join(_COLUMNS)}; keep the headings as they were")
    rows: dict[str, Row] = {}
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator)
    try:
        for given in reader:
            row = _row({(key or "").strip().lower(): value for key, value in given.items()})
            if row.picture in rows:
                raise ValueError(f"{row.picture} stands there twice")
            rows[row.picture] = row
    except (csv.Error, ValueError) as error:
        raise UserError(f"{path}, line {reader.line_num}: {error}; put it right") from error
    return list(rows.values())


def _row(given: dict[str, str | None]) -> Row:
    """Raises `ValueError` with what is wrong."""
    picture, status = (given["picture"] or "").strip(), (given["status"] or "").strip().lower() or "new"
    if not picture:
        raise ValueError("it names no picture")
    known = next((each for each in _STATUSES if each == status), None)
    if known is None:
        raise ValueError(f"status {status!r:.40} is none of {', '.join(_STATUSES)}")
    caption, reason = tidied(given["caption"] or "")
    if reason and not reason.startswith("empty"):
        raise ValueError(reason)
    return Row(picture, caption, known)


class ReviewFile:
    """A table that is written again and again, and belongs to a person in between."""

    def __init__(self, path: Path) -> None:
        """Begin with the rows that are there. Raises `UserError` as `read_review`."""
        self.path = path
        self._there = self._content()
        self.rows = {row.picture: row for row in read_review(path)} if self._there is not None else {}

    def write(self, rows: Iterable[Row] = ()) -> None:
        """Put `rows` in, or in the place of those of the same pictures, and write all, by picture.

        Raises `UserError` if somebody else changed the table meanwhile: nothing of theirs is written over.
        """
        if self._content() != self._there:
            raise UserError(
                f"{self.path} was changed by somebody else meanwhile; save it, and run the same command "
                "again, which keeps what stands there"
            )
        self.rows |= {row.picture: row for row in rows}
        self._there = table_of(sorted(self.rows.values(), key=lambda row: row.picture)).encode()
        atomic_write(self.path, self._there)

    def _content(self) -> bytes | None:
        return self.path.read_bytes() if self.path.is_file() else None


def table_of(rows: Sequence[Row]) -> str:
    """The text of a table."""
    made = io.StringIO()
    writer = csv.writer(made, lineterminator="\n")
    writer.writerow(_COLUMNS)
    writer.writerows((row.picture, row.caption, row.status) for row in rows)
    return made.getvalue()
