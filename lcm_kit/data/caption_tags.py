"""What is made of captions before they are encoded: the trigger in front, and other orders of their tags.

Tags are the parts between commas. All of it is a function of the caption alone: no seed, no order of
pictures, so that the same picture has the same captions in every cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from lcm_kit.config.data import Captions, Data
from lcm_kit.data.caption_texts import Caption, Read, merged, read
from lcm_kit.data.trigger import says
from lcm_kit.io.files import sha256_bytes

_TRIES = 20  # draws for each order that is wanted: of few tags there are few, and the same comes again


class Tags(NamedTuple):
    """A caption's tags: those that stay in front, those that may be moved, those that stay at the end."""

    front: Sequence[str]
    moved: Sequence[str]
    end: Sequence[str]

    @property
    def text(self) -> str:
        """The caption that they make."""
        return ", ".join([*self.front, *self.moved, *self.end])


def tags_of(caption: str) -> list[str]:
    """The parts between commas, without those that are empty."""
    return [tag for part in caption.split(",") if (tag := part.strip())]


def prepared(captions: Sequence[Caption], how: Captions, trigger: str | None) -> tuple[Caption, ...]:
    """The captions of a picture as they are encoded, the written ones first.

    Of a caption in several orders each has an equal part of its weight. `trigger`: None for pictures that
    are not of the style.
    """
    if how.trigger_in_front and trigger is not None:
        captions = merged([Caption(in_front(text, trigger), weight) for text, weight in captions])
    if not how.shuffle_tags:
        return tuple(captions)
    each = [_in_orders(caption, how, trigger) for caption in captions]
    return merged([*(orders[0] for orders in each), *(one for orders in each for one in orders[1:])])


def of_cell(given: Any, data: Data, weight: Any = None) -> Read:
    """The captions of what a table, a stream or a data set has for a picture, as they are encoded."""
    told, reason = read(given, data.captions.lines, weight)
    return prepared(told, data.captions, data.trigger), reason


def in_front(caption: str, trigger: str) -> str:
    """`trigger, caption`; the caption itself where it has the trigger's words anywhere."""
    return caption if says(caption, trigger) else f"{trigger}, {caption}"


def split(caption: str, how: Captions, trigger: str | None = None) -> Tags:
    """Which tags of a caption stay where they are.

    The first `how.keep_tokens`, and the trigger's wherever it is in front; where the caption has
    `how.keep_separator` those before it and those after a second one instead.
    """
    if how.keep_separator and how.keep_separator in caption:
        front, _, rest = caption.partition(how.keep_separator)
        moved, _, end = rest.partition(how.keep_separator)
        return Tags(tags_of(front), tags_of(moved), tags_of(end.replace(how.keep_separator, ",")))
    tags = tags_of(caption)
    named = tags_of(trigger or "")
    begins = [tag.lower() for tag in tags[: len(named)]] == [tag.lower() for tag in named]
    keep = max(how.keep_tokens, len(named) if begins else 0)
    return Tags(tags[:keep], tags[keep:], [])


def _in_orders(caption: Caption, how: Captions, trigger: str | None) -> list[Caption]:
    found = list(_orders(split(caption.text, how, trigger), caption.text, how.shuffle_tags))
    return [Caption(text, caption.weight / len(found)) for text in found]


def _orders(tags: Tags, caption: str, count: int) -> Iterator[str]:
    """The caption as written, and up to `count` other orders of its tags, each once.

    Order k is by the hash of caption, k and each tag's place: as good as drawn, and always the same.
    """
    yield tags.text or caption
    seen = {tuple(tags.moved)}
    most = min(count, _different(len(tags.moved)) - 1)
    for k in range(_TRIES * count):
        if len(seen) > most:
            return
        places = sorted(range(len(tags.moved)), key=lambda place: _key(caption, k, place))
        moved = tuple(tags.moved[place] for place in places)
        if moved not in seen:
            seen.add(moved)
            yield tags._replace(moved=moved).text


def _different(tags: int) -> int:
    """How many orders so many tags have, as far as it matters."""
    return math.factorial(min(tags, 8))


def _key(caption: str, variant: int, place: int) -> str:
    return sha256_bytes(f"{variant}/{place}/{caption}".encode())
