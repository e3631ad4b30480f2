"""Whose pictures they are: the licence, source, consent and author that metadata says of each.

They come from the lines of tables and from `NAME.json` beside `NAME.png`; from the columns of a data set. A
cache keeps a summary (`summary`), numbers alone; the list is made where somebody asks for it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import reduce
from pathlib import PurePosixPath
from typing import Any

from lcm_kit.data.caption_tables import Line, same
from lcm_kit.data.findings import Finding, Weight, few, number
from lcm_kit.data.folder_files import File
from lcm_kit.errors import UserError
from lcm_kit.io import licenses, own_shapes

COLUMNS = {
    "license": "license",
    "licence": "license",
    "source": "source",
    "consent": "consent",
    "author": "author",
}
_NO = ("no", "false", "0", "none", "refused", "denied", "not given", "pending", "unknown", "n/a")
_LARGEST = 1 << 20  # bytes of a JSON file beside a picture
_LONGEST = 1000  # characters of a cell


@dataclass(frozen=True)
class Rights:
    """What is said of one picture; None: nothing."""

    license: str | None = None  # as `licenses.normal`
    source: str | None = None
    consent: str | None = None
    author: str | None = None

    @staticmethod
    def of(row: Mapping[str, Any], but: Sequence[str] = ()) -> Rights:
        """What a line of a table, or a JSON object, says in the columns of `COLUMNS`, in any letter case.

        `but`: columns that hold something else.
        """
        found: dict[str, str] = {}
        for column, given in row.items():
            name = None if column in but else COLUMNS.get(str(column).lower())
            if name is None:
                continue
            if text := licenses.said(given) if name == "license" else _text(given):
                found.setdefault(name, text)
        return Rights(**found)

    def joined(self, other: Rights) -> Rights:
        """Both: of two licences that differ both hold; of the rest what is said first."""
        both = [each for each in (self.license, other.license) if each]
        rest = {name: getattr(self, name) or getattr(other, name) for name in ("source", "consent", "author")}
        return Rights(licenses.said(both), **rest)

    @property
    def consented(self) -> bool:
        """Whether consent is said to be there: in any words, but those that say no."""
        return self.consent is not None and not self.refused

    @property
    def refused(self) -> bool:
        """Whether it is said that there is none."""
        return self.consent is not None and self.consent.lower() in _NO

    def __bool__(self) -> bool:
        """Whether anything is said."""
        return any(getattr(self, each.name) for each in fields(self))


NOTHING = Rights()


def _text(given: Any) -> str | None:
    if isinstance(given, bool):
        return "yes" if given else "no"
    if isinstance(given, int | float):
        return str(given)
    if isinstance(given, list | dict):
        return json.dumps(given, ensure_ascii=False, default=str)[:_LONGEST] if given else None
    return " ".join(given.split())[:_LONGEST] or None if isinstance(given, str) else None


def columns_of(names: Iterable[str], but: Sequence[str]) -> list[str]:
    """Those of a table's columns that say something of rights, `but` those that hold something else."""
    return [name for name in names if name.lower() in COLUMNS and name not in but]


def of_columns(rows: Any, but: Sequence[str]) -> list[Rights]:
    """What each row of a data set says in its columns, `but` those that hold something else."""
    names = columns_of(rows.column_names, but)
    if not names:
        return [NOTHING] * len(rows)
    cells = [rows[name] for name in names]
    return [Rights.of(dict(zip(names, row, strict=True))) for row in zip(*cells, strict=True)]


class FolderRights:
    """The lines of a folder's tables, and its JSON files beside pictures: `a.json`, `a.png.json`."""

    def __init__(self, files: Mapping[str, File], lines: Mapping[str, Sequence[Line]]) -> None:
        """`files`: of the folder, by path; `lines`: of its tables, by the picture's path (`same`)."""
        self._files, self._lines = files, lines
        self.used: set[str] = set()  # JSON files that say something

    def of(self, picture: str) -> Rights:
        """What they say of a picture. A file that is no JSON object says nothing, and is not `used`."""
        found = NOTHING
        for name in (f"{picture}.json", str(PurePosixPath(picture).with_suffix(".json"))):
            if name in self._files and (said := self._read(name)):
                self.used.add(name)
                found = found.joined(said)
        lines = (Rights.of(line.row) for line in self._lines.get(same(picture), []))
        return reduce(Rights.joined, lines, found)

    def _read(self, name: str) -> Rights:
        try:
            row = json.loads(self._files[name].read(_LARGEST))
        except (OSError, UserError, ValueError, RecursionError):
            return NOTHING
        return Rights.of(row) if isinstance(row, dict) else NOTHING


def summary(told: Iterable[Rights]) -> own_shapes.Rights | None:
    """How many pictures say what; None if none of them says anything."""
    every = list(told)
    return _counted(every) if any(every) else None


def merged(parts: Sequence[tuple[own_shapes.Rights | None, int]]) -> own_shapes.Rights | None:
    """The summaries of several sets as one, each with the number of its pictures."""
    if all(each is None for each, _ in parts):
        return None
    found = [_counted([NOTHING] * count) if each is None else each for each, count in parts]
    names: Counter[str] = Counter()
    for each in found:
        names.update(each["licenses"])
    return {
        "pictures": sum(each["pictures"] for each in found),
        "licenses": _sorted(names),
        "source": sum(each["source"] for each in found),
        "consent": sum(each["consent"] for each in found),
        "refused": sum(each["refused"] for each in found),
        "author": sum(each["author"] for each in found),
    }


def _sorted(names: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(names.items(), key=lambda item: (-item[1], item[0])))


def _counted(every: Sequence[Rights]) -> own_shapes.Rights:
    return {
        "pictures": len(every),
        "licenses": _sorted(Counter(each.license for each in every if each.license)),
        "source": sum(each.source is not None for each in every),
        "consent": sum(each.consented for each in every),
        "refused": sum(each.refused for each in every),
        "author": sum(each.author is not None for each in every),
    }


def not_allowed(told: Mapping[str, Rights], among: Sequence[str]) -> str | None:
    """What is to be said of pictures, by id, whose licence is not one of `among`; None: nothing."""
    wrong = {id: each.license for id, each in told.items() if not licenses.allowed(each.license, among)}
    if not among or not wrong:
        return None
    named = few([f"{id} ({license or 'says none'})" for id, license in wrong.items()], 10)
    wanted = "any licence" if licenses.ANY in among else " or ".join(map(licenses.normal, among))
    return (
        f"{number(len(wrong), 'image', after=('lacks', 'lack'))} a licence that data.require_license allows "
        f"({wanted}): {named}; say it as `license` in a line of metadata.jsonl or in NAME.json beside the "
        "image, or take the image out"
    )


def all_allowed(found: own_shapes.Rights | None, pictures: int, among: Sequence[str]) -> bool:
    """Whether all of so many pictures name a licence that is one of `among`; none: yes."""
    names = found["licenses"] if found else {}
    said = sum(names.values()) == pictures
    return not among or (said and all(licenses.allowed(name, among) for name in names))


def findings(told: Mapping[str, Rights]) -> Iterator[Finding]:
    """What the check of pictures says of their rights, by id; nothing where no metadata says anything."""
    found = summary(told.values())
    if found is None:
        return
    names = [f"{count} {name}" for name, count in found["licenses"].items()]
    without = found["pictures"] - sum(found["licenses"].values())
    names += [f"{without} without one"] if without else []
    yield Finding(
        "note",
        f"Rights of {number(found['pictures'], 'image')}: licences {few(names, 8)}; {found['source']} name "
        f"their source, {found['author']} their author, {found['consent']} a consent.",
    )
    for term in licenses.TERMS:
        if ids := [id for id, each in told.items() if each.license and term in licenses.terms(each.license)]:
            weight: Weight = "note" if term == "share-alike" else "warning"
            yield Finding(
                weight,
                f"{number(len(ids), 'image', after=('has', 'have'))} a licence whose name says {term}: "
                f"{few(ids)}; the card and the file say so of what is trained on them.",
            )
    if ids := [id for id, each in told.items() if each.refused]:
        yield Finding(
            "warning",
            f"{number(len(ids), 'image', after=('says', 'say'))} that there is no consent: {few(ids)}; take "
            "them out, or ask.",
        )
