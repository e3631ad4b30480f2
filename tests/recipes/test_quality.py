"""The quality recipe on a random base: its rows, what they cost, what is kept, and what is null where."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from lcm_kit import sample
from lcm_kit.config import shipped
from lcm_kit.config.evaluation import Quality
from lcm_kit.errors import UserError
from lcm_kit.export.run import export_run
from tests.runs import build_run

PROMPTS = ["a cat", "a dog"]


@pytest.fixture(scope="module")
def quality() -> ModuleType:
    return shipped.load_recipe("evaluation/quality")


@pytest.fixture(scope="module")
def run(sd_base: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = build_run(tmp_path_factory.mktemp("runs") / "run", sd_base("epsilon"))
    export_run(run)
    (run / "prompts.txt").write_text("\n".join(PROMPTS))
    return run


def config(run: Path, **changes: object) -> Quality:
    settings: dict[str, object] = {
        "recipe": "evaluation/quality", "run": str(run), "prompts": str(run / "prompts.txt"), "count": 3,
        "batch_size": 2, "teacher_steps": 4, "student_steps": (1, 2), "unet_calls": (2,), "pictures": 2,
    }  # fmt: skip
    return Quality(**{**settings, **changes})  # type: ignore[arg-type]


def test_plan_spends_equal_calls(quality: ModuleType, run: Path) -> None:
    rows = quality.plan(config(run, unet_calls=(2, 3), teacher_steps=50, student_steps=(1, 4)))
    assert [(row.kind, row.sampler, row.steps, row.guidance_scale, row.unet_calls) for row in rows] == [
        ("teacher", "ddim", 50, 5.0, 100),
        ("plain", "ddim", 1, 5.0, 2),
        ("plain", "ddim", 2, 1.0, 2),
        ("plain", "dpmpp_2m", 1, 5.0, 2),
        ("plain", "dpmpp_2m", 2, 1.0, 2),
        ("plain", "ddim", 3, 1.0, 3),  # guidance cannot spend an odd number of calls
        ("plain", "dpmpp_2m", 3, 1.0, 3),
        ("student", "lcm", 1, 1.0, 1),
        ("student", "lcm", 4, 1.0, 4),
    ]


def test_results(quality: ModuleType, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = quality.main(config(run))
    assert file == run / "results.json"
    results = json.loads(file.read_text())
    assert results["prompts"]["main"]["texts"] == ["a cat", "a dog", "a cat"]  # repeated, with new noise
    assert (results["version"], results["recipe"], results["settings"]["seed"]) == (
        2,
        "evaluation/quality",
        0,
    )
    assert set(results["versions"]) == {"lcm_kit", "torch", "diffusers", "peft", "transformers"}
    (used,) = results["adapters"]
    assert used["name"] == "student" and used["fault"] is None and used["weights"]
    cells = {(cell["kind"], cell["sampler"], cell["steps"]): cell for cell in results["cells"]}
    assert len(cells) == 7

    def value(cell: dict[str, Any], key: str) -> float | None:
        return cell["metrics"][key] and cell["metrics"][key]["value"]

    teacher, student = cells["teacher", "ddim", 4], cells["student", "lcm", 1]
    assert teacher["unet_calls"] == 8 and value(teacher, "pixel_distance") == 0
    assert value(teacher, "saturation") == 1
    distance = student["metrics"]["pixel_distance"]
    assert student["unet_calls"] == 1 and 0 < distance["low"] < distance["value"] < distance["high"]
    assert all((value(cell, "seconds") or 0) > 0 for cell in results["cells"])
    assert {value(cell, "prompt_adherence") for cell in results["cells"]} == {None}  # "a cat": no background
    assert results["frechet_floor"] is None and results["verdict"] == "Judge by eye"

    # the student is plain diffusers with the exported file: drawn again here, picture by picture
    pipe = sample.pipeline(str(json.loads((run / "adapter/adapter.json").read_text())["base"]["path"]))
    sample.load_adapter(pipe, run)
    wanted = sample.to_pil(sample.sample(pipe, ["a dog"], sampler="lcm", steps=1, first=1))[0]
    assert student["pictures"] == [f"pictures/student-lcm-1-g1-w1-00{k}.png" for k in (0, 1)]
    with Image.open(run / student["pictures"][1]) as picture:
        difference = torch.tensor(list(picture.tobytes()), dtype=torch.int16) - torch.tensor(
            list(wanted.tobytes()), dtype=torch.int16
        )
    assert difference.abs().max() <= 1

    # the same inputs again: nothing is drawn, the figures are the same
    monkeypatch.setattr(
        sample, "pipeline", lambda *args, **settings: pytest.fail("something was drawn again")
    )
    kept = {p.name: p.stat().st_mtime_ns for p in (run / "evaluation").iterdir()}
    assert json.loads(quality.main(config(run)).read_text()) == results
    assert {p.name: p.stat().st_mtime_ns for p in (run / "evaluation").iterdir()} == kept
    monkeypatch.undo()

    # another weight of the LoRA, fewer pictures to show: only the student's cells are drawn, beside the old
    quality.main(config(run, lora_weight=0.5, pictures=1))
    now = {p.name for p in (run / "evaluation").iterdir()}
    assert {name.rpartition("-")[0] for name in now - kept.keys()} == {
        "student-lcm-1-g1-w0.5", "student-lcm-2-g1-w0.5"
    }  # fmt: skip
    assert kept.keys() < now and len(kept) == 7
    images = [load_file(p)["pictures"] for p in (run / "evaluation").glob("*.safetensors")]
    assert {tuple(image.shape) for image in images} == {(3, 3, 64, 64)}


def test_what_is_missing_is_named(quality: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no config.yaml"):
        quality.main(config(tmp_path))


def test_a_base_alone_has_no_student(
    quality: ModuleType, sd_base: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    settings = config(tmp_path, base=str(sd_base("epsilon")), guidance_scale=1.0)
    results = json.loads(quality.main(settings).read_text())
    assert [(cell["kind"], cell["unet_calls"]) for cell in results["cells"]] == [
        ("teacher", 4), ("plain", 2), ("plain", 2)
    ]  # fmt: skip
    assert results["adapters"] == [] and results["verdict"] is None and results["resolution"] == 64
    with pytest.raises(UserError, match="nowhere"):
        quality.main(config(tmp_path, base="/nowhere"))
