"""Captions on their way to tokens: straight quotes, and what is cut, in training and in pipelines alike."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from lcm_kit import bases, sample
from lcm_kit.bases.texts import chunks_of
from lcm_kit.bases.tokens import straightened, too_long
from lcm_kit.cli.check import check
from lcm_kit.config import schema
from lcm_kit.config.load import load
from lcm_kit.config.shipped import config_path
from lcm_kit.data import images
from lcm_kit.data.cache import Cache

CURLY = "the brand’s “new” look, it‘s „so“"
STRAIGHT = 'the brand\'s "new" look, it\'s "so"'


def test_curly_quotes_are_the_straight_ones_that_clip_knows() -> None:
    assert straightened(CURLY) == STRAIGHT
    assert straightened("Größe ¿qué? 日本 – a.b") == "Größe ¿qué? 日本 – a.b"
    base = bases.inspect_base("asset:tiny-sd")
    tokenizer = bases.load_tokenizer(base, "tokenizer")
    assert tokenizer(CURLY).input_ids == tokenizer(STRAIGHT).input_ids
    pipe = sample.pipeline("asset:tiny-sd")
    assert pipe.tokenizer(CURLY).input_ids == tokenizer(STRAIGHT).input_ids


def test_other_captions_embed_as_they_did() -> None:
    from transformers import CLIPTokenizer

    base = bases.inspect_base("asset:tiny-sd")
    plain = CLIPTokenizer.from_pretrained(base.folder / "tokenizer")
    captions = ["a red Fish  on a blue ground", "it's 3 o'clock, (really)", "crème brûlée", ""]
    assert bases.load_tokenizer(base, "tokenizer")(captions).input_ids == plain(captions).input_ids


@pytest.fixture
def config(tmp_path: Path) -> schema.Training:
    data = tmp_path / "pictures"
    data.mkdir()
    for k, text in enumerate(["short", "tag, " * 43 + "end", 'a "red" fish']):
        Image.new("RGB", (32, 32), (40 * k, 90, 90)).save(data / f"{k}.png")
        (data / f"{k}.txt").write_text(text)
    given = load(config_path("finetune/tiny_brand"))
    assert isinstance(given, schema.Training)
    own = replace(
        given.data, path=str(data), cache=str(tmp_path / "cache"), regularization=None,
        regularization_share=None,
    )  # fmt: skip
    prompts = replace(given.validation, prompts=None, control=None)
    return replace(given, data=own, validation=prompts)


def test_what_is_cut_is_counted_by_the_bases_own_tokenizer(
    config: schema.Training, capsys: pytest.CaptureFixture[str]
) -> None:
    base = bases.inspect_base(config.base.path)
    tokenizer = bases.load_tokenizer(base, "tokenizer")
    cut, most = too_long(bases.load_tokenizers(base), {"a": "short", "b": "tag, " * 43 + "end"})
    wanted = len(tokenizer("tag, " * 43 + "end", truncation=False).input_ids) - 2
    assert cut == {"b": wanted} and wanted > most
    cut_off = f"and the rest is cut off: 1.png ({wanted})."
    for chunks, words in (
        (1, f"1 caption has more tokens than the {most} that the base reads, {cut_off}"),
        (3, f"1 caption has more tokens than fit into 3 chunks of {most} (data.chunks), {cut_off}"),
        (8, ""),
    ):
        said = [line for line in check(replace(config, data=replace(config.data, chunks=chunks)))]
        told = [line.strip() for line in said if "cut off" in line]
        assert told == ([f"warning: {words}"] if words else []), chunks
    images.encode(config, progress=False)
    assert f"and the rest is cut off: 1.png ({wanted})" in capsys.readouterr().err


@pytest.mark.parametrize("chunks", [1, 2, 3, 8])
def test_what_is_said_to_be_cut_is_what_is_cut(chunks: int) -> None:
    """Longer by a word at a time, with and without commas: the first that is named is the first to lose."""
    base = bases.inspect_base("asset:tiny-sd")
    text = bases.load_text(base)
    for words in (["cat"] * 250, ["cat,"] * 125):
        said, _ = too_long(
            bases.load_tokenizers(base), {str(n): " ".join(words[:n]) for n in range(1, len(words))}, chunks
        )
        first = min(map(int, said))
        held = [
            sum(len(c.ids) for c in chunks_of(text, " ".join(words[:n]), chunks)) for n in (first - 1, first)
        ]
        tokens = [
            len(text.tokenizer(" ".join(words[:n]), verbose=False).input_ids) - 2 for n in (first - 1, first)
        ]
        assert held[0] == tokens[0] and held[1] < tokens[1] == said[str(first)]
        assert set(map(int, said)) == set(range(first, len(words)))


def test_a_cache_of_curly_quotes_is_one_of_straight_ones(config: schema.Training) -> None:
    """The same tokens, so the same rows: nothing is encoded again, and nothing was encoded otherwise."""
    images.encode(config, progress=False)
    base = bases.inspect_base(config.base.path)
    before = Cache.open(config.data.cache, base=base, data=config.data)
    embeds = before.condition([2]).embeds.clone()
    (Path(config.data.path) / "2.txt").write_text("a “red” fish")
    assert images.encode(config, progress=False).encoded == 0
    (Path(config.data.path) / "2.txt").write_text("a “blue” fish")
    assert images.encode(config, progress=False).encoded > 0
    after = Cache.open(config.data.cache, base=base, data=config.data)
    assert not torch.equal(after.condition([2]).embeds, embeds)
