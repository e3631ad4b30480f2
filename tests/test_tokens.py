"""Captions on their way to tokens: straight quotes, and what is cut, in training and in pipelines alike."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from lcm_kit import bases, sample
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
    cut, most = too_long(base, {"a": "short", "b": "tag, " * 43 + "end"})
    wanted = len(tokenizer("tag, " * 43 + "end", truncation=False).input_ids) - 2
    assert cut == {"b": wanted} and wanted > most
    words = f"1 caption has more tokens than the {most} that the base reads, and the rest is cut off: 1.png"
    words += f" ({wanted})"
    assert any(words in line for line in check(config))
    images.encode(config, progress=False)
    assert f"the longest that of 1.png with {wanted}" in capsys.readouterr().err


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
