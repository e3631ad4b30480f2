"""A trigger in a prompt: whether it is said, the prompt with it, and the same prompt without it.

A trigger is a phrase, or several with commas between them (a merged LoRA has those of all its parts), which
a prompt says where it says every one of them. Words are compared without regard to case, as CLIP reads them.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from lcm_kit.data.words import WORD, words_of

_QUOTE = "[\"'\u2018\u2019\u201c\u201d]"
# What leads to a name and says nothing without it: "in the style of", "drawn by", "in a"
_LEADS = re.compile(
    r"(?:\b(?:drawn|painted|rendered|made|done)\s+)?"
    r"\b(?:in|of|by|with|using|after|like)\s+(?:(?:the|a|an)\s+)?(?:(?:art\s+)?style\s+of\s+)?(?:(?:the|a|an)\s+)?$",
    re.IGNORECASE,
)
_ARTICLE = re.compile(r"\b(?:the|a|an)\s+$", re.IGNORECASE)
_STYLE = re.compile(r"[\s_-]*\bstyled?\b", re.IGNORECASE)  # behind a name: "lumo style"
# A word that follows directly is what the trigger describes ("a lumo fish"), unless it is one of these.
_FOLLOWED = re.compile(
    r"\s+(?!(?:in|on|at|of|by|with|and|or|under|over|near|from|to|as|for|behind|beside|against)\b)\w",
    re.IGNORECASE,
)
# What a phrase that is taken out leaves behind, and what is put in its place, in turn
_LEFTOVERS = (
    (re.compile(r"[(\[{]\s*(?::\s*[\d.]*\s*)?[)\]}]"), ""),  # brackets, with the weight that apps read
    (re.compile(r"\s+"), " "),
    (re.compile(r" (?=[,;:.!?)\]}])"), ""),
    (re.compile(r"[,;](?:\s*[,;])+"), ","),
    (re.compile(r"([(\[{])\s*[,;:]\s*"), r"\1"),
    (re.compile(r"[,;](?=[:.)\]}])"), ""),
    (re.compile(r"^[\s,;:.|-]+|[\s,;:|-]+$"), ""),
)


class _Span(NamedTuple):
    start: int
    end: int


def says(prompt: str, trigger: str) -> bool:
    """Whether `prompt` says every phrase of `trigger`, or where that has no word, its signs."""
    return not _missing(prompt, trigger) if phrases(trigger) else trigger in prompt


def saying(prompt: str, trigger: str) -> str:
    """`prompt`, with those phrases of `trigger` in front that it does not say."""
    return ", ".join([*_missing(prompt, trigger), prompt])


def without(prompt: str, trigger: str) -> str:
    """`prompt` without the phrases of `trigger`, wherever they stand; as it is where it says none of them.

    What only leads to a phrase goes with it ("in the style of", "by", brackets with a weight, a comma), and
    "style" behind it. No other word is touched: "a lumo owl" becomes "a owl". "" where nothing else is said.
    """
    left = prompt
    for phrase in phrases(trigger):
        while span := _found(left, phrase):
            left = _taken_out(left, span)
    if left == prompt:
        return prompt
    before = None
    while before != left:
        before = left
        for leftover, instead in _LEFTOVERS:
            left = leftover.sub(instead, left)
    return left if WORD.search(left) else ""


def phrases(trigger: str) -> list[str]:
    """The phrases of a trigger, the longest first, so that none takes a part out of another."""
    found = [" ".join(phrase.split()) for phrase in trigger.split(",") if WORD.search(phrase)]
    return sorted(dict.fromkeys(found), key=lambda phrase: -len(words_of(phrase)))


def _missing(prompt: str, trigger: str) -> list[str]:
    return [phrase for phrase in phrases(trigger) if _found(prompt, phrase) is None]


def _found(prompt: str, phrase: str) -> _Span | None:
    """Where in `prompt` the words of `phrase` stand first, one after the other."""
    wanted, there = words_of(phrase), list(WORD.finditer(prompt))
    said = [word.group().lower() for word in there]
    for i in range(len(said) - len(wanted) + 1):
        if said[i : i + len(wanted)] == wanted:
            return _Span(there[i].start(), there[i + len(wanted) - 1].end())
    return None


def _taken_out(prompt: str, span: _Span) -> str:
    before, after = prompt[: span.start], prompt[span.end :]
    if re.search(f"{_QUOTE}$", before) and re.match(_QUOTE, after):
        before, after = before[:-1], after[1:]
    if behind := _STYLE.match(after):
        after = after[behind.end() :]
    if not _FOLLOWED.match(after):
        before = _ARTICLE.sub("", _LEADS.sub("", before))
    return f"{before} {after}"
