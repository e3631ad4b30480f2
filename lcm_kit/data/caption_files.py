"""Captions: text files beside the pictures, and tables of them (metadata.jsonl, metadata.csv).

`a.txt` beside `a.png` goes first, then `a.png.txt`, `a.caption`, and the line of a table. Names are compared
as a person reads them: accents in either of Unicode's spellings, endings in upper or lower case.
"""

from __future__ import annotations

import csv
import io
import json
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any
from unicodedata import normalize

from lcm_kit.data.folder_files import File, Files
from lcm_kit.errors import UserError
from lcm_kit.io.written import LONGEST, decoded, tidied

METADATA = "metadata.jsonl"
TABLES = (METADATA, "metadata.csv")
ENDINGS = (".txt", ".caption")
COLUMN = "text"  # of a table, unless data.caption_column says another
_ALSO = ("caption", "prompt")  # what others call it: read where there is no `text` and only one of them
_FILE = "file_name"

Bad = tuple[str, str]  # id, reason


def same(name: str) -> str:
    """A path in the one spelling that paths are compared in."""
    return normalize("NFC", name)


@dataclass(frozen=True)
class Line:
    """A line of a table."""

    where: str  # table and line
    caption: Any


@dataclass
class Captions:
    """All captions below a folder, to be asked for by the paths of pictures."""

    files: Mapping[str, File]
    beside: dict[str, list[str]] = field(default_factory=dict)  # caption files by path without .txt, .caption
    lines: dict[str, list[Line]] = field(default_factory=dict)  # lines of tables by the picture's path
    used: set[str] = field(default_factory=set)  # caption files that a picture has
    unlike: list[str] = field(default_factory=list)  # pictures of which a second caption says something else
    column: str | None = None  # column of the tables that was asked for and found

    @property
    def files_beside(self) -> list[str]:
        """All caption files."""
        return [name for names in self.beside.values() for name in names]

    def has(self, picture: str) -> bool:
        """Whether there is a caption of any kind for the picture."""
        return bool(self._beside(picture)) or same(picture) in self.lines

    def _beside(self, picture: str) -> list[str]:
        """Caption files of a picture, the one that counts first."""
        stem = str(PurePosixPath(picture).with_suffix("")) if PurePosixPath(picture).suffix else picture
        found = dict.fromkeys(self.beside.get(same(stem), []) + self.beside.get(same(picture), []))
        return sorted(found, key=lambda name: (not name.lower().endswith(".txt"), len(name), name))

    def of(self, picture: str) -> tuple[str, str]:
        """The tidied caption of a picture, and why it is of no use ("" if it is)."""
        names, lines = self._beside(picture), self.lines.get(same(picture), [])
        self.used.update(names)
        found = [self._read(name) for name in names]
        told = [tidied(line.caption) for line in lines]
        if not found and len({caption for caption, reason in told if not reason}) > 1:
            return "", f"two captions: {lines[0].where} and {lines[-1].where} say different things; keep one"
        if not found and not told:
            wanted = PurePosixPath(picture).with_suffix(".txt").name
            return "", f"no caption: there is neither {wanted} nor a line for it in {METADATA}"
        first, *rest = found + told
        if any(caption != first[0] for caption, reason in rest if not reason):
            self.unlike.append(picture)
        return first

    def _read(self, name: str) -> tuple[str, str]:
        short = name.rpartition("/")[2]
        try:
            content = self.files[name].read(8 * LONGEST)
            if len(content) == 8 * LONGEST:
                return "", f"caption is too long: {short} is no caption of one picture"
            return tidied(decoded(content))
        except (OSError, UnicodeDecodeError, UserError) as error:
            return "", f"caption file {short} cannot be read ({error})"


def captions_of(files: Files, column: str = COLUMN) -> Captions:
    """The captions among `files`; `column` is the tables' with the text.

    Raises `UserError` for a line of a table that cannot be read, and if a `column` is asked for by name and
    there is no table that has it.
    """
    found = Captions(files.found)
    for name in files.found:
        stem, ending = posixpath.splitext(name)
        if ending.lower() in ENDINGS:
            found.beside.setdefault(same(stem), []).append(name)
    known = {same(name) for name in files.found}
    tables = sorted(name for name in files.found if name.rpartition("/")[2].lower() in TABLES)
    for table in tables:
        rows = list(_rows(files, table))
        key = _column(f"{files.root}/{table}", rows, column)
        found.column = key if key == column else found.column
        for number, row in rows:
            where = f"{table.rpartition('/')[2]}, line {number}"
            picture = _picture(files, table, number, str(row[_FILE]), known)
            found.lines.setdefault(same(picture), []).append(Line(where, row.get(key)))
    if column != COLUMN and found.column is None:
        has = f"which has no {' or '.join(TABLES)}" if not tables else "whose tables have no such column"
        raise UserError(f"data.caption_column {column!r} has no effect on {files.root}, {has}; remove it")
    return found


def _rows(files: Files, table: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The lines of a table with their numbers; each has `file_name`."""
    path = f"{files.root}/{table}"
    try:
        text = decoded(files.found[table].read())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); save it as plain text in UTF-8") from error
    kind = "a JSON object" if table.lower().endswith("jsonl") else "a row of a table"
    for number, load in _csv(path, text) if table.lower().endswith(".csv") else _json(text):
        try:
            row = load()
            row[_FILE] + ""  # noqa: B018  # a text, or an error
            yield number, row
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{path}, line {number}: not {kind} with file_name and text ({type(error).__name__}: "
                f"{error}); fix the line"
            ) from error


def _json(text: str) -> Iterator[tuple[int, Any]]:
    """Each line, or each entry of a list over several lines, as something to load."""
    if text.lstrip().startswith("["):
        try:
            entries = json.loads(text)
        except (ValueError, RecursionError):
            entries = None  # line by line, so that the line with the fault is named
        if isinstance(entries, list):
            yield from ((number, lambda entry=entry: entry) for number, entry in enumerate(entries, start=1))
            return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, lambda line=line: json.loads(line)


def _csv(path: str, text: str) -> Iterator[tuple[int, Any]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True)
    try:
        for row in reader:
            yield reader.line_num, lambda row=row: row
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: {error}; save the table again as CSV") from error


def _column(path: str, rows: Sequence[tuple[int, Mapping[str, Any]]], wanted: str) -> str:
    """The column of a table that holds captions. Raises `UserError` where it could be several."""
    there = {key for _, row in rows for key in row}
    others = [key for key in _ALSO if key in there]
    if wanted in there or wanted != COLUMN or not others:
        return wanted
    if len(others) > 1:
        raise UserError(f"{path} has the columns {' and '.join(others)}; choose with data.caption_column")
    return others[0]


def _picture(files: Files, table: str, number: int, name: str, known: set[str]) -> str:
    """The path of the picture that a line of a table names: from beside the table, or from the root."""
    folder, tried = posixpath.dirname(table), [name, name.replace("\\", "/")]
    root = f"{files.root.absolute().as_posix()}/"
    paths = [each.removeprefix(root) for each in tried]
    if paths[-1].startswith("/") or paths[-1][1:3] == ":/":
        raise UserError(
            f"{files.root}/{table}, line {number}: {name!r} is not a path below the folder; name the picture "
            "as seen from beside the table"
        )
    places = [posixpath.normpath(posixpath.join(start, path)) for start in (folder, "") for path in paths]
    found = next((place for place in places if same(place) in known), places[0])
    if found.startswith("../"):
        raise UserError(
            f"{files.root}/{table}, line {number}: {name!r} leads out of the folder; put the picture into it"
        )
    return found
