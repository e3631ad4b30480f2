"""Captions: text and JSON files beside the pictures, and tables of them (`caption_tables.py`).

`a.txt` beside `a.png` goes first, then `a.png.txt`, `a.caption`, `a.json`, `a.png.json`, and the line of a
table. Names are compared as a person reads them: accents in either of Unicode's spellings, endings in upper
or lower case.
"""

from __future__ import annotations

import posixpath
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from lcm_kit.data.caption_tables import (
    COLUMN,
    JSON,
    LARGEST_JSON,
    METADATA,
    TABLES,
    Line,
    captioned,
    loaded,
    read_table,
    same,
    says_something,
    stem,
    tables_of,
)
from lcm_kit.data.caption_texts import Lines, Read, merged, read, several_lines
from lcm_kit.data.folder_files import File, Files
from lcm_kit.errors import UserError
from lcm_kit.io.written import LONGEST, decoded

ENDINGS = (".txt", ".caption")

Bad = tuple[str, str]  # id, reason


@dataclass
class Captions:
    """All captions below a folder, to be asked for by the paths of pictures."""

    files: Mapping[str, File]
    how: Lines = "joined"
    column: str = COLUMN
    beside: dict[str, list[str]] = field(default_factory=dict)  # caption files by path without .txt, .caption
    objects: dict[str, list[str]] = field(default_factory=dict)  # JSON files by path without .json
    lines: dict[str, list[Line]] = field(default_factory=dict)  # lines of tables by the picture's path
    tables: set[str] = field(default_factory=set)  # tables that were read
    used: set[str] = field(default_factory=set)  # caption and JSON files that a picture has
    unlike: list[str] = field(default_factory=list)  # pictures of which a second caption says something else
    several: list[str] = field(default_factory=list)  # caption files, and lines of tables, of several lines
    otherwise: list[str] = field(default_factory=list)  # pictures of which nothing says anything

    @property
    def files_beside(self) -> list[str]:
        """All caption files."""
        return [name for names in self.beside.values() for name in names]

    def of(self, picture: str, otherwise: str | None = None) -> Read:
        """The tidied captions of a picture, and why there are none ("" if there are).

        `otherwise`: the caption of a picture for which nothing is written.
        """
        found = [self._read(name) for name in self._names(self.beside, picture)]
        found += [each for name in self._names(self.objects, picture) if (each := self._object(name))]
        found += self._told(self.lines.get(same(picture), []), alone=not found)
        if not found:
            if otherwise is not None:
                self.otherwise.append(picture)
                return read(otherwise)
            wanted = PurePosixPath(picture).with_suffix(".txt").name
            return (), f"no caption: there is neither {wanted} nor a line for it in {METADATA}"
        first, *rest = found
        if any(_texts(each) != _texts(first) for each in rest if not each[1]):
            self.unlike.append(picture)
        return first

    def _names(self, files: Mapping[str, list[str]], picture: str) -> list[str]:
        """Files of a picture, the one that counts first."""
        found = dict.fromkeys(files.get(same(stem(picture)), []) + files.get(same(picture), []))
        return sorted(found, key=lambda name: (not name.lower().endswith(".txt"), len(name), name))

    def _read(self, name: str) -> Read:
        short = name.rpartition("/")[2]
        self.used.add(name)
        try:
            content = self.files[name].read(8 * LONGEST)
            if len(content) == 8 * LONGEST:
                return (), f"caption is too long: {short} is no caption of one picture"
            text = decoded(content)
        except (OSError, UnicodeDecodeError, UserError) as error:
            return (), f"caption file {short} cannot be read ({error})"
        if several_lines(text):
            self.several.append(name)
        return read(text, self.how)

    def _object(self, name: str) -> Read | None:
        """What a JSON file beside a picture says of it; None if it is about something else."""
        try:
            row = loaded(self.files[name].read(LARGEST_JSON))
        except (OSError, UserError) as error:
            self.used.add(name)
            return (), f"caption file {name.rpartition('/')[2]} cannot be read ({error})"
        if not says_something(row, self.column):
            return None
        self.used.add(name)
        given = captioned(row, self.column, self.how)
        if several_lines(given):
            self.several.append(name)
        return read(given, self.how, row.get("weight"))

    def _told(self, lines: list[Line], *, alone: bool) -> list[Read]:
        """What the lines of tables say of one picture; `alone`: nothing else says anything."""
        found = [read(line.caption, self.how, line.weight) for line in lines]
        self.several += [line.where for line in lines if several_lines(line.caption)]
        if self.how == "each" and found:
            reasons = [reason for _, reason in found if reason]
            captions = [caption for some, _ in found for caption in some]
            return [((), reasons[0]) if reasons else (merged(captions), "")]
        if alone and len({_texts(each) for each in found if not each[1]}) > 1:
            reason = (
                f"two captions: {lines[0].where} and {lines[-1].where} say different things; keep one, or "
                "have both with data.captions.lines each"
            )
            return [((), reason)]
        return found


def _texts(found: Read) -> frozenset[str]:
    return frozenset(caption.text for caption in found[0])


def captions_of(files: Files, column: str = COLUMN, how: Lines = "joined") -> Captions:
    """The captions among `files`; `column` is the tables' with the text, `how` as `data.captions.lines`.

    Raises `UserError` for a line of a table that cannot be read, and if a `column` is asked for by name and
    there is no table that has it.
    """
    found = Captions(files.found, how, column)
    for name in files.found:
        path, ending = posixpath.splitext(name)
        if ending.lower() in ENDINGS:
            found.beside.setdefault(same(path), []).append(name)
        elif ending.lower() == JSON and name.rpartition("/")[2].lower() not in TABLES:
            found.objects.setdefault(same(path), []).append(name)
    for name in tables_of(files):
        lines = read_table(files, name, column, how)
        if lines is not None:
            found.tables.add(name)
            for picture, line in lines:
                found.lines.setdefault(same(picture), []).append(line)
    if column != COLUMN and not found.objects and not _has(found, column):
        has = (
            "whose tables have no such column" if found.tables else f"which has no {METADATA} or metadata.csv"
        )
        raise UserError(f"data.caption_column {column!r} has no effect on {files.root}, {has}; remove it")
    return found


def _has(found: Captions, column: str) -> bool:
    return any(column in line.row for lines in found.lines.values() for line in lines)
