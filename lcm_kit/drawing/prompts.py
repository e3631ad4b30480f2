"""What a diffusers pipeline is told of prompts: their text, or embeddings where it would cut or misread it.

A pipeline cuts a prompt behind 75 tokens and knows no weights. Prompts with neither more nor weights go to it
as they are; of the others it gets the embeddings of all chunks (`bases.texts`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lcm_kit import bases, console, families
from lcm_kit.bases import Prompt
from lcm_kit.bases.condition import Condition, Framing, joined
from lcm_kit.bases.emphasis import notes, read
from lcm_kit.bases.texts import chunks_of
from lcm_kit.drawing.placed import place


class Told(NamedTuple):
    """What a pipeline's call takes for some prompts of a batch."""

    rows: list[int]  # which prompts these are
    keywords: dict[str, Any]


def as_read(
    prompts: Sequence[str], negative: str | None, emphasis: bool | None
) -> tuple[list[Prompt], Prompt | None]:
    """Prompts and the negative one as `emphasis.read` has them; what is to be said of brackets is said."""
    wanted = [read(prompt, emphasis) for prompt in prompts]
    against = None if negative is None else read(negative, emphasis)
    for note in notes([*prompts, negative or ""], emphasis):
        console.say(note, err=True)
    return wanted, against


def told(
    pipe: Any,
    prompts: Sequence[Prompt],
    negative: Prompt | None,
    guided: bool,
    chunks: int | None,
) -> Iterator[Told]:
    """Each of `prompts` once, those together that a pipeline can draw at once: as text, or of one length.

    So no picture hangs on how long the other prompts are. `negative` stands in the place of the empty prompt
    where `guided`. `chunks`: how many are read at most, as in `encode_text`; None: all.
    """
    family = family_of(pipe)
    readers = [
        (getattr(pipe, own), getattr(pipe, part))
        for own, part in zip(family.tokenizers, family.text_parts, strict=True)
    ]

    def length(prompt: Prompt) -> int:
        """In chunks; 0: a pipeline reads it as it is."""
        count = max(len(chunks_of(reader, prompt, chunks)) for reader in readers)
        return 0 if isinstance(prompt, str) and count == 1 else count

    plain = not guided or negative is None or length(negative) == 0
    groups: dict[int, list[int]] = {}
    for row, prompt in enumerate(prompts):
        groups.setdefault(length(prompt) if plain else max(length(prompt), 1), []).append(row)
    for count, rows in groups.items():
        some = [prompts[row] for row in rows]
        if count == 0:
            words = None if negative is None else [negative] * len(rows)
            yield Told(rows, {"prompt": some, "negative_prompt": words})
        else:
            yield Told(rows, _embedded(pipe, family, some, negative if guided else None, guided, chunks))


def family_of(pipe: Any) -> families.Family:
    """What a pipeline draws with."""
    there = [name for name, part in pipe.components.items() if part is not None]
    return families.by_pipeline(type(pipe).__name__, there)


def _text_of(pipe: Any, family: families.Family) -> Any:
    return bases.code_of(family).text_of(
        [getattr(pipe, part) for part in family.tokenizers],
        [getattr(pipe, part) for part in family.text_parts],
        bool(pipe.config.get("force_zeros_for_empty_prompt")),
    )


@torch.no_grad()
def conditions(
    pipe: Any, prompts: Sequence[Prompt], negative: Prompt | None, size: tuple[int, int]
) -> tuple[Condition, Condition]:
    """What the UNet is told of each prompt, and (B = 1) of `negative`, or of the empty one: of one length.

    With the sizes of a picture of (height, width) pixels that was not cut; where the pipeline is, in the
    dtype of its UNet. Long prompts are read whole.
    """
    family = family_of(pipe)
    code, text = bases.code_of(family), _text_of(pipe, family)
    told = code.encode_text(text, prompts, None)
    other = code.empty_condition(text, 1) if negative is None else code.encode_text(text, [negative], None)
    both = Condition.cat([told, other])
    sizes = code.sizes([Framing(size, (0, 0), size)] * len(both))
    both = replace(both, time_ids=sizes).to(*place(pipe))
    return both[: len(prompts)], both[len(prompts) :]


@torch.no_grad()
def _embedded(
    pipe: Any,
    family: families.Family,
    prompts: Sequence[Prompt],
    negative: Prompt | None,
    guided: bool,
    chunks: int | None,
) -> dict[str, Tensor]:
    code, text = bases.code_of(family), _text_of(pipe, family)
    asked = code.encode_text(text, prompts, chunks)
    if not guided:
        return _keywords(asked)
    n = len(prompts)
    if negative is None:
        other = code.empty_condition(text, n)
    else:
        other = code.encode_text(text, [negative], chunks).expand(n)
    both = joined([asked.embeds, other.embeds])  # of one length, as pipelines want them
    return {
        **_keywords(Condition(both[:n], asked.pooled)),
        **{f"negative_{name}": own for name, own in _keywords(Condition(both[n:], other.pooled)).items()},
    }


def _keywords(condition: Condition) -> dict[str, Tensor]:
    pooled = {} if condition.pooled is None else {"pooled_prompt_embeds": condition.pooled}
    return {"prompt_embeds": condition.embeds, **pooled}
