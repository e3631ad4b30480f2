"""What the check of a folder says: sentences of three weights, and how they name files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

_NAMED = 3  # files that a sentence names; more are counted


Weight = Literal["error", "warning", "note"]


class Finding(NamedTuple):
    """One sentence. `error`: `encode` would stop; `warning`: worth fixing first; `note`: good to know."""

    weight: Weight
    sentence: str


def few(names: Sequence[str], limit: int = _NAMED, of: int | None = None) -> str:
    """The first names and how many more there are, `of` so many: `a, b, c and 4 more`."""
    count = len(names) if of is None else of
    more = f" and {count - limit} more" if count > limit else ""
    return ", ".join(names[:limit]) + more


def groups(found: Iterable[Sequence[str]]) -> str:
    """Groups of names that belong together: `a = b = c; d = e; and 2 more groups`."""
    written = [
        " = ".join(names[:4]) + (f" = {len(names) - 4} more" if len(names) > 4 else "") for names in found
    ]
    more = f"; and {len(written) - _NAMED} more groups" if len(written) > _NAMED else ""
    return "; ".join(written[:_NAMED]) + more


def number(
    count: int, noun: str, before: tuple[str, str] | None = None, after: tuple[str, str] | None = None
) -> str:
    """`1 image`, `3 images`; with verbs (singular, plural) also `are 3 images`, `1 image is`."""
    one = count == 1
    words = [before[not one]] if before else []
    words += [str(count), noun if one else f"{noun}s"]
    return " ".join(words + ([after[not one]] if after else []))
