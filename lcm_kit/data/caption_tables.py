"""Tables of captions in a folder: metadata.jsonl, .csv, .parquet and .json, and JSON beside a picture.

The first three as the image folders of `datasets` have them. A metadata.json is what kohya's fine-tuning
takes, `{"path or its stem": {"caption": ..., "tags": ...}}`, or a list of lines; one that is neither is no
table. What a row says beside its caption stays in `Line.row`.
"""

from __future__ import annotations

import csv
import io
import json
import posixpath
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath
from typing import Any
from unicodedata import normalize

from lcm_kit.data.caption_texts import Lines, several_lines
from lcm_kit.data.folder_files import Files
from lcm_kit.data.image_files import SUFFIXES
from lcm_kit.errors import UserError
from lcm_kit.io.written import decoded

METADATA = "metadata.jsonl"
JSON = ".json"  # ends the name of what may say something of one picture
LARGEST_JSON = 1 << 24  # bytes of that; what a downloader wrote of one picture has some thousands
# What kohya's scripts write one after another; of those in one folder the last that was made counts
_KOHYAS = ("meta_lat.json", "meta_clean.json", "meta_cap_dd.json", "meta_cap.json")
TABLES = (METADATA, "metadata.csv", "metadata.parquet", "metadata.json", *_KOHYAS)
COLUMN = "text"  # of a table, unless data.caption_column says another
_ALSO = ("caption", "prompt")  # what others call it: read where there is no `text` and only one of them
_TAGS, _BOORUS = "tags", "tag_string"  # a list or text of tags; danbooru's, with spaces between tags
_FILE, _WEIGHT = "file_name", "weight"

Row = Mapping[str, Any]
Numbered = tuple[str, Callable[[], Any]]  # where it stands in the table, and what loads it


def same(name: str) -> str:
    """A path in the one spelling that paths are compared in."""
    return normalize("NFC", name)


def stem(path: str) -> str:
    """A path without the ending of its file."""
    return str(PurePosixPath(path).with_suffix(""))


@dataclass(frozen=True)
class Line:
    """A line of a table: what it says of a picture."""

    where: str  # table and line
    caption: Any  # as `caption_texts.read` takes it
    weight: Any
    row: Row


def tables_of(files: Files) -> list[str]:
    """The paths of what may be tables, sorted."""
    found = sorted(name for name in files.found if _name(name) in TABLES)
    last: dict[str, str] = {}
    for name in (name for name in found if _name(name) in _KOHYAS):
        folder = posixpath.dirname(name)
        last[folder] = min(last.get(folder, name), name, key=lambda each: _KOHYAS.index(_name(each)))
    return [name for name in found if _name(name) not in _KOHYAS or name in last.values()]


def _name(path: str) -> str:
    return path.rpartition("/")[2].lower()


def read_table(files: Files, table: str, column: str, lines: Lines) -> list[tuple[str, Line]] | None:
    """The lines of a table in its order, each with the path of its picture; None for a file that is no table.

    Raises `UserError` for one that cannot be read, for a line of it that has no picture, and where its
    captions could be in several columns.
    """
    path, name = f"{files.root}/{table}", _name(table)
    try:
        content = files.found[table].read()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error}); save it again") from error
    if name.endswith(".parquet"):
        numbered, kind = _parquet(path, content), "a row of a table"
    elif name.endswith(".json"):
        numbered, kind = _json_file(content), "an entry"
    else:
        text = _text(path, content)
        numbered, kind = (
            (_csv(path, text), "a row of a table")
            if name.endswith(".csv")
            else (_jsonl(text), "a JSON object")
        )
    if numbered is None:
        return None
    rows = list(_rows(path, kind, numbered))
    key = _column(path, [row for _, row in rows], column)
    known = {same(each): each for each in files.found}
    stems = {same(posixpath.splitext(each)[0]): each for each in files.found if _is_image(each)}
    found = []
    for where, row in rows:
        picture = _picture(files, table, where, row[_FILE], known, stems if name.endswith(".json") else {})
        given = captioned(row, key, lines) if name.endswith(".json") else row.get(key)
        said = ", ".join(filter(None, [table.rpartition("/")[2], where]))
        found.append((picture, Line(said, given, row.get(_WEIGHT), row)))
    return found


def captioned(row: Row, column: str, lines: Lines) -> Any:
    """What a JSON object says of a picture: its caption with its tags behind it, or one of them; or None.

    As kohya's trainer joins them. Where a `column` is asked for, that alone.
    """
    tags = _tags(row)
    if column not in (COLUMN, *_ALSO, _TAGS, _BOORUS):
        return row.get(column)
    keys = [key for key in (column, COLUMN, *_ALSO) if key not in (_TAGS, _BOORUS)]
    told = next((row[key] for key in keys if row.get(key)), None)
    if told is None or not tags:
        return tags if told is None else told
    if isinstance(told, list):
        return [f"{each}, {tags}" if isinstance(each, str) else each for each in told]
    if not isinstance(told, str):
        return told
    parts = told.splitlines() if lines != "joined" and several_lines(told) else [told]
    return "\n".join(f"{part.strip()}, {tags}" for part in parts if part.strip())


def says_something(row: Any, column: str) -> bool:
    """Whether a JSON value is an object with a caption or tags."""
    return isinstance(row, dict) and any(key in row for key in (column, COLUMN, *_ALSO, _TAGS, _BOORUS))


def _tags(row: Row) -> Any:
    """The tags of a row as a caption, None without any."""
    given = row.get(_TAGS)
    if isinstance(given, list) and all(isinstance(tag, str) for tag in given):
        given = ", ".join(tag.strip() for tag in given if tag.strip())
    boorus = row.get(_BOORUS)
    if not given and isinstance(boorus, str):
        given = ", ".join(tag.replace("_", " ") for tag in boorus.split())
    return given or None


def _is_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in SUFFIXES


def _text(path: str, content: bytes) -> str:
    try:
        return decoded(content)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot be read ({error}); save it as plain text in UTF-8") from error


def _rows(path: str, kind: str, numbered: Iterator[Numbered]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines of a table with where they stand; each has `file_name`."""
    for where, load in numbered:
        try:
            row = load()
            row[_FILE] + ""  # noqa: B018  # a text, or an error
            yield where, row
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{path}, {where}: not {kind} with file_name and text ({type(error).__name__}: "
                f"{error}); fix the line"
            ) from error


def _jsonl(text: str) -> Iterator[Numbered]:
    """Each line, or each entry of a list over several lines, as something to load."""
    if text.lstrip().startswith("["):
        try:
            entries = json.loads(text)
        except (ValueError, RecursionError):
            entries = None  # line by line, so that the line with the fault is named
        if isinstance(entries, list):
            yield from _entries(entries)
            return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"line {number}", partial(json.loads, line)


def _entries(entries: Sequence[Any]) -> Iterator[Numbered]:
    yield from ((f"line {number}", _already(entry)) for number, entry in enumerate(entries, start=1))


def _already(entry: Any) -> Callable[[], Any]:
    """What "loads" an entry that is loaded."""
    return lambda: entry


def _json_file(content: bytes) -> Iterator[Numbered] | None:
    """The entries of a JSON file of captions by picture, or of a list of lines; None for any other."""
    found = loaded(content)
    if isinstance(found, list) and found and all(isinstance(each, dict) and _FILE in each for each in found):
        return _entries(found)
    if not isinstance(found, dict) or not all(isinstance(each, dict) for each in found.values()):
        return None
    if not any(says_something(each, COLUMN) for each in found.values()):
        return None
    return iter([(f"entry {key!r:.60}", _already({**row, _FILE: key})) for key, row in found.items()])


def loaded(content: bytes) -> Any:
    """A JSON file's value; None for what is no JSON."""
    try:
        return json.loads(decoded(content))
    except (ValueError, RecursionError):  # bytes that are no text too
        return None


def _csv(path: str, text: str) -> Iterator[Numbered]:
    reader = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True)
    try:
        for row in reader:
            yield f"line {reader.line_num}", _already(row)
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: {error}; save the table again as CSV") from error


def _parquet(path: str, content: bytes) -> Iterator[Numbered] | None:
    """The rows of a parquet file that names files; None for one that does not: it is a data set."""
    import pyarrow
    from pyarrow import parquet

    try:
        opened = parquet.ParquetFile(io.BytesIO(content))
        wanted = [each.name for each in opened.schema_arrow if not _holds_bytes(each.type)]
        if _FILE not in wanted:
            return None
        rows = opened.read(columns=wanted).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path}: no parquet table that can be read ({reason}); write it again") from error
    return iter([(f"row {number}", _already(row)) for number, row in enumerate(rows)])


def _holds_bytes(kind: Any) -> bool:
    """Whether a column is of bytes or of structures with bytes, as pictures are."""
    return "binary" in str(kind)


def _column(path: str, rows: Sequence[Row], wanted: str) -> str:
    """The column of a table that holds captions. Raises `UserError` where it could be several."""
    there = {key for row in rows for key in row}
    others = [key for key in _ALSO if key in there]
    if wanted in there or wanted != COLUMN or not others:
        only_tags = wanted == COLUMN and wanted not in there and _TAGS in there
        return _TAGS if only_tags else wanted
    if len(others) > 1:
        raise UserError(f"{path} has the columns {' and '.join(others)}; choose with data.caption_column")
    return others[0]


def _picture(
    files: Files, table: str, where: str, name: str, known: Mapping[str, str], stems: Mapping[str, str]
) -> str:
    """The path of the picture that a line of a table names: from beside the table, or from the root.

    `stems`: paths of pictures without their endings, where a table may name them so.
    """
    folder, tried = posixpath.dirname(table), [name, name.replace("\\", "/")]
    root = f"{files.root.absolute().as_posix()}/"
    paths = [each.removeprefix(root) for each in tried]
    if paths[-1].startswith("/") or paths[-1][1:3] == ":/":
        raise UserError(
            f"{files.root}/{table}, {where}: {name!r} is not a path below the folder; name the picture "
            "as seen from beside the table"
        )
    places = [posixpath.normpath(posixpath.join(start, path)) for start in (folder, "") for path in paths]
    named = [known.get(same(place)) or stems.get(same(place)) for place in places]
    found = next(filter(None, named), places[0])
    if found.startswith("../"):
        raise UserError(
            f"{files.root}/{table}, {where}: {name!r} leads out of the folder; put the picture into it"
        )
    return found
