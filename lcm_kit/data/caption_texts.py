"""What is said of one picture, in a file or in a cell of a table, as captions with weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from lcm_kit.io.written import tidied

Lines = Literal["joined", "first", "each"]  # what becomes of several lines, as data.captions.lines
_TEXT = ("text", "caption", "prompt")  # names of a caption within an entry of a list
_MOST = 1000  # captions of a picture: more is a file of something else
_LARGEST = 1e6  # of a weight


class Caption(NamedTuple):
    """One of a picture's captions. A step draws one of them by their weights, which need no sum."""

    text: str
    weight: float = 1.0


Read = tuple[tuple[Caption, ...], str]
"""Captions, and why there are none ("" if there are)."""


def several_lines(given: Any) -> bool:
    """Whether a text has more than one line with something on it."""
    return isinstance(given, str) and sum(bool(line.strip()) for line in given.splitlines()) > 1


def read(given: Any, lines: Lines = "joined", weight: Any = None) -> Read:
    """The tidied captions of a text, or of a list of texts or of `{"text": ..., "weight": ...}`.

    `weight`: of a whole text or list, from a column beside it; None or "" is 1. One of a list that is of no
    use is the fault of all: what would be passed over in silence was meant to be trained on.
    """
    factor = _weight(weight)
    if factor is None:
        return (), f"caption has a weight that is no positive number, {weight!r:.40}"
    entries = given if isinstance(given, list | tuple) else [given]
    if not entries:
        return (), "no caption"
    found: list[Caption] = []
    for entry in entries:
        some, reason = _entry(entry, lines)
        if reason:
            return (), reason if len(entries) == 1 else f"{reason} (of a list of {len(entries)})"
        found += some
    if len(found) > _MOST:
        return (), f"caption is too long: {len(found):,} of one picture, at most {_MOST:,}"
    return merged([Caption(text, each * factor) for text, each in found]), ""


def merged(captions: Sequence[Caption]) -> tuple[Caption, ...]:
    """The same with each text once, where it stands first, at the sum of its weights."""
    sums: dict[str, float] = {}
    for text, weight in captions:
        sums[text] = sums.get(text, 0.0) + weight
    return tuple(Caption(text, weight) for text, weight in sums.items())


def _entry(given: Any, lines: Lines) -> tuple[list[Caption], str]:
    weight = 1.0
    if isinstance(given, Mapping):
        found = _weight(given.get("weight"))
        if found is None:
            return [], f"caption has a weight that is no positive number, {given['weight']!r:.40}"
        weight = found
        named = [key for key in _TEXT if key in given]
        if len(named) != 1:
            return [], f"caption is not text but an entry with {len(named)} of {', '.join(_TEXT)}"
        given = given[named[0]]
    parts = [given]
    if lines != "joined" and several_lines(given):
        parts = [line for line in given.splitlines() if line.strip()]
        parts = parts[:1] if lines == "first" else parts
    tidy = [tidied(part) for part in parts]
    faults = [reason for _, reason in tidy if reason]
    return ([], faults[0]) if faults else ([Caption(text, weight) for text, _ in tidy], "")


def _weight(given: Any) -> float | None:
    """A weight as a table has it, a number or its digits; None if it is none."""
    if given is None or given == "":
        return 1.0
    if isinstance(given, bool) or not isinstance(given, int | float | str):
        return None
    try:
        weight = float(given)
    except (ValueError, OverflowError):
        return None
    return weight if math.isfinite(weight) and 0 < weight <= _LARGEST else None
