"""A style at few steps: the figures of brand.json are those of plain diffusers' pictures from that noise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from pydantic import TypeAdapter

from lcm_kit import assets, sample
from lcm_kit.config import shipped
from lcm_kit.config.brand import Brand
from lcm_kit.data import records
from lcm_kit.errors import UserError
from lcm_kit.evaluation import brand, results, verdicts
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
