"""A style at few steps: the figures of brand.json are those of plain diffusers' pictures from that noise."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from pydantic import TypeAdapter
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lcm_kit import assets, sample
from lcm_kit.config import shipped
from lcm_kit.config.brand import Brand
from lcm_kit.data import records
from lcm_kit.errors import UserError
from lcm_kit.evaluation import brand, results, verdicts
from lcm_kit.evaluation.draw import Samples
from lcm_kit.evaluation.metrics.features import extractor
from lcm_kit.evaluation.metrics.similarity import brand_similarity
from lcm_kit.io.files import sha256_bytes
from lcm_kit.tiny import world
from lcm_kit.tiny.probe import load_probe
from tests.loras import random_lora
from tests.recipes.test_sweep import save, tiny

SMALL: dict[str, Any] = {
    "recipe": "evaluation/brand", "base": "asset:tiny-sd", "count": 3, "images_per_prompt": 2, "pictures": 2,
    "batch_size": 8, "resamples": 100, "teacher_steps": 2, "teacher_guidance": 3.0, "steps": [1, 2],
    "brand": "asset:brand", "control": "asset:general", "prompts": "asset:brand",
}  # fmt: skip


def configure(**keys: Any) -> Brand:
    return TypeAdapter(Brand).validate_python({**SMALL, **keys})


def features_of(asset: str) -> torch.Tensor:
    found = records.pictures(Path(assets.resolve(asset)), asset)
    pixels = torch.stack([record.pixels(64) for record in found])
    return extractor("asset:probe", "cpu").images(pixels)


@pytest.mark.slow  # draws everything twice
def test_the_figures_are_those_of_plain_diffusers(tmp_path: Path) -> None:
    style = save(random_lora(tiny(), size=0.03, seed=1), tmp_path / "style.safetensors")
    speed = save(random_lora(tiny(), size=0.03, seed=2), tmp_path / "speed.safetensors")
    config = configure(run=str(speed), style=str(style), output=str(tmp_path / "out"))
    found = results.read(shipped.load_recipe("evaluation/brand").main(config))
    rows = results.brand_rows(found)
    assert [(row["name"], row["steps"], row["unet_calls"]) for row in rows] == [
        ("base", 2, 4), ("styled", 2, 4), ("adapter", 1, 1), ("adapter", 2, 2),
    ]  # fmt: skip

    # the adapter at two steps by hand
    pipe = sample.pipeline("asset:tiny-sd")
    sample.load_adapter(pipe, speed)
    prompts = records.prompts("asset:brand")[:3]
    assert results.prompts(found)["texts"] == prompts
    assert [each["name"] for each in found["adapters"]] == ["adapter", "style"]
    texts = [prompt for prompt in prompts for _ in range(2)]
    pixels = sample.sample(pipe, texts, sampler="lcm", steps=2, size=64)
    row = rows[3]
    assert row["brand_similarity"] and row["brand_adherence"] and rows[0]["brand_similarity"]
    wanted = brand_similarity(
        extractor("asset:probe", "cpu").images(pixels),
        features_of("asset:brand"),
        features_of("asset:general"),
    )
    assert row["brand_similarity"]["value"] == pytest.approx(float(wanted.mean()), abs=5e-4)
    seen = load_probe(assets.path("brand-probe")).read(pixels)
    scenes = [world.parse(text) for text in texts]
    right = [
        all(got[key] == getattr(scene, key) for key in ("object", "colour", "pattern"))
        for got, scene in zip(seen, scenes, strict=True)
    ]
    assert row["brand_adherence"]["value"] == pytest.approx(sum(right) / 6)
    with Image.open(tmp_path / "out" / row["pictures"][1]) as picture:
        own = sample.to_pil(pixels[2:3])[0]
        assert max(abs(a - b) for a, b in zip(picture.tobytes(), own.tobytes(), strict=True)) <= 1

    # differences: the adapter's figure less the teacher's, with an interval around it
    less = results.difference(found, row["id"], rows[0]["id"], "brand_similarity")
    gap = row["brand_similarity"]["value"] - rows[0]["brand_similarity"]["value"]
    assert less is not None and less["difference"] == pytest.approx(gap)
    assert less["low"] <= gap <= less["high"]
    assert found["verdict"] == verdicts.brand_verdict(verdicts.brand_headline(found), "attributes")

    # without a control, similarity is measured away from what the base draws
    again = configure(run=str(speed), output=str(tmp_path / "out"), control=None, steps=[1])
    rows = results.brand_rows(results.read(shipped.load_recipe("evaluation/brand").main(again)))
    assert [row["name"] for row in rows] == ["base", "adapter"]


@pytest.mark.slow  # draws three lists
def test_the_contract_is_of_the_same_prompts_and_noise_without_the_trigger(tmp_path: Path) -> None:
    style = save(random_lora(tiny(), size=0.03, seed=1), tmp_path / "style.safetensors")
    keys = {"trigger": "lumo style", "sampler": "ddim", "steps": [2], "guidance_scale": 3.0}
    config = configure(run=str(style), output=str(tmp_path / "out"), **keys)
    found = results.read(shipped.load_recipe("evaluation/brand").main(config))
    prompts = records.prompts("asset:brand")[:3]
    plain = [prompt.removesuffix(", lumo style") for prompt in prompts]
    assert results.prompts(found)["texts"] == prompts and results.prompts(found, "bare")["texts"] == plain
    contract = found["contract"]
    assert contract["trigger"] == "lumo style" and len(contract["rows"]) == 1
    assert contract["verdict"] == verdicts.contract_verdict(found)

    pipe, look = sample.pipeline("asset:tiny-sd"), extractor("asset:probe", "cpu")
    own, others = features_of("asset:brand"), features_of("asset:general")

    def features(texts: list[str]) -> torch.Tensor:
        asked = [prompt for prompt in texts for _ in range(2)]
        return look.images(sample.sample(pipe, asked, sampler="ddim", steps=2, size=64, guidance_scale=3.0))

    base = {"with": features(prompts), "without": features(plain)}
    sample.load_adapter(pipe, style)
    mine = {"with": features(prompts), "without": features(plain)}
    near = {
        who: {kind: float(brand_similarity(each, own, others).mean()) for kind, each in drawn.items()}
        for who, drawn in (("base", base), ("mine", mine))
    }
    assert found["brand_own"] is not None
    row = contract["rows"][0]
    for key, kind in (("strength", "with"), ("leak", "without")):
        way = (near["mine"][kind] - near["base"][kind]) / (found["brand_own"] - near["base"][kind])
        figure = row[key]  # type: ignore[literal-required]
        assert figure["value"] == pytest.approx(way, abs=2e-3) and figure["low"] <= way <= figure["high"]
    noises = base["without"].view(3, 2, -1)
    apart = (noises[:, 0] - noises[:, 1]).square().mean(-1).sqrt().mean()
    moved = (mine["without"] - base["without"]).square().mean(-1).sqrt().mean()
    assert row["changed"] and row["changed"]["value"] == pytest.approx(float(moved / apart), rel=1e-2)

    # an adapter of no effect is the base: nothing is brought, nothing leaks, nothing is forgotten
    none = save(random_lora(tiny(), size=0.0, seed=1), tmp_path / "none.safetensors")
    same = configure(run=str(none), output=str(tmp_path / "out"), **keys)
    row = results.read(shipped.load_recipe("evaluation/brand").main(same))["contract"]["rows"][0]
    zero = {"value": 0.0, "low": 0.0, "high": 0.0}
    assert row == {
        "cell": row["cell"], "leak_share": None,
        **dict.fromkeys(("strength", "leak", "changed", "lost", "lost_elsewhere"), zero),
    }  # fmt: skip

    # without a trigger what is forgotten is measured alone, on the control prompts; or nothing, if so asked
    silent = configure(run=str(none), output=str(tmp_path / "out"), **{**keys, "trigger": None})
    contract = results.read(shipped.load_recipe("evaluation/brand").main(silent))["contract"]
    assert contract["trigger"] is None and contract["verdict"] == "Kept"
    known = {"changed": zero, "lost_elsewhere": zero, "cell": row["cell"]}
    assert contract["rows"] == [{**dict.fromkeys(("strength", "leak", "leak_share", "lost")), **known}]
    silent = configure(run=str(none), output=str(tmp_path / "out"), contract=False, **keys)
    found = results.read(shipped.load_recipe("evaluation/brand").main(silent))
    assert "contract" not in found and list(found["prompts"]) == ["main", "control"]


def test_the_trigger_is_the_configs_or_the_files_and_every_prompt_says_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora = random_lora(tiny(), size=0.03, seed=1)
    plain, named = tmp_path / "plain.safetensors", tmp_path / "named.safetensors"
    save(lora, plain)
    tensors, metadata = load_file(plain), {"modelspec.trigger_phrase": "lumo style"}
    save_file(tensors, named, metadata={**safe_open(plain, "pt").metadata(), **metadata})
    config = configure(run="x")
    assert brand.trigger_of(config, plain) is None and brand.trigger_of(config, named) == "lumo style"
    assert brand.trigger_of(configure(run="x", trigger="ink"), named) == "ink"
    assert brand.trigger_of(configure(run="x", trigger=", !"), named) is None  # no word

    prompts, _ = brand.prompts_and_pictures(config, "lumo style")
    assert list(prompts) == records.prompts("asset:brand")[:3] and capsys.readouterr().err == ""
    told, _ = brand.prompts_and_pictures(config, "ink, lumo style")
    assert told == tuple(f"ink, {prompt}" for prompt in prompts)
    assert "3 of 3 prompts of the style do not say the trigger 'ink, lumo style'" in capsys.readouterr().err


def test_what_is_drawn_without_the_trigger(tmp_path: Path) -> None:
    config = configure(run="x", seed=5)
    wanted = Samples(("a cat, ink", "ink, a dog", "an owl in ink"), 2, 5, 64, 8, 2)
    control = Samples(("a house",), 1, 5, 64, 8, 2)
    found = brand.lists(config, wanted, control, "ink")
    assert list(found) == ["main", "control", "bare"] and found["main"] is wanted
    assert found["bare"] == replace(wanted, prompts=("a cat", "a dog", "an owl"))  # the same noise
    assert list(brand.lists(config, wanted, control, None)) == ["main", "control"]
    assert list(brand.lists(replace(config, contract=False), wanted, control, "ink")) == ["main", "control"]
    alone = replace(wanted, prompts=("a cat, ink", "ink", "ink, a dog"))
    with pytest.raises(UserError, match="prompt 'ink' says nothing but the trigger 'ink'"):
        brand.lists(config, alone, control, "ink")


def test_the_prompts_are_the_captions_that_were_held_out(tmp_path: Path) -> None:
    run = tmp_path / "style"
    run.mkdir()
    (run / "config.yaml").write_text(
        "recipe: train/finetune\noutput: x\nseed: 5\ndata: {path: asset:brand}\n"
        "validation: {held_out: 0.05}\n"
    )
    prompts, shown = brand.prompts_and_pictures(
        configure(run="x", style=str(run), prompts=None, count=7, pictures=6)
    )
    folder = assets.path("brand")
    by_draw = sorted(
        folder.glob("*.png"), key=lambda f: sha256_bytes(f"5/{sha256_bytes(f.read_bytes())}".encode())
    )
    held = sorted(by_draw[:5])  # 0.05 of 96
    captions = [file.with_suffix(".txt").read_text().strip() for file in held]
    assert prompts == (*captions, *captions[:2])
    for picture, file in zip(shown, [*held, held[0]], strict=True):
        with Image.open(file) as wanted:
            assert picture is not None and picture.load().tobytes() == wanted.convert("RGB").tobytes()


def test_half_of_a_pair_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "adapter"
    folder.mkdir(parents=True)
    (folder / "lora.safetensors").touch()
    facts = {"teacher": {"in_student": True, "adapters": []}, "steps": 1, "base": {"path": "x", "hash": "y"}}
    facts["lora_config"] = {"r": 4, "lora_alpha": 4.0, "target_modules": ["to_q"]}
    (folder / "adapter.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match="learned speed alone"):
        shipped.load_recipe("evaluation/brand").main(configure(run=str(tmp_path / "run")))
