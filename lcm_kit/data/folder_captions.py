"""The check of a folder's captions: what is missing, says nothing, or says what no caption should."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath

from lcm_kit.config.data import Data
from lcm_kit.data.caption_files import Bad
from lcm_kit.data.findings import Finding, few, number
from lcm_kit.data.image_files import SUFFIXES
from lcm_kit.data.trigger import says
from lcm_kit.data.words import contains, words_of

_SHORT = 3  # words: fewer than these
_CHUNK = (
    75  # tokens that CLIP reads at once; English takes about 1.25 a word, and one for a comma or the like
)
_LONG = _CHUNK * Data.chunks
_ALIKE = 5  # captions: of fewer, nothing is said about what most of them share
_MOST = 0.6  # of the captions have a phrase that is likely meant for all
_PHRASE = 4  # words of the longest phrase that is looked for

_MARK = re.compile(r"[^\w\s]")
_FILLERS = frozenset(
    ["a", "an", "the", "of", "on", "in", "at", "by", "to", "and", "or", "with", "for", "from", "is", "as"]
)
_CAMERA = r"(?:img|image|dsc|dscn|dscf|pxl|mvimg|gopr|dji|screenshot|screen shot|whatsapp image)"
_JUNK = re.compile(
    rf"\b{_CAMERA}[ _-]?\d{{3,}}|\bp\d{{6,}}|\b[0-9a-f]{{12,}}\b|[\w-]+\.(?:{'|'.join(end[1:] for end in SUFFIXES)})\b|https?://",
    re.IGNORECASE,
)

# How `records.py` begins its reasons, what each means for many images, and what to do.
_REASONS = (
    (
        "no caption",
        "{} no caption",
        "write one into a .txt file of the same name, or a line in metadata.jsonl",
    ),
    ("empty caption", "{} an empty caption", "write down what the picture shows"),
    ("caption is not text", "{} a caption in metadata.jsonl that is not text", "put it in quotes"),
    ("caption file", "{} a caption file that cannot be read", "save it as plain text in UTF-8"),
    ("caption is too long", "{} a caption that is no caption but a text of its own", "write one sentence"),
    ("caption holds", "{} a caption with control characters", "take them out"),
    ("two captions", "{} two captions that differ in the same table", "keep one"),
)


def unusable(bad: Sequence[Bad]) -> Iterator[str]:
    """One sentence for each way in which captions are of no use; `bad` as `open_records` gives it."""
    rest = dict(bad)
    for begins, what, act in _REASONS:
        ids = [id for id, reason in rest.items() if reason.startswith(begins)]
        if ids:
            has = number(len(ids), "image", after=("has", "have"))
            yield f"{what.format(has)}: {few(ids)}; {act}."
        for id in ids:
            del rest[id]
    named = [id for id, reason in rest.items() if reason.startswith("is named in ")]
    for table in sorted({_table(rest[id]) for id in named}):
        ids = [id for id in named if _table(rest[id]) == table]
        there = number(len(ids), "image", after=("is", "are"))
        yield f"{there} named in {table} but not there: {few(ids)}; fix the names or the lines."
    if others := [f"{id} ({reason})" for id, reason in rest.items() if id not in named]:
        cannot = number(len(others), "file or folder", after=("cannot", "cannot"))
        yield f"{cannot} be looked at: {few(others)}; put it right, or remove it."


def _table(reason: str) -> str:
    return reason.removeprefix("is named in ").partition(",")[0]


def findings(captions: Mapping[str, str], trigger: str | None, *, estimate: bool = True) -> Iterator[Finding]:
    """What is worth saying about usable captions, by the id of their image.

    `estimate`: also which are likely to be cut; where the base is known, its tokenizer counts instead.
    """
    words = {id: words_of(caption) for id, caption in captions.items()}
    yield from _junk(captions)
    if len(captions) > 1 and len(set(captions.values())) == 1:
        same = next(iter(captions.values()))
        yield Finding(
            "warning",
            f"All {len(captions)} captions are the same ({_quoted(same)}), so all that is in "
            "the pictures is learned under one name; describe what each of them shows.",
        )
    else:
        yield from _short(captions, words)
    long = [id for id, caption in captions.items() if _tokens(caption, len(words[id])) > _LONG]
    if long and estimate:
        yield Finding(
            "note",
            f"{number(len(long), 'caption')} of more than about {_LONG} tokens: {few(long)}; a text encoder "
            f"reads {Data.chunks} times {_CHUNK} of them, unless data.chunks says otherwise (short words, "
            "pieces of long ones, commas), and the rest is cut off.",
        )
    yield from _trigger(captions, trigger) if trigger else _most(words)


def _tokens(caption: str, words: int) -> float:
    """About how many tokens the caption takes; `check CONFIG` counts them with the base's own tokenizer."""
    return 1.25 * words + len(_MARK.findall(caption))


def _quoted(text: str) -> str:
    return f'"{text}"' if len(text) <= 60 else f'"{text[:57]}..."'


def _junk(captions: Mapping[str, str]) -> Iterator[Finding]:
    """File names in captions, as tools leave them that fill in what is missing."""
    found = {
        id: caption for id, caption in captions.items() if _JUNK.search(caption) or _is_name(id, caption)
    }
    if found:
        id, caption = next(iter(found.items()))
        what = number(len(found), "caption", after=("holds", "hold"))
        yield Finding(
            "warning",
            f"{what} a file name, number or address: {few(list(found))} ({id}: {_quoted(caption)}); the "
            "model learns it as a word, so take it out.",
        )


def _is_name(id: str, caption: str) -> bool:
    """Whether the caption is only the image's file name, and that is more than words."""
    stem = PurePosixPath(id).stem
    return caption.lower() == stem.lower() and not stem.replace(" ", "").isalpha()


def _short(captions: Mapping[str, str], words: Mapping[str, Sequence[str]]) -> Iterator[Finding]:
    found = [id for id, each in words.items() if len(each) < _SHORT]
    if found:
        what = number(len(found), "caption", after=("has", "have"))
        yield Finding(
            "warning",
            f"{what} fewer than {_SHORT} words: {few(found)} ({found[0]}: {_quoted(captions[found[0]])}); "
            "say what is seen: what is left unsaid is learned as part of the style.",
        )


def _trigger(captions: Mapping[str, str], trigger: str) -> Iterator[Finding]:
    """Captions without the trigger. Case does not matter: CLIP's tokenizer lowers it."""
    without = [id for id, caption in captions.items() if not says(caption, trigger)]
    if without:
        lack = number(len(without), "caption", after=("lacks", "lack"))
        yield Finding(
            "warning",
            f"{lack} the trigger {trigger!r} (of {len(captions)}): {few(without)}; add it, so that the style "
            "is learned under one name.",
        )


def _most(words: Mapping[str, Sequence[str]]) -> Iterator[Finding]:
    """The longest of the phrases that the most captions have, but not all: perhaps meant for all."""
    total = len(words)
    counted = Counter(phrase for each in words.values() for phrase in _phrases(each))
    some = [(n, len(phrase), phrase) for phrase, n in counted.items() if _MOST * total <= n < total]
    if total < _ALIKE or not some:
        return
    count, _, phrase = max(some)
    without = [id for id, each in words.items() if not contains(each, phrase)]
    yield Finding(
        "note",
        f'{count} of {total} captions have "{" ".join(phrase)}", and not {few(without)}; if it '
        "names the style, let all have it.",
    )


def _phrases(words: Sequence[str]) -> set[tuple[str, ...]]:
    """Every run of up to `_PHRASE` words that neither begins nor ends with a filler."""
    runs = {
        tuple(words[i : i + n]) for n in range(1, _PHRASE + 1) for i in range(len(words) - n + 1)
    }  # fmt: skip
    return {run for run in runs if run[0] not in _FILLERS and run[-1] not in _FILLERS}
