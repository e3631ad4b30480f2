"""`data.source: prompts`: rows are what the base's pipeline makes of the prompts, and nothing is drawn."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lcm_kit import bases, sample
from lcm_kit.bases import inspect_base
from lcm_kit.cli.check import check
from lcm_kit.config.load import dump, load
from lcm_kit.config.schema import Distill
from lcm_kit.data import prompts, sources, vae_precision
from lcm_kit.data.batches import Batches
from lcm_kit.data.encoder import Encoder
from lcm_kit.errors import UserError
from lcm_kit.plan import base_profile, disk, encoding, work
from lcm_kit.plan.dry_run import MetaModel
from lcm_kit.plan.estimate import Planner
from lcm_kit.report.build import _seen
from lcm_kit.training.run_files import config_of
from tests.recipes.small import assert_shards_are_shared, configure
from train import distill

Keys = dict[str, Any]
LINES = ["a red cat", "two blue dogs", "an owl", "a red cat", "a tree"]
# A method that reads no picture, and one that says nonsense; neither changes what LCM computes
METHODS = """
from dataclasses import dataclass
from lcm_kit.core.methods import LCM

@dataclass(frozen=True)
class Alone(LCM):
    title = "a method without pictures"
    needs_pictures = False

@dataclass(frozen=True)
class Odd(LCM):
    title = "a method that does not know"
    needs_pictures = "perhaps"

@dataclass(frozen=True)
class Plain:
    title = "a method that inherits nothing"
    samplers = ("lcm",)
    steps = (1,)
    tags = ()
    times, endpoint = LCM.times, LCM.endpoint
"""


@pytest.fixture(autouse=True)
def _cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


@pytest.fixture
def config(distill_keys: Keys, tmp_path: Path) -> Callable[..., Distill]:
    """Five prompts in shards of two, no folder of images; `changes` override, block by block."""
    (tmp_path / "prompts.txt").write_text("\n".join(LINES))
    (tmp_path / "own.py").write_text(METHODS)

    def build(method: str = "Alone", **changes: Any) -> Distill:
        data = {
            "source": "prompts", "shard_size": 2, "path": str(tmp_path / "no images"),
            "cache": str(tmp_path / "c"), "samples": {"prompts": str(tmp_path / "prompts.txt")},
            **changes.pop("data", {}),
        }  # fmt: skip
        plain = configure(distill_keys, tmp_path / "run", **changes)
        keys = yaml.safe_load(dump(plain))
        keys["data"] |= data
        keys["method"] = {"name": "custom", "path": f"{tmp_path / 'own.py'}:{method}"} if method else {}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(keys, sort_keys=False))
        made = load(tmp_path / "config.yaml", imports=True)
        assert isinstance(made, Distill)
        return made

    return build


def opened(config: Distill) -> Any:
    return sources.open_cache(config, inspect_base(config.base.path))


def test_the_rows_are_what_the_pipeline_makes_of_the_prompts(
    config: Callable[..., Distill], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = config()
    pipe = sample.pipeline(made.base.path)
    with monkeypatch.context() as patch:  # nothing but the text encoders is loaded
        for where, name in (
            (bases, "load_unet"),
            (bases, "load_vae"),
            (vae_precision, "load"),
            (sample, "pipeline"),
        ):
            patch.setattr(where, name, lambda *_, **__: pytest.fail("only text is to be encoded"))
        (report,) = sources.encode(made, progress=False)
    assert (report.rows, report.encoded) == (5, 5) and "5 of 5 prompts encoded in" in report.message
    cache = opened(made)
    assert cache.captions == LINES and cache.ids[4] == "prompts/00004"
    wanted, empty = pipe.encode_prompt(LINES, "cpu", 1, True, [""] * 5)
    torch.testing.assert_close(cache.condition(range(5)).embeds, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(cache.empty().embeds, empty[:1], atol=1e-5, rtol=1e-5)
    assert float((wanted[0] - wanted[1]).abs().max()) > 0.01 and torch.equal(wanted[0], wanted[3])
    factor = 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    shape = (5, pipe.unet.config.in_channels, 64 // factor, 64 // factor)
    assert torch.equal(cache.latents(range(5)), torch.zeros(shape))


def test_sdxl_is_told_pooled_texts_and_sizes(config: Callable[..., Distill], sdxl_base: Path) -> None:
    made = config(base={"path": str(sdxl_base)})
    sources.encode(made, progress=False)
    found = opened(made).condition([2, 0])
    embeds, _, pooled, _ = sample.pipeline(str(sdxl_base)).encode_prompt([LINES[2], LINES[0]], device="cpu")
    torch.testing.assert_close(found.embeds, embeds, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.pooled, pooled, atol=1e-5, rtol=1e-5)
    assert found.time_ids.tolist() == [[64, 64, 0, 0, 64, 64]] * 2


def test_the_manifest_says_what_made_them(config: Callable[..., Distill]) -> None:
    made = config()
    sources.encode(made, progress=False)
    found = json.loads((prompts.folder_of(made.data) / "manifest.json").read_text())
    base, said = inspect_base(made.base.path), found["settings"]
    assert {key: said[key] for key in ("text_encoder", "tokenizer")} == {
        key: base.hash_of(key) for key in ("text_encoder", "tokenizer")
    }
    assert set(said) == {
        "format", "family", "text_encoder", "tokenizer", "prompts", "data.resolution", "latents"
    }  # fmt: skip
    assert [row["caption"] for row in found["records"]] == LINES
    assert [path.name for path in Path(made.data.cache).iterdir() if path.is_dir()] == ["prompts"]


def test_it_continues_and_a_second_run_does_nothing(
    config: Callable[..., Distill], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, real, calls = config(), Encoder.of_whole_pictures, []

    def interrupted(encoder: Encoder, captions: list[str], resolution: int) -> Any:
        calls.append(captions)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(encoder, captions, resolution)

    monkeypatch.setattr(Encoder, "of_whole_pictures", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sources.encode(made, progress=False)
    with pytest.raises(UserError, match="no finished cache in .*run `lcm-kit encode`"):
        opened(made)
    (report,) = sources.encode(made, progress=False)
    assert report.encoded == 3 and calls == [LINES[:2], LINES[2:4], LINES[2:4], LINES[4:]]
    monkeypatch.setattr(Encoder, "load", lambda *_, **__: pytest.fail("the text encoder was loaded"))
    (report,) = sources.encode(made, progress=False)
    assert report.encoded == 0 and report.message.endswith("5 prompts, up to date, nothing to encode")


def test_processes_share_the_shards(config: Callable[..., Distill], tmp_path: Path) -> None:
    made = config()
    encode = partial(prompts.encode, made, False)
    assert_shards_are_shared(encode, prompts.folder_of(made.data), tmp_path)


def test_changed_prompts_are_refused_in_words(config: Callable[..., Distill], tmp_path: Path) -> None:
    sources.encode(config(), progress=False)
    (tmp_path / "prompts.txt").write_text("\n".join([*LINES[:4], "a cow", "a pig"]))
    with pytest.raises(UserError, match=r"another config \(the prompts of data.samples, or how many\); run"):
        distill.main(config())
    (report,) = sources.encode(config(), progress=False)
    assert report.encoded == 2 and report.changes[1:] == ["1 prompt changed", "1 prompt added"]
    with pytest.raises(UserError, match="data.resolution .64 there, 32 here"):
        distill.main(config(data={"resolution": 32}))


def test_prompts_that_make_no_numbers_are_named(
    config: Callable[..., Distill], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Encoder.of_whole_pictures

    def broken(encoder: Encoder, captions: list[str], resolution: int) -> Any:
        made = real(encoder, captions, resolution)
        made["embeds"][[caption == LINES[2] for caption in captions]] = float("inf")
        return made

    monkeypatch.setattr(Encoder, "of_whole_pictures", broken)
    with pytest.raises(UserError, match=r"not finite of 'an owl' \(prompts/00002\)"):
        sources.encode(config(), progress=False)


def test_training_runs_on_prompts(config: Callable[..., Distill]) -> None:
    made = config(batch_size=3)
    sources.encode(made, progress=False)
    cache = opened(made)
    batch = Batches(cache, 3, seed=0).at(4)
    for id, latents, embeds in zip(batch.ids, batch.latents, batch.condition.embeds, strict=True):
        assert latents.shape == cache.latents(0)[0].shape and not latents.any()
        assert torch.equal(embeds, cache.condition(cache.ids.index(id)).embeds[0])
    each = [id for step in range(5) for id in Batches(cache, 3, seed=0).at(step).ids]
    assert {id: each.count(id) for id in cache.ids} == dict.fromkeys(cache.ids, 3)  # three epochs
    run = distill.main(made)
    facts = json.loads((run / "adapter" / "adapter.json").read_text())
    assert facts["data"] == {"fingerprint": cache.fingerprint, "source": "prompts", "resolution": 64}
    kept = config_of(run)["data"]  # though its method's file is not imported
    assert kept["source"] == "prompts" and _seen(kept) == {
        "prompts, without pictures": made.data.samples.prompts
    }


@pytest.mark.parametrize(
    ("method", "changes", "sentence"),
    [
        ("", {}, "data.source prompts has no pictures, and method lcm learns from some; set data.source to"),
        ("Plain", {}, "data.source prompts has no pictures, and method custom learns from some"),
        ("Odd", {}, "must say with true or false whether it needs_pictures, not with 'perhaps'"),
        ("Alone", {"data": {"flip": True}}, "with source prompts there are none; remove it"),
        ("Alone", {"data": {"regularization": "x"}}, "so regularization has no effect; remove it"),
        ("Alone", {"data": {"leave_out": "x"}}, "so leave_out has no effect"),
        ("Alone", {"data": {"samples": {"steps": 20}}}, "so samples.steps has no effect"),
        ("Alone", {"data": {"samples": {"count": 20}}}, "so samples.count has no effect"),
        ("Alone", {"data": {"samples": {"share": 0.2}}}, "so samples.share has no effect"),
        ("Alone", {"data": {"samples": {"guidance_scale": 2}}}, "so samples.guidance_scale has no effect"),
        ("Alone", {"teacher": {"weight": 0.5}}, "teacher.weight 0.5 goes back to pictures with the noise"),
        ("Alone", {"validation": {"held_out": 0.1}}, "validation.held_out is of images, and data.source is"),
    ],
)
def test_what_has_no_effect_is_refused(
    method: str, changes: Keys, sentence: str, config: Callable[..., Distill]
) -> None:
    with pytest.raises(UserError, match=sentence):
        config(method, **changes)


def test_a_style_is_in_images(distill_keys: Keys, tmp_path: Path) -> None:
    keys = {
        **{key: value for key, value in distill_keys.items() if key != "guidance"},
        "recipe": "train/finetune",
    }
    with pytest.raises(ValueError, match="data.source prompts is for train/distill; a style is in images"):
        configure(keys, tmp_path, data={"source": "prompts"})


def test_check_and_plan(config: Callable[..., Distill], tmp_path: Path) -> None:
    made = config()
    (line,) = (line for line in check(made) if line.startswith("data"))
    assert line.endswith("prompts.txt, 5 of them, trained on without pictures")
    planner = Planner(MetaModel(base_profile.find(made.base), made.adapter), "cpu")
    planned = planner(made)
    text = sum(p.numel() for p in bases.load_text(inspect_base(made.base.path)).text_encoder.parameters())
    assert list(planned.encode) == [encoding.PROMPTS]
    assert planned.encode[encoding.PROMPTS]["text encoders"] == 4 * text
    assert "VAE" not in planned.encode[encoding.PROMPTS]
    assert work.while_encoding(made, {"teacher": 1.0}) == []
    written = disk.disk(made, planner)
    sources.encode(made, progress=False)
    shard = prompts.folder_of(made.data) / "shard-00000.safetensors"
    assert written.records == 5 and written.record * 2 == pytest.approx(shard.stat().st_size, abs=1000)
    (tmp_path / "prompts.txt").unlink()
    assert disk.disk(made, planner).records is None
    with pytest.raises(UserError, match="there is no such file"):
        check(made)


def test_distribution_matching_needs_none(distill_keys: Keys, tmp_path: Path) -> None:
    keys = {"data": {"source": "prompts"}, "method": {"name": "dmd"}}
    assert configure(distill_keys, tmp_path, **keys).data.source == "prompts"
    keys["method"]["consistency"] = 0.5  # but a consistency loss beside it does
    with pytest.raises(ValueError, match="has no pictures, and method dmd learns from some"):
        configure(distill_keys, tmp_path, **keys)
