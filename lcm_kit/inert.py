"""Text of anybody's with every character that acts, instead of being seen, spelled out as in `\\x1b`."""

from __future__ import annotations

import re

# C0 and C1 but line ends and tabs, what turns or hides the text around it, and halves of a character
_ACTIVE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
_LINE_ENDS = re.compile("[\n\t\u2028\u2029]")  # of those that are left


def plain(text: object) -> str:
    """`str(text)` with every character that a terminal would act upon spelled out; it keeps its lines."""
    return _spelled(_ACTIVE, str(text).replace("\r\n", "\n"))


def line(text: object) -> str:
    """As `plain`, on one line: for a sentence, and for names within one or within a table."""
    return _spelled(_LINE_ENDS, plain(text))


def _spelled(signs: re.Pattern[str], text: str) -> str:
    return signs.sub(lambda found: repr(found[0])[1:-1], text)
