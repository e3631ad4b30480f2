"""Folders as kohya's trainer has them: `10_subject name`, ten times each picture of it an epoch.

What its code does (sd-scripts, `config_util.py` and `train_util.py`): of each folder directly below the one
that is given, the number before the first `_` is the repeats and the rest, as it is, the caption of pictures
without a caption file; folders without a number, or with 0, are passed over with a warning.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

_NAMED = re.compile(r"(\d+)_(.*\S.*)")
_USUAL = 200  # repeats; a larger number before `_` is more likely a year, a date or a size
_LARGEST = 10_000  # also where the layout is asked for: a mistake, or a way to wait for ever


@dataclass(frozen=True)
class Class:
    """A subfolder with repeats and the caption of pictures that have none."""

    folder: str
    repeats: int
    name: str


@dataclass(frozen=True)
class Layout:
    """What the names of subfolders say; `classes` by picture, empty where they say nothing."""

    classes: Mapping[str, Class] = field(default_factory=dict)
    faults: Mapping[str, str] = field(default_factory=dict)  # reasons by picture, where kohya is asked for
    doubtful: str = ""  # why folders that are named as kohya's are not taken for them; "" if none are


def layout_of(pictures: Sequence[str], wanted: Literal["auto", "kohya", "plain"]) -> Layout:
    """The layout of a folder with `pictures`, paths within it; a folder around all of them does not count."""
    if wanted == "plain":
        return Layout()
    begin = _around(pictures)
    folders = {picture: _folder(picture, begin) for picture in pictures}
    found = {folder: _NAMED.fullmatch(folder.removeprefix(begin)) for folder in set(folders.values())}
    if wanted == "auto":
        numbers = [named[1] for named in found.values() if named]
        if len(numbers) < len(found) or not numbers:
            return Layout()
        if doubt := _doubt(numbers):
            return Layout(doubtful=f"{', '.join(sorted(found)[:3])} {doubt}")
    classes = {
        folder: Class(folder, int(named[1]), named[2].strip())
        for folder, named in found.items()
        if named and 1 <= int(named[1][:9]) <= _LARGEST
    }
    return Layout(
        {picture: classes[folder] for picture, folder in folders.items() if folder in classes},
        {picture: _fault(folder) for picture, folder in folders.items() if folder not in classes},
    )


def _around(pictures: Sequence[str]) -> str:
    """The path, with `/` at its end, below which the folders of classes lie."""
    begin = ""
    while pictures:
        inside = {picture.removeprefix(begin).partition("/")[::2] for picture in pictures}
        first, rest = next(iter(inside))
        if len({name for name, _ in inside}) > 1 or not rest or _NAMED.fullmatch(first):
            break
        begin += f"{first}/"
    return begin


def _folder(picture: str, begin: str) -> str:
    """The folder directly below `begin` that a picture lies in; `begin` without its `/` if it lies there."""
    name, inside, _ = picture.removeprefix(begin).partition("/")
    return begin + name if inside else begin.rstrip("/")


def _doubt(numbers: Sequence[str]) -> str:
    """Why these numbers are more likely no repeats."""
    values = sorted(int(number[:9]) for number in numbers)
    if any(number.startswith("0") for number in numbers):
        return "begin with 0, as numbers that sort do"
    if len(values) > 1 and values == list(range(values[0], values[0] + len(values))):
        return "count on by one, as numbers that sort do"
    return "" if values[-1] <= _USUAL else f"begin with a number above {_USUAL}, as a year or a size is"


def _fault(folder: str) -> str:
    return (
        f"its folder {folder or '.'!r} has no name as 10_subject, with 1 to {_LARGEST:,} repeats, which "
        "data.captions.layout kohya asks for"
    )
