r"""Weights in prompts, in the grammar of the app A1111 (1.10, modules/prompt_parser.py): `(word:1.2)`.

`(words)` weighs 1.1, `[words]` 1 / 1.1, `(words:1.3)` 1.3; brackets multiply what stands in them. `\(` is a
bracket of the text. `BREAK` ends a chunk. What weights do to embeddings says `texts.Tokens.weighted`.

Captions, and prompts that ask for none of this, are plain text: `a cat (sitting)` has brackets, not weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lcm_kit.errors import UserError

_ROUND, _SQUARE = 1.1, 1 / 1.1
_PIECE = re.compile(
    r"(?P<escaped>\\[()\[\]\\])|(?P<backslash>\\)|(?P<opens>[(\[])"
    r"|:\s*(?P<weight>[+-]?[.\d]+)\s*\)|(?P<closes>[)\]])|(?P<later>:\s*[.\d]+\s*(?=\]))|(?P<text>[^\\()\[\]:]+|:)"
)
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)")
_BREAK = re.compile(r"\s*\bBREAK\b\s*")
# What A1111 makes of a prompt besides weights, which nothing here does
_OTHERS = {
    r"\bAND\b": "AND, which draws by several prompts at once, is not known here",
    r"<\w+:[^<>]*>": "<...>, which loads another file, is not known here",
}


class Span(NamedTuple):
    """Words of one weight."""

    text: str
    weight: float


@dataclass(frozen=True)
class Weighted:
    """A prompt with weights: its spans, in the parts that BREAK sets apart."""

    parts: tuple[tuple[Span, ...], ...]

    @property
    def text(self) -> str:
        """Its words alone."""
        return " ".join("".join(span.text for span in part) for part in self.parts)


Prompt = str | Weighted
"""What is drawn: plain text, or a prompt that has been read."""


def read(prompt: str, wanted: bool | None = None) -> Prompt:
    r"""The prompt as it is to be drawn; plain text where it has no weights.

    `wanted` None: it is read if it has what plain text has not, a weight with its number, as in
    `(word:1.2)`, or an escaped bracket, `\(`; then all of its brackets count. True: it is read in any case.
    False: it is plain text. Raises `UserError` for what A1111 reads besides weights, in what is read.
    """
    if wanted is False:
        return prompt
    found = _Reading(prompt)
    if wanted is None and not found.explicit:
        return prompt
    if found.refused:
        raise UserError(
            f"prompt {prompt!r}: {found.refused}; leave it out (`lcm-kit sample --no-emphasis` draws it as "
            "it stands)"
        )
    plain = len(found.parts) == 1 and all(span.weight == 1 for span in found.parts[0])
    return "".join(span.text for span in found.parts[0]) if plain else Weighted(found.parts)


def words(prompt: Prompt) -> str:
    """What a prompt says, without weights."""
    return prompt if isinstance(prompt, str) else prompt.text


def notes(prompts: Sequence[str], wanted: bool | None = None) -> Iterator[str]:
    """What is to be said of `prompts` that `read` decides on: how their brackets are taken."""
    if wanted is not None:
        return
    marked = [(prompt, _Reading(prompt)) for prompt in dict.fromkeys(prompts)]
    taken = [prompt for prompt, found in marked if found.explicit]
    left = [prompt for prompt, found in marked if not found.explicit and found.weighs]
    if taken:
        yield f"read with its brackets as weights, as apps read it: {_few(taken)}"
    if left:
        yield (
            f"drawn with its brackets or BREAK as they stand, where apps read weights: {_few(left)}; if they "
            "are meant so, give one its number, as in (word:1.1)"
        )


def _few(prompts: Sequence[str]) -> str:
    return f"{prompts[0]!r}" + (f" and {len(prompts) - 1} more" if prompts[1:] else "")


class _Reading:
    """A prompt taken apart."""

    def __init__(self, prompt: str) -> None:
        self.explicit = False  # whether it has what no plain text has
        self.refused: str | None = None  # the first thing that is not weights
        self._spans: list[tuple[str | None, float]] = []  # None: a BREAK
        self._open: dict[str, list[int]] = {"(": [], "[": []}  # where in the spans each open bracket stands
        self._prompt = prompt
        for match in _PIECE.finditer(prompt):
            self._take(match)
        for bracket, starts in self._open.items():  # one that is never closed reaches to the end
            for start in starts:
                self._weigh(start, _ROUND if bracket == "(" else _SQUARE)
        for pattern, what in _OTHERS.items():
            if re.search(pattern, prompt):
                self._refuse(what)

    @property
    def parts(self) -> tuple[tuple[Span, ...], ...]:
        """Neighbours of one weight as one: they are one text for the tokenizer."""
        found: list[list[Span]] = [[]]
        for text, weight in self._spans:
            if text is None:
                found.append([])
            elif found[-1] and found[-1][-1].weight == weight:
                found[-1][-1] = Span(found[-1][-1].text + text, weight)
            else:
                found[-1].append(Span(text, weight))
        return tuple(map(tuple, found))

    @property
    def weighs(self) -> bool:
        """Whether reading it makes another prompt of it than its plain text."""
        return self.parts != ((Span(self._prompt, 1.0),),) and self._prompt != ""

    def _take(self, match: re.Match[str]) -> None:
        piece, kind, weight = match[0], match.lastgroup, match["weight"]
        if kind == "escaped":
            self.explicit = self.explicit or piece != "\\\\"
            self._spans.append((piece[1], 1.0))
        elif kind == "opens":
            self._open[piece].append(len(self._spans))
        elif weight is not None and self._open["("]:
            self._number(weight)
        elif kind == "closes" and (starts := self._open["(" if piece == ")" else "["]):
            self._weigh(starts.pop(), _ROUND if piece == ")" else _SQUARE)
        elif kind != "backslash":  # which A1111 drops
            if self._open["["] and (kind == "later" or "|" in piece):
                self._refuse("[a:b:0.5] and [a|b], which change it from step to step, are not known here")
            self._add(piece)

    def _add(self, text: str) -> None:
        first, *others = _BREAK.split(text)
        self._spans.append((first, 1.0))
        for other in others:
            self._spans += [(None, 1.0), (other, 1.0)]

    def _weigh(self, start: int, weight: float) -> None:
        self._spans[start:] = [(text, own * weight) for text, own in self._spans[start:]]

    def _number(self, weight: str) -> None:
        start = self._open["("].pop()
        if _NUMBER.fullmatch(weight):
            self.explicit = True
            self._weigh(start, float(weight))
        else:
            self._refuse(f"{weight} is no number that a word can weigh")
            self._weigh(start, _ROUND)

    def _refuse(self, what: str) -> None:
        self.refused = self.refused or what
