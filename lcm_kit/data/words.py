"""The words of a caption, as far as captions are compared: without case, which CLIP's tokenizer lowers."""

from __future__ import annotations

import re
from collections.abc import Sequence

# Chinese, Japanese and Korean put no spaces between words: there a sign counts as one.
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W_\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")


def words_of(caption: str) -> list[str]:
    """The words, in lower case."""
    return [word.lower() for word in WORD.findall(caption)]


def contains(words: Sequence[str], wanted: Sequence[str]) -> bool:
    """Whether the words `wanted` follow one another in `words`."""
    n = len(wanted)
    return any(list(words[i : i + n]) == list(wanted) for i in range(len(words) - n + 1))
