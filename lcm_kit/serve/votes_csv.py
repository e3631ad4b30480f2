"""Votes as CSV (RFC 4180, UTF-8), a row a vote, with all that is known of what was compared.

Text that a spreadsheet would take for a formula gets a `'` before it: at the start of a cell and, as some
spreadsheets part cells there, behind each semicolon. A `'` that stands in such a place gets one too, so that
taking one away from each place gives back what was written (`plain`).
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from lcm_kit.serve.store import SIDES, Pair

_SHARED = ("prompt", "negative_prompt", "seed", "width", "height")
_OWN = ("sampler", "steps", "guidance_scale", "adapters")
COLUMNS = (
    "id", "compared", "voted", "blind", "choice", "left_is", "chosen", "lcm_kit", "base", *_SHARED,
    *(f"{side}_{key}" for side in SIDES for key in (*_OWN, "sha256")),
)  # fmt: skip
_FORMULA = re.compile(r"(^|;)(?=\s*['=+\-@\uff1d\uff0b\uff0d\uff20])")  # the last four are wide ones
_DEFUSED = re.compile(r"(^|;)'")


def header() -> str:
    """The first line."""
    return _lines([COLUMNS])


def rows(pairs: Iterable[Pair]) -> str:
    """Lines of comparisons with their votes."""
    return _lines([[_cell(value) for value in _values(pair)] for pair in pairs])


def plain(cell: str) -> str:
    """The text that a cell stands for."""
    return _DEFUSED.sub(r"\1", cell)


def _values(pair: Pair) -> Iterable[Any]:
    asked, settings = pair.asked, pair.asked["settings"]
    yield from (pair.id, pair.created, pair.voted, pair.blind, pair.choice, pair.left_is, pair.chosen)
    yield from (asked["lcm_kit"], asked["base"])
    yield from (settings[key] for key in _SHARED)
    for record in (asked, pair.against):
        yield from (record["settings"][key] for key in _OWN)
        yield record["adapters"]


def _cell(value: Any) -> str:
    match value:
        case None:
            return ""
        case str():
            return _FORMULA.sub(r"\1'", value)
        case bool():
            return str(value).lower()
        case Mapping():
            return json.dumps(value)  # begins with a brace
    return repr(value)


def _lines(cells: Iterable[Iterable[str]]) -> str:
    written = io.StringIO()
    csv.writer(written).writerows(cells)
    return written.getvalue()
