"""Stable Diffusion 1.x and 2.x: one text encoder, whose last hidden state is the whole condition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from lcm_kit.bases.base import text_layers
from lcm_kit.bases.condition import Condition
from lcm_kit.core.transfer import sent


class Text(NamedTuple):
    """A tokenizer and its text encoder."""

    tokenizer: Any
    text_encoder: Any


def text_of(tokenizers: Sequence[Any], encoders: Sequence[Any], zeros_when_empty: bool = False) -> Text:
    """What captions are encoded by; an empty one is always encoded."""
    return Text(tokenizers[0], encoders[0])


class Tokens(NamedTuple):
    """What an encoder takes: ids [B, L], and a mask where its configuration asks for one."""

    ids: Tensor
    mask: Tensor | None


def tokenize(tokenizer: Any, encoder: Any, captions: Sequence[str]) -> Tokens:
    """Captions as tokens on the encoder's device, padded to L and cut there."""
    length = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
    tokens = tokenizer(
        list(captions), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    )
    masked = getattr(encoder.config, "use_attention_mask", False)
    return Tokens(
        sent(tokens.input_ids, encoder.device),
        sent(tokens.attention_mask, encoder.device) if masked else None,
    )


def encode_text(text: Text, captions: Sequence[str]) -> Condition:
    """The condition of B captions: embeds [B, L, D], the text encoder's last hidden state.

    Captions longer than L tokens are cut there, as in StableDiffusionPipeline. They have a gradient where a
    weight of the encoder has (`lcm_kit.adapter.text`); none of `bases.load_text`'s has.
    """
    ids, mask = tokenize(text.tokenizer, text.text_encoder, captions)
    return Condition(text.text_encoder(ids, attention_mask=mask)[0])


def empty_condition(text: Text, n: int) -> Condition:
    """The condition of classifier-free guidance's unconditional pass, n times: the caption ""."""
    return encode_text(text, [""]).expand(n)


def text_lora_targets(text: Text) -> dict[str, tuple[Any, list[str]]]:
    """Each text encoder by its part, and its modules that a LoRA adapts."""
    return {"text_encoder": (text.text_encoder, text_layers(text.text_encoder))}


def sizes(framings: Sequence[object]) -> None:
    """SD's UNet is told nothing of sizes."""
    return None
