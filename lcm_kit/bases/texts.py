"""Texts on their way through text encoders: tokens in chunks, their weights, one condition of all chunks.

`in_chunks` is what the families' `encode_text` share: a family says how one chunk becomes embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lcm_kit.bases import chunks
from lcm_kit.bases.condition import Condition, joined
from lcm_kit.bases.emphasis import Prompt
from lcm_kit.core.transfer import sent

_COMMA = ",</w>"  # one that stands alone, in CLIP's vocabulary
_ROUNDING = 1e-6  # of a mean in float32, by the size of what it is of
Reader = tuple[Any, Any]
"""A tokenizer, and the text encoder that reads its tokens."""


class Tokens(NamedTuple):
    """What an encoder takes of B chunks: ids [B, L], a mask where its configuration asks for one, weights."""

    ids: Tensor
    mask: Tensor | None
    weights: Tensor | None = None  # [B, L] float32; None: all are 1

    def weighted(self, states: Tensor) -> Tensor:
        """The encoder's `states` [B, L, D] times their tokens' weights, at the mean that each chunk had.

        As A1111 does it (modules/sd_emphasis.py, "Original"), in float32; without weights the same tensor. A
        mean that is rounding alone, as behind a layer norm that was never trained, is not one to return to.
        """
        if self.weights is None:
            return states
        own = states.float()
        heavier = own * self.weights[..., None].to(own.device)
        mean, spread = own.mean((1, 2), keepdim=True), own.square().mean((1, 2), keepdim=True).sqrt()
        ratio = torch.where(mean.abs() > _ROUNDING * spread, mean / heavier.mean((1, 2), keepdim=True), 1.0)
        changed = (self.weights != 1).any(1).view(-1, 1, 1).to(own.device)
        return torch.where(changed, heavier * ratio, own).to(states.dtype)


class Chunk(NamedTuple):
    """Tokens without start, end and padding, and their weights."""

    ids: Sequence[int] = ()
    weights: Sequence[float] = ()


Encode = Callable[[Sequence[Tokens]], Condition]
"""The condition of B chunks, of each reader's tokens of them: embeds [B, L, D], pooled [B, P] or None."""


def in_chunks(
    readers: Sequence[Reader], captions: Sequence[Prompt], most: int | None, encode: Encode
) -> Condition:
    """The condition of B captions of up to `most` chunks (None: as many as they take): embeds [B, k L, D].

    k: the least common multiple of their numbers of chunks, at most 24 where `most` is given
    (`chunks.rounded`). Pooled embeddings are the first chunk's. Captions of one chunk are encoded together,
    bit for bit as if none of them could have more.
    """
    if all(isinstance(caption, str) for caption in captions) and not _any_long(readers, captions, most):
        return encode([tokenize(*reader, [str(caption) for caption in captions]) for reader in readers])
    rows = [[chunks_of(reader, caption, most) for caption in captions] for reader in readers]
    counts = [max(map(len, each)) for each in zip(*rows, strict=True)]
    if most is not None:
        counts = [chunks.rounded(count) for count in counts]
    full = [[[*row, *[Chunk()] * (n - len(row))] for row, n in zip(own, counts, strict=True)] for own in rows]
    first = encode([_tokens(*r, [row[0] for row in own]) for r, own in zip(readers, full, strict=True)])
    if max(counts) == 1:
        return first
    rest = encode(
        [
            _tokens(*reader, [chunk for row in own for chunk in row[1:]])
            for reader, own in zip(readers, full, strict=True)
        ]
    ).embeds.split([count - 1 for count in counts])
    embeds = [
        torch.cat([own[None], later]).flatten(0, 1)[None]
        for own, later in zip(first.embeds, rest, strict=True)
    ]
    return replace(first, embeds=joined(embeds))


def tokenize(tokenizer: Any, encoder: Any, captions: Sequence[str]) -> Tokens:
    """Captions as one chunk each on the encoder's device, padded to L and cut there, as pipelines have it."""
    tokens = tokenizer(
        list(captions), padding="max_length", max_length=_length(tokenizer, encoder), truncation=True,
        return_tensors="pt",
    )  # fmt: skip
    return Tokens(
        sent(tokens.input_ids, encoder.device),
        sent(tokens.attention_mask, encoder.device) if _masked(encoder) else None,
    )


def chunks_of(reader: Reader, caption: Prompt, most: int | None = None) -> list[Chunk]:
    """The chunks of a caption, one at least; a prompt's BREAK ends one."""
    tokenizer, encoder = reader
    size, comma = _length(tokenizer, encoder) - 2, comma_of(tokenizer)
    if isinstance(caption, str):
        (ids,) = _ids(tokenizer, [caption])
        return [Chunk(ids[part], ()) for part in chunks.slices(ids, size, comma, most)]
    found: list[Chunk] = []
    for number, part in enumerate(caption.parts):
        rows = _ids(tokenizer, [span.text for span in part])
        ids = [token for row in rows for token in row]
        weights = [span.weight for span, row in zip(part, rows, strict=True) for _ in row]
        if not ids and found and number == len(caption.parts) - 1:
            break  # nothing stands behind the last BREAK
        left = None if most is None else most - len(found)
        if left == 0:
            break
        found += [Chunk(ids[p], weights[p]) for p in chunks.slices(ids, size, comma, left)]
    return found


def comma_of(tokenizer: Any) -> int | None:
    """The token of a comma that stands alone; None where a vocabulary has none."""
    found = tokenizer.convert_tokens_to_ids(_COMMA)
    return None if found in (None, tokenizer.unk_token_id) else int(found)


def _any_long(readers: Sequence[Reader], captions: Sequence[Any], most: int | None) -> bool:
    """Whether a plain caption has more tokens than one chunk holds, and may have more than one."""
    if most == 1:
        return False
    return any(
        len(row) > _length(tokenizer, encoder) - 2
        for tokenizer, encoder in readers
        for row in _ids(tokenizer, captions)
    )


def _ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of each text, all of them, without start and end."""
    rows: list[list[int]] = tokenizer(
        list(texts), add_special_tokens=False, truncation=False, padding=False, verbose=False
    ).input_ids
    return rows


def _tokens(tokenizer: Any, encoder: Any, rows: Sequence[Chunk]) -> Tokens:
    """Chunks as `tokenize` makes them of short captions: between start and end, padded to L."""
    length = _length(tokenizer, encoder)
    ids, mask, weights = [], [], []
    for row in rows:
        own = [tokenizer.bos_token_id, *row.ids, tokenizer.eos_token_id]
        rest = length - len(own)
        ids.append([*own, *[tokenizer.pad_token_id] * rest])
        mask.append([1] * len(own) + [0] * rest)
        heavy = row.weights or [1.0] * len(row.ids)
        weights.append([1.0, *heavy, *[1.0] * (rest + 1)])
    weighed = any(weight != 1 for row in weights for weight in row)
    return Tokens(
        sent(torch.tensor(ids), encoder.device),
        sent(torch.tensor(mask), encoder.device) if _masked(encoder) else None,
        torch.tensor(weights) if weighed else None,
    )


def _length(tokenizer: Any, encoder: Any) -> int:
    """L: how many tokens the encoder reads at once, start and end among them."""
    return int(min(tokenizer.model_max_length, encoder.config.max_position_embeddings))


def _masked(encoder: Any) -> bool:
    return bool(getattr(encoder.config, "use_attention_mask", False))
