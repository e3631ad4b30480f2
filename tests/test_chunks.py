"""Captions of more than one chunk: where they are cut, what encoders make of them, how lengths are joined."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from lcm_kit import bases, sample
from lcm_kit.adapter.adapted_unet import AdaptedUNet
from lcm_kit.adapter.text import Captions, TextLora
from lcm_kit.bases import chunks, sd, sdxl
from lcm_kit.bases.condition import Condition, joined
from lcm_kit.config.schema import Adapter, Base, Data, Distill
from lcm_kit.data.cache import Cache
from lcm_kit.data.encoder import Encoder
from lcm_kit.data.images import encode
from tests.small_roles import distill, linear_roles, two_samples

COMMA = 7
LENGTH, SIZE = 24, 22  # of the small bases' encoders, and of what a chunk holds: a token a letter
LONG = "a red fox jumps, over the lazy dog, in the snow, at night, by a long river, and far away"  # 5 chunks


def by_hand(tokens: Sequence[int], size: int, comma: int) -> list[list[int]]:
    """The rule of A1111, a token at a time: the chunk that is being filled, and where its last comma is."""
    done: list[list[int]] = []
    filling: list[int] = []
    last = None
    for token in tokens:
        if token != comma and len(filling) == size and last is not None and size - last <= 20:
            done.append(filling[: last + 1])
            filling, last = filling[last + 1 :], None
        if len(filling) == size:
            done.append(filling)
            filling, last = [], None
            if token == comma:  # it stands first in its chunk, which nothing can be moved out of
                filling.append(token)
                continue
        if token == comma:
            last = len(filling)
        filling.append(token)
    return [*done, filling] if filling or not done else done


def pieces(tokens: Sequence[int], size: int, most: int | None = None) -> list[list[int]]:
    return [list(tokens[part]) for part in chunks.slices(tokens, size, COMMA, most)]


@pytest.mark.parametrize("size", [22, 30, 75])
def test_chunks_are_those_of_a_slow_reference(size: int) -> None:
    draw = random.Random(size)
    seen = set()
    for _ in range(600):
        share = draw.choice((0.0, 0.02, 0.1, 0.4, 1.0))
        tokens = [COMMA if draw.random() < share else 1 for _ in range(draw.randrange(6 * size))]
        wanted = by_hand(tokens, size, COMMA)
        assert pieces(tokens, size) == wanted
        seen.add((len(wanted), any(len(each) < size for each in wanted[:-1])))
    assert {1, 2, 3, 4, 5, 6} <= {count for count, _ in seen} and (3, True) in seen and (3, False) in seen


@pytest.mark.parametrize(("comma", "lengths"), [(54, [75, 5]), (55, [56, 24]), (74, [75, 5]), (75, [75, 5])])
def test_a_comma_counts_within_twenty_tokens_of_the_end(comma: int, lengths: list[int]) -> None:
    tokens = [1] * 80
    tokens[comma] = COMMA
    assert [len(each) for each in pieces(tokens, 75)] == lengths


def test_the_last_chunk_that_is_allowed_is_filled() -> None:
    tokens = [1] * 60 + [COMMA] + [1] * 100
    assert [len(each) for each in pieces(tokens, 75)] == [61, 75, 25]
    assert [len(each) for each in pieces(tokens, 75, 2)] == [61, 75]
    assert pieces(tokens, 75, 1) == [tokens[:75]]  # as a pipeline cuts it
    assert pieces([], 75) == pieces([], 75, 1) == [[]]


def encoder_of(base: Path, part: str = "text_encoder") -> Any:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    kind = CLIPTextModelWithProjection if part == "text_encoder_2" else CLIPTextModel
    return kind.from_pretrained(base / part).eval()


def ids_of(text: Any, caption: str, pad: int | None = None) -> Tensor:
    """Of each chunk of a caption, by the slow reference: [k, 24]."""
    tokenizer = text.tokenizer
    tokens = tokenizer(caption, add_special_tokens=False).input_ids
    (comma,) = tokenizer(",", add_special_tokens=False).input_ids
    start, end = tokenizer("").input_ids
    rows = [[start, *each, end] for each in by_hand(tokens, SIZE, comma)]
    return torch.tensor([row + [end if pad is None else pad] * (LENGTH - len(row)) for row in rows])


def test_a_long_caption_is_the_embeddings_of_its_chunks(sd_base: Callable[..., Path]) -> None:
    """Each chunk by transformers alone; short captions are, bit for bit, what the pipeline makes of them."""
    base = sd_base()
    text, encoder = bases.load_text(bases.inspect_base(str(base))), encoder_of(base)
    ids = ids_of(text, LONG)
    assert len(ids) == 5
    with torch.no_grad():
        wanted = encoder(ids)[0]
    found = sd.encode_text(text, [LONG], None).embeds
    assert found.shape == (1, 5 * LENGTH, 32)
    torch.testing.assert_close(found, wanted.flatten(0, 1)[None], rtol=0, atol=1e-6)
    pipe = sample.pipeline(str(base))
    short = ["a red fox", "", "a, b, c", "abcdefghij klmnopqrstuv"]
    alone, _ = pipe.encode_prompt(short, "cpu", 1, False)
    assert torch.equal(sd.encode_text(text, short, 3).embeds, alone)
    beside = sd.encode_text(text, [*short, LONG[:30]], 3).embeds
    assert beside.shape == (5, 2 * LENGTH, 32)
    cut, _ = pipe.encode_prompt([*short, "a red fox jumps,"], "cpu", 1, False)  # what the first chunk holds
    assert torch.equal(beside[:, :LENGTH], cut)
    assert torch.equal(beside[:4, LENGTH:], cut[:4])  # the whole once more


@pytest.mark.parametrize(("most", "count"), [(1, 1), (2, 2), (3, 3), (4, 4), (5, 6), (8, 6)])
def test_a_caption_is_cut_behind_so_many_chunks(sd_base: Callable[..., Path], most: int, count: int) -> None:
    """5 chunks get an empty one more, as the captions of a batch may be of 1, 2, 3, 4, 6 and 8."""
    base = sd_base()
    text, encoder = bases.load_text(bases.inspect_base(str(base))), encoder_of(base)
    found = sd.encode_text(text, [LONG], most).embeds
    tokens = text.tokenizer(LONG, add_special_tokens=False).input_ids
    start, end = text.tokenizer("").input_ids
    rows = by_hand(tokens, SIZE, text.tokenizer.convert_tokens_to_ids(",</w>"))[: most - 1]
    rows += [tokens[sum(map(len, rows)) :][:SIZE], []][: count - len(rows)]
    padded = [[start, *row, end, *[end] * (SIZE - len(row))] for row in rows]
    with torch.no_grad():
        wanted = encoder(torch.tensor(padded))[0].flatten(0, 1)[None]
    assert found.shape == (1, count * LENGTH, 32)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


def test_sdxl_pads_each_encoder_its_own_way_and_pools_the_first_chunk(sdxl_base: Path) -> None:
    """The second tokenizer of the real one pads with token 0, here the letter a."""
    text = bases.load_text(bases.inspect_base(str(sdxl_base)))
    text.tokenizer_2.pad_token = "a"
    assert text.tokenizer_2.pad_token_id == 0 != text.tokenizer.pad_token_id
    found = sdxl.encode_text(text, ["a red fox", LONG], None)
    first, second = encoder_of(sdxl_base), encoder_of(sdxl_base, "text_encoder_2")
    for row, caption in enumerate(["a red fox", LONG]):
        with torch.no_grad():
            states = first(ids_of(text, caption), output_hidden_states=True).hidden_states[-2]
            output = second(ids_of(text, caption, pad=0), output_hidden_states=True)
        wanted = torch.cat([states, output.hidden_states[-2]], -1).flatten(0, 1)
        own = wanted.repeat(found.embeds.shape[1] // len(wanted), 1)
        torch.testing.assert_close(found.embeds[row], own, rtol=0, atol=1e-6)
        torch.testing.assert_close(found.pooled[row], output.text_embeds[0], rtol=0, atol=1e-6)


def test_a_caption_is_the_same_whatever_stands_beside_it(sd_base: Callable[..., Path]) -> None:
    """Encoded for a cache with others, or alone: but for how often it is repeated."""
    encoder = Encoder.load(bases.inspect_base(str(sd_base())), "cpu", vae=False, chunks=3)
    captions = ["a red fox", LONG[:30], LONG]
    whole = encoder.condition(captions, []).embeds
    assert whole.shape[1] == 6 * LENGTH
    for row, caption in enumerate(captions):
        alone = encoder.condition([caption], []).embeds
        assert alone.shape[1] == (1, 2, 3)[row] * LENGTH
        torch.testing.assert_close(
            whole[row : row + 1], alone.repeat(1, 6 // (row + 1), 1), rtol=0, atol=1e-6
        )


@pytest.mark.parametrize("most", [1, 2, 3, 5, 8])
def test_a_caption_is_what_its_text_and_its_count_make_it(sd_base: Callable[..., Path], most: int) -> None:
    """So a cache whose rows have both in their hashes keeps those that another limit leaves as they are."""
    base = bases.inspect_base(str(sd_base()))
    text, captions = bases.load_text(base), ["", "a red fox", LONG[:30], LONG, f"{LONG}, {LONG}"]
    tokenizers = bases.load_tokenizers(base)
    found = bases.counts(tokenizers, captions, most)
    assert found == [min(n, most) for n in (1, 1, 2, 5, 10)]
    assert bases.counts(tokenizers, [], most) == []
    for caption, count in zip(captions, found, strict=True):
        embeds = sd.encode_text(text, [caption], most).embeds
        assert embeds.shape[1] == LENGTH * chunks.rounded(count)
        assert torch.equal(embeds, sd.encode_text(text, [caption], count).embeds)


@pytest.mark.parametrize("shard_size", [1, 2, 256])
def test_a_cache_hands_out_rows_of_several_lengths_together(
    sd_base: Callable[..., Path], tmp_path: Path, shard_size: int
) -> None:
    """Whichever shards they lie in, in any order; a batch of one encoded picture at a time."""
    captions, folder = ["a red fox", LONG[:30], "at night", LONG], tmp_path / "pictures"
    folder.mkdir()
    for k, caption in enumerate(captions):
        Image.new("RGB", (64, 64), (40 * k, 90, 90)).save(folder / f"{k}.png")
        (folder / f"{k}.txt").write_text(caption)
    data = Data(
        path=str(folder), kind="folder", cache=str(tmp_path / "cache"), batch_size=1, shard_size=shard_size
    )
    info = bases.inspect_base(str(sd_base()))
    encode(Distill("train/distill", str(tmp_path / "run"), base=Base(info.path), data=data), progress=False)
    cache, text = Cache.open(data.cache, base=info, data=data), bases.load_text(info)
    for rows in ([0, 1, 2, 3], [3, 0], [2, 1, 2], [3], [0]):
        found = cache.condition(rows).embeds
        for place, row in enumerate(rows):
            alone = sd.encode_text(text, [cache.captions[row]], 3).embeds
            whole = alone.repeat(1, found.shape[1] // alone.shape[1], 1)
            torch.testing.assert_close(found[place : place + 1], whole, rtol=0, atol=1e-6)


def test_captions_that_are_encoded_live_have_the_same_chunks(sd_base: Callable[..., Path]) -> None:
    text = bases.load_text(bases.inspect_base(str(sd_base())))
    live = TextLora(sd, text, {}, chunks=2)
    captions = ["a red fox", LONG, None]
    told = Captions.of(captions, live).to("cpu", torch.float32).kwargs()["encoder_hidden_states"]
    wanted = sd.encode_text(text, ["a red fox", LONG, ""], 2).embeds
    assert told.shape == (3, 2 * LENGTH, 32) and torch.equal(told, wanted)
    assert Data().chunks == 3


# -- Lengths joined ------------------------------------------------------------------------------------------


def unet_of(base: Path) -> Any:
    return bases.load_unet(bases.inspect_base(str(base)))


def conditions(lengths: Sequence[int], width: int = 32) -> list[Condition]:
    g = torch.Generator().manual_seed(0)
    return [Condition(2 * torch.randn(1, n, width, generator=g)) for n in lengths]


@pytest.mark.parametrize("fast", [False, True])
def test_a_batch_of_several_lengths_is_drawn_as_each_alone(sd_base: Callable[..., Path], fast: bool) -> None:
    """By a UNet with a LoRA, diffusers' way and ours, which computes all keys and values once a pass."""
    adapted = AdaptedUNet(unet_of(sd_base()))
    lora = adapted.add_lora(Adapter(4, 4.0), seed=5)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in lora:
            p.add_(0.05 * torch.randn(p.shape, generator=g))
    if fast:
        assert adapted.make_fast()
    each = conditions([24, 48, 72])
    x, t = torch.randn(3, 4, 16, 16, generator=g), torch.tensor([10, 400, 900])
    whole = Condition.cat(each)
    assert whole.embeds.shape == (3, 144, 32)
    with torch.no_grad():
        alone = torch.cat(
            [adapted.unet(x[k : k + 1], t[k : k + 1], **each[k].kwargs()).sample for k in range(3)]
        )
    found = adapted.unet(x, t, **whole.kwargs()).sample
    torch.testing.assert_close(found.detach(), alone, rtol=0, atol=1e-5)
    first = torch.cat([c.embeds[:, :24] for c in each])
    with torch.no_grad():
        cut = adapted.unet(x, t, encoder_hidden_states=first).sample
    assert (cut - alone)[1:].abs().max() > 1e-3  # the later chunks are looked at
    found.square().mean().backward()
    gradient = torch.cat([p.grad.flatten() for p in lora if p.grad is not None])
    for p in lora:
        p.grad = None
    for k in range(3):
        (adapted.unet(x[k : k + 1], t[k : k + 1], **each[k].kwargs()).sample.square().mean() / 3).backward()
    wanted = torch.cat([p.grad.flatten() for p in lora if p.grad is not None])
    assert float((gradient - wanted).norm() / wanted.norm()) < 1e-5


def test_joined_repeats_whole_texts() -> None:
    a, b = torch.arange(4.0).view(1, 2, 2), torch.arange(6.0).view(1, 3, 2) + 10
    found = joined([a, b])
    assert found[0, :, 0].tolist() == [0, 2, 0, 2, 0, 2] and found[1, :, 0].tolist() == [10, 12, 14] * 2
    assert torch.equal(joined([a, a + 1]), torch.cat([a, a + 1]))
    left = Condition(a.expand(2, -1, -1)).replaced(torch.tensor([False, True]), Condition(b))
    assert torch.equal(left.embeds, found)


def test_guidance_asks_for_an_empty_text_of_the_captions_length() -> None:
    """The mean over a text is unchanged by repeating it, as attention is: the same guided answer."""
    roles, given = linear_roles(distill()), two_samples()
    wanted = roles.losses(given)
    text = Condition(given.condition.embeds.repeat(1, 2, 1))
    longer = type(given)(**{**vars(given), "condition": text})
    torch.testing.assert_close(roles.losses(longer), wanted)
