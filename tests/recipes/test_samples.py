"""`data.source: teacher` and `mix`: the cache is what lcm_kit.sample draws, and training runs on it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from lcm_kit import bases, sample
from lcm_kit.adapter import styles
from lcm_kit.adapter.adapted_unet import AdaptedUNet
from lcm_kit.bases import inspect_base
from lcm_kit.cli.check import check
from lcm_kit.config.load import dump
from lcm_kit.config.schema import Distill
from lcm_kit.data import samples, sources
from lcm_kit.data.batches import Batches
from lcm_kit.data.cache import Cache
from lcm_kit.data.sources import MixedCache
from lcm_kit.data.split import split
from lcm_kit.errors import UserError
from lcm_kit.lora import structure
from tests import broken
from tests.loras import fuse, lcm_modules, random_lora
from tests.recipes.small import assert_shards_are_shared, configure
from train import distill

Keys = dict[str, Any]
PROMPTS = ["a red cat", "two blue dogs", "an owl"]
DRAWN = {"count": 5, "steps": 3, "guidance_scale": 4.0, "seed": 11}


@pytest.fixture(autouse=True)
def _cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


@pytest.fixture
def config(distill_keys: Keys, tmp_path: Path) -> Callable[..., Distill]:
    """A styled teacher that draws five samples of three prompts, in shards of two; `samples` override."""
    place = structure.of_base(distill_keys["base"]["path"])
    style = random_lora(place, lcm_modules(place)[::2], ranks=(2,), alphas=(2.0,), size=0.1)
    broken.save(tmp_path / "style.safetensors", broken.kohya_diffusers_spelling(style, place))
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))

    def build(source: str = "teacher", weight: float = 0.7, **drawn: Any) -> Distill:
        given = {**DRAWN, "prompts": str(tmp_path / "prompts.txt"), **drawn}
        own = {} if source == "mix" else {"path": str(tmp_path / "no images")}
        return configure(
            distill_keys, tmp_path / "run",
            data={"source": source, "shard_size": 2, "samples": given, "cache": str(tmp_path / "c"), **own},
            teacher={"adapters": [{"path": str(tmp_path / "style.safetensors"), "weight": weight}]},
        )  # fmt: skip

    return build


def opened(config: Distill) -> Any:
    return sources.open_cache(config, inspect_base(config.base.path))


def test_the_rows_are_what_sample_draws_bit_for_bit(config: Callable[..., Distill], tmp_path: Path) -> None:
    made = config()
    (report,) = sources.encode(made, progress=False)
    assert (report.rows, report.encoded) == (5, 5) and "5 of 5 samples of the teacher drawn" in report.message
    cache, base = opened(made), inspect_base(made.base.path)
    captions = [PROMPTS[i % 3] for i in range(5)]
    assert cache.captions == captions and cache.ids[4] == "teacher/00004"
    pipe = sample.pipeline(made.base.path)
    styles.add_teacher_adapters(AdaptedUNet(pipe.unet), made.teacher, base)
    settings = {"sampler": "ddim", "steps": 3, "guidance_scale": 4.0, "seed": 11, "size": 64}
    drawn = [sample.latents(pipe, captions[k : k + 2], first=k, **settings) for k in (0, 2, 4)]
    assert torch.equal(cache.latents(range(5)), torch.cat(drawn))
    # The styled teacher is the UNet with the style fused into it, and another than the base.
    place = structure.of_base(made.base.path)
    style = random_lora(place, lcm_modules(place)[::2], ranks=(2,), alphas=(2.0,), size=0.1)
    plain = sample.pipeline(made.base.path)
    bare = sample.latents(plain, captions, **settings)
    plain.unet = fuse(plain.unet, style, 0.7)
    fused = sample.latents(plain, captions, **settings)
    torch.testing.assert_close(fused, torch.cat(drawn), atol=1e-3, rtol=1e-3)
    assert float((fused - bare).abs().max()) > 0.05
    family = bases.family_of(base)
    wanted = family.encode_text(bases.load_text(base), captions).embeds
    torch.testing.assert_close(cache.condition(range(5)).embeds, wanted, atol=1e-5, rtol=1e-5)


def test_the_manifest_says_what_made_them(config: Callable[..., Distill]) -> None:
    made = config()
    sources.encode(made, progress=False)
    found = json.loads((samples.folder_of(made.data) / "manifest.json").read_text())
    base, said = inspect_base(made.base.path), found["settings"]
    assert said["unet"] == base.hash_of("unet") and said["scheduler"] == base.hash_of("scheduler")
    assert said["data.samples.steps"] == 3 and said["data.samples.seed"] == 11
    assert [entry["weight"] for entry in said["teacher.adapters"]] == [0.7]
    assert [row["caption"] for row in found["records"]] == [PROMPTS[i % 3] for i in range(5)]


def test_it_continues_and_a_second_run_does_nothing(
    config: Callable[..., Distill], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = config()
    real, calls = samples._draw, []

    def interrupted(*args: Any) -> Any:
        calls.append(args[-1][0].id)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(samples, "_draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sources.encode(made, progress=False)
    with pytest.raises(UserError, match="no finished cache in .*run `lcm-kit encode`"):
        opened(made)
    (report,) = sources.encode(made, progress=False)
    assert report.encoded == 3
    assert calls == ["teacher/00000", "teacher/00002", "teacher/00002", "teacher/00004"]
    monkeypatch.setattr(samples, "teacher_pipeline", lambda *_: pytest.fail("the teacher was loaded"))
    (report,) = sources.encode(made, progress=False)
    assert report.encoded == 0 and report.message.endswith("up to date, nothing to encode")


def test_processes_share_the_shards_and_draw_the_same(config: Callable[..., Distill], tmp_path: Path) -> None:
    made = config()
    encode = partial(samples.encode, made, False)
    assert_shards_are_shared(encode, samples.folder_of(made.data), tmp_path)


def test_prompts_that_the_base_reads_in_part_are_named(
    config: Callable[..., Distill], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("an owl\n" + "a red cat and " * 40)
    sources.encode(config(count=2, steps=1), progress=False)
    assert "and the rest is cut off: teacher/00001 (" in capsys.readouterr().err


def test_samples_that_are_not_finite_are_refused_by_prompt(
    config: Callable[..., Distill], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, real = config(steps=1), sample.latents

    def broken(pipe: Any, prompts: Any, **more: Any) -> torch.Tensor:
        drawn = real(pipe, prompts, **more)
        drawn[[prompt == PROMPTS[1] for prompt in prompts]] = float("nan")
        return drawn

    monkeypatch.setattr(sample, "latents", broken)
    with pytest.raises(UserError, match=r"not finite for 'two blue dogs' \(teacher/00001\); lower data.samp"):
        sources.encode(made, progress=False)
    assert [file.name for file in samples.folder_of(made.data).iterdir()] == ["empty.safetensors"]


def test_a_changed_input_is_refused_in_words(config: Callable[..., Distill], tmp_path: Path) -> None:
    sources.encode(config(), progress=False)

    def refused(changed: Distill) -> str:
        with pytest.raises(UserError) as caught:
            distill.main(changed)
        return str(caught.value)

    assert "data.samples.steps (3 there, 4 here)" in refused(config(steps=4))
    assert "data.samples.guidance_scale (4.0 there, 5.0 here)" in refused(config(guidance_scale=5.0))
    assert "the teacher's adapters" in refused(config(weight=0.8))
    assert "the prompts of data.samples, or how many" in refused(config(count=4))
    (tmp_path / "prompts.txt").write_text("\n".join([*PROMPTS[:2], "a cow"]))
    assert "the prompts of data.samples" in refused(config())
    (report,) = sources.encode(config(), progress=False)
    assert report.encoded == 2  # one sample is another, and its shard is drawn anew
    assert opened(config()).captions[2] == "a cow"


def test_training_runs_without_images(config: Callable[..., Distill]) -> None:
    made = config()
    sources.encode(made, progress=False)
    run = distill.main(made)
    facts = json.loads((run / "adapter" / "adapter.json").read_text())
    assert facts["data"]["source"] == "teacher" and facts["steps"] == 4
    state = load_file(run / "adapter" / "lora.safetensors")
    assert any(float(tensor.abs().max()) > 0 for key, tensor in state.items() if "lora_B" in key)


def test_a_mix_draws_from_both_by_its_share(config: Callable[..., Distill]) -> None:
    made = config("mix", share=0.3)
    reports = sources.encode(made, progress=False)
    assert [report.rows for report in reports] == [8, 5]
    both = opened(made)
    assert isinstance(both, MixedCache) and len(both.ids) == 13 and both.mix == (8, Fraction(3, 10))
    batches = Batches(both, 10, seed=0, mix=both.mix)
    counts = [sum(row.startswith("teacher/") for row in batches.at(step).ids) for step in range(20)]
    assert counts == [3] * 20
    batch = batches.at(7)
    for row, latents, embeds in zip(batch.ids, batch.latents, batch.condition.embeds, strict=True):
        source, index = (both.samples, both.samples.ids) if "/" in row else (both.images, both.images.ids)
        assert torch.equal(latents, source.latents(index.index(row))[0])
        assert torch.equal(embeds, source.condition(index.index(row)).embeds[0])
    run = distill.main(made)
    assert (
        json.loads((run / "adapter" / "adapter.json").read_text())["data"]["fingerprint"] == both.fingerprint
    )
    assert both.fingerprint not in (both.images.fingerprint, both.samples.fingerprint)


@pytest.mark.parametrize("source", ["images", "mix"])
def test_what_a_style_held_out_is_left_out(
    source: str, config: Callable[..., Distill], distill_keys: Keys, tmp_path: Path
) -> None:
    shared = ("base", "data", "batch_size")
    keys = {"recipe": "train/finetune", **{key: distill_keys[key] for key in shared}}
    style = configure(keys, tmp_path / "style", seed=3, validation={"held_out": 0.25})
    (tmp_path / "style").mkdir()
    (tmp_path / "style" / "config.yaml").write_text(dump(style))
    base = inspect_base(style.base.path)
    left = split(Cache.open(Path(style.data.cache), base=base, data=style.data), 0.25, 3)[1].ids
    made = config("mix")
    made = replace(made, data=replace(made.data, source=source, leave_out=str(tmp_path / "style")))
    sources.encode(made, progress=False)
    whole = opened(made)
    trained, kept = sources.split_off(made, whole)
    assert len(left) == 2 and not kept.ids and trained.ids == [id for id in whole.ids if id not in left]
    places = [whole.ids.index(id) for id in trained.ids]
    every = range(len(places))
    assert torch.equal(trained.latents(every), whole.latents(places))
    assert torch.equal(trained.condition(every).embeds, whole.condition(places).embeds)
    mix = sources.mix_of(trained, made.data)
    assert mix is None if source == "images" else mix.first == 6
    distill.main(made)
    assert any("left out: the 25% of the pictures" in line for line in check(made))
    if source == "mix":  # of its samples alone there is none to leave out
        alone = replace(made, data=replace(made.data, source="teacher"))
        assert len(sources.split_off(alone, samples.open_cache(made, base))[0].ids) == 5
    with pytest.raises(UserError, match=r"data.leave_out: nowhere is not the folder of a run"):
        sources.split_off(replace(made, data=replace(made.data, leave_out="nowhere")), whole)


def test_prompts_may_be_the_captions_of_pictures(config: Callable[..., Distill], tmp_path: Path) -> None:
    images = captioned(tmp_path / "pictures")
    assert samples.prompts_of(config(prompts=str(images)).data) == ["a", "b", "a", "b", "a"]
    (tmp_path / "pictures" / "0.txt").unlink()
    (tmp_path / "pictures" / "1.txt").unlink()
    with pytest.raises(UserError, match="no picture there has a caption"):
        samples.prompts_of(config(prompts=str(images)).data)
    lines = check(config(source="teacher"))
    assert "samples: 5 of the teacher's, for" in "\n".join(lines) and "adapters: " in "\n".join(lines)


def captioned(folder: Path) -> Path:
    folder.mkdir()
    for i, caption in enumerate("ab"):
        Image.new("RGB", (64, 64)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption)
    return folder
