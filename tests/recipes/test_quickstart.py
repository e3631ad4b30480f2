"""The promise of the README, measured: minutes of training on a CPU give a look in 4 steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from lcm_kit import story

MARGIN = 0.15  # of brand similarity above the base's; the base has about 0, the brand's own pictures 0.63


@pytest.mark.slow
def test_quickstart_keeps_its_promise(tmp_path: Path) -> None:
    run = tmp_path / "quickstart"
    report = story.quickstart(run, [f"data.cache={tmp_path / 'cache'}"])
    files = ("config.yaml", "metrics.jsonl", "export/pytorch_lora_weights.safetensors", "results.json")
    assert all((run / name).is_file() for name in files) and report == run / "report.html"
    with safe_open(run / files[2], "pt") as file:
        assert "lora_adapter_metadata" in file.metadata()
    page = report.read_text(encoding="utf-8")
    assert "data:image/png;base64," in page and 'src="http' not in page

    # the look, at 4 steps, on captions of pictures that were held out
    found = json.loads((run / "brand.json").read_text())
    looks = {(row["name"], row["steps"]): row for row in found["rows"]}
    (less,) = [each for each in found["differences"] if (each["steps"], each["less"]) == (4, "base")]
    base, student = looks["base", 50], looks["adapter", 4]
    assert less["brand_similarity"]["low"] > 0  # paired, by prompt
    assert student["brand_similarity"]["value"] >= base["brand_similarity"]["value"] + MARGIN

    # and what does not name the look draws as before
    rows = json.loads((run / "results.json").read_text())["rows"]
    teacher = next(row for row in rows if row["name"] == "teacher")
    control = next(row for row in rows if row["name"] == "student" and row["unet_calls"] == 4)
    plain = [row for row in rows if row["name"] == "base" and row["unet_calls"] == 4]
    assert control["guidance_scale"] == 1 and teacher["unet_calls"] == 100
    assert control["attribute_accuracy"] >= teacher["attribute_accuracy"] - 0.05
    assert control["frechet"] <= 0.5 * min(row["frechet"] for row in plain)
    assert 0.9 <= control["saturation"] <= 1.1  # chroma against the teacher's
    guided = [row["attribute_accuracy"] for row in plain if row["guidance_scale"] > 1]
    assert guided and max(guided) <= teacher["attribute_accuracy"] - 0.20
