"""SDXL and UNets pruned from it (SSD-1B): two text encoders, pooled embeddings, sizes (arXiv:2307.01952).

The embeds are the second to last hidden states of both encoders side by side; the pooled embedding is the
second encoder's projection; the sizes are six numbers (`sizes`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lcm_kit.bases.base import text_layers
from lcm_kit.bases.condition import Condition, Framing
from lcm_kit.bases.emphasis import Prompt
from lcm_kit.bases.texts import Tokens, in_chunks


class Text(NamedTuple):
    """Both tokenizers and text encoders, and what an empty prompt stands for."""

    tokenizer: Any
    text_encoder: Any
    tokenizer_2: Any
    text_encoder_2: Any
    zeros_when_empty: bool


def text_of(tokenizers: Sequence[Any], encoders: Sequence[Any], zeros_when_empty: bool = False) -> Text:
    """What captions are encoded by."""
    return Text(tokenizers[0], encoders[0], tokenizers[1], encoders[1], zeros_when_empty)


def encode_text(text: Text, captions: Sequence[Prompt], chunks: int | None = 1) -> Condition:
    """The condition of B captions: embeds [B, k L, D1 + D2], pooled [B, P] of the first chunk; without sizes.

    Of up to `chunks` chunks, as `sd.encode_text`; by default as StableDiffusionXLPipeline.encode_prompt,
    clip_skip unset.
    """

    def encode(tokens: Sequence[Tokens]) -> Condition:
        first, second = tokens
        states = text.text_encoder(first.ids, output_hidden_states=True).hidden_states[-2]
        output = text.text_encoder_2(second.ids, output_hidden_states=True)
        both = [first.weighted(states), second.weighted(output.hidden_states[-2])]
        return Condition(torch.cat(both, dim=-1), output.text_embeds)

    readers = ((text.tokenizer, text.text_encoder), (text.tokenizer_2, text.text_encoder_2))
    return in_chunks(readers, captions, chunks, encode)


def empty_condition(text: Text, n: int) -> Condition:
    """The unconditional pass of guidance, n times: zeros where the base says so, else the caption ""."""
    empty = encode_text(text, [""])
    if text.zeros_when_empty and empty.pooled is not None:
        empty = Condition(torch.zeros_like(empty.embeds), torch.zeros_like(empty.pooled))
    return empty.expand(n)


def text_lora_targets(text: Text) -> dict[str, tuple[Any, list[str]]]:
    """Each text encoder by its part, and its modules that a LoRA adapts.

    Not the first encoder's last layer, whose output nobody sees: it would get no gradient. The second's is
    behind the pooled embedding.
    """
    return {
        "text_encoder": (text.text_encoder, text_layers(text.text_encoder, unseen=1)),
        "text_encoder_2": (text.text_encoder_2, text_layers(text.text_encoder_2)),
    }


def sizes(framings: Sequence[Framing]) -> Tensor:
    """time_ids [B, 6], float32: height and width of the original, top and left of the crop, of the target.

    Heights come before widths, and the crop's corner is that of the picture as it is seen: mirrored first.
    """
    rows = [[*f.original, *f.corner, *f.target] for f in framings]
    return torch.tensor(rows, dtype=torch.float32)
