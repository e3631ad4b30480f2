"""Stable Diffusion 1.x and 2.x: one text encoder, whose last hidden state is the whole condition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from lcm_kit.bases.base import text_layers
from lcm_kit.bases.condition import Condition
from lcm_kit.bases.emphasis import Prompt
from lcm_kit.bases.texts import Tokens, in_chunks


class Text(NamedTuple):
    """A tokenizer and its text encoder."""

    tokenizer: Any
    text_encoder: Any


def text_of(tokenizers: Sequence[Any], encoders: Sequence[Any], zeros_when_empty: bool = False) -> Text:
    """What captions are encoded by; an empty one is always encoded."""
    return Text(tokenizers[0], encoders[0])


def encode_text(text: Text, captions: Sequence[Prompt], chunks: int | None = 1) -> Condition:
    """The condition of B captions: embeds [B, k L, D], the text encoder's last hidden state of each chunk.

    Of up to `chunks` chunks of L tokens (`texts.in_chunks`), beyond which they are cut; by default as
    StableDiffusionPipeline cuts them. They have a gradient where a weight of the encoder has
    (`lcm_kit.adapter.text`); none of `bases.load_text`'s has.
    """

    def encode(tokens: Sequence[Tokens]) -> Condition:
        (own,) = tokens
        return Condition(own.weighted(text.text_encoder(own.ids, attention_mask=own.mask)[0]))

    return in_chunks([(text.tokenizer, text.text_encoder)], captions, chunks, encode)


def empty_condition(text: Text, n: int) -> Condition:
    """The condition of classifier-free guidance's unconditional pass, n times: the caption ""."""
    return encode_text(text, [""]).expand(n)


def text_lora_targets(text: Text) -> dict[str, tuple[Any, list[str]]]:
    """Each text encoder by its part, and its modules that a LoRA adapts."""
    return {"text_encoder": (text.text_encoder, text_layers(text.text_encoder))}


def sizes(framings: Sequence[object]) -> None:
    """SD's UNet is told nothing of sizes."""
    return None
