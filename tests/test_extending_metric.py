"""docs/extending/metric.md, followed: its entries are measured, written, compared and described."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lcm_kit.config import shipped
from lcm_kit.config.evaluation import Quality
from lcm_kit.evaluation import metric_table as metrics
from lcm_kit.evaluation import results
from lcm_kit.evaluation.cells import Cell
from lcm_kit.evaluation.extract import FeatureExtractor
from lcm_kit.evaluation.measure import Drawn, Ruler
from lcm_kit.evaluation.metrics.bootstrap import Resamples

PAGE = (Path(__file__).parents[1] / "docs" / "extending" / "metric.md").read_text(encoding="utf-8")
CODE = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the page's blocks define, their entries in the table for one test."""
    monkeypatch.setattr(metrics, "METRICS", dict(metrics.METRICS))
    names: dict[str, Any] = {}
    for block in CODE:
        exec(block, names)
    return names


def test_the_page_names_every_field_and_what_it_is_without() -> None:
    rows = re.findall(r"^\| `(\w+)` \|.*\| (.*?) ?\|$", PAGE.partition("## What it is")[0], re.MULTILINE)
    assert [name for name, _ in rows] == [field.name for field in fields(metrics.Metric)]
    for field, (_, default) in zip(fields(metrics.Metric), rows, strict=True):
        needed = field.default is MISSING and field.default_factory is MISSING
        assert needed == (default == ""), field.name


def test_a_column_is_kept_of_every_picture_and_measured_over_the_teachers(added: dict[str, Any]) -> None:
    """Halves of white and black on grey have the contrast of their size, by hand."""
    look = FeatureExtractor.of("evaluation/brand", ["a cat", "a dog"], 64, "cpu", features=None)
    sizes = {"teacher": (1.0, 0.5), "student": (0.5, 0.25)}
    rows = {}
    for name, found in sizes.items():
        half = torch.ones(2, 3, 64, 64)
        half[..., :32] = -1
        rows[name] = look(half * torch.tensor(found)[:, None, None, None], ["a cat", "a dog"])
        assert rows[name]["contrast"].tolist() == pytest.approx(found)
    ruler = Ruler(Resamples.draw(2, rounds=500), rows["teacher"], 0.95)
    drawn = Drawn(Cell("student", "a", "lcm", 4, 1.0), rows["student"], ruler)
    figure = metrics.METRICS["contrast"].measure(drawn)
    assert figure is not None and figure.value == pytest.approx(0.5)
    assert figure.interval(0.95) == pytest.approx((0.5, 0.5))  # half of the teacher's in every round
    assert metrics.METRICS["feature_norm"].measure(drawn) is None  # nothing to measure it by


def test_an_evaluation_writes_it(added: dict[str, Any], sd_base: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\na dog\nan owl")
    config = Quality(
        recipe="evaluation/quality", run=str(tmp_path), base=str(sd_base("epsilon")), count=3, batch_size=3,
        prompts=str(tmp_path / "prompts.txt"), teacher_steps=2, unet_calls=(2,), samplers=("ddim",),
    )  # fmt: skip
    file = shipped.load_recipe("evaluation/quality").main(config)
    found = results.read(file)
    assert found["metrics"]["contrast"]["label"] == "contrast over the teacher's"
    grey: dict[str, list[float]] = {}
    for cell in found["cells"]:
        for name in cell["pictures"]:
            with Image.open(tmp_path / name) as picture:
                pixels = np.asarray(picture.convert("RGB")) / 127.5 - 1
            grey.setdefault(cell["id"], []).append(float(pixels.mean(2).std()))
    teacher, other = (sum(values) / 3 for values in list(grey.values())[:2])
    first, second = found["cells"][:2]
    assert results.value(first, "contrast") == 1
    assert results.value(second, "contrast") == pytest.approx(other / teacher, rel=1e-5)
    figure = results.figure(second, "contrast")
    assert figure is not None and figure["low"] < figure["value"] < figure["high"]
    assert results.value(second, "feature_norm")  # the probe's, on 64 pixels
    assert "contrast" in json.loads(file.read_text())["metrics"]
