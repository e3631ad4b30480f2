"""Progressive distillation through the recipe: its stages survive a kill, a second process, an export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lcm_kit.core.methods import MethodInfo, Progressive
from lcm_kit.errors import UserError
from lcm_kit.evaluation import recommended
from lcm_kit.export.run import export_run
from lcm_kit.lora.metadata_reading import provenance_from_header
from lcm_kit.report import build
from lcm_kit.training import runtime
from lcm_kit.training.run_files import config_of
from tests.recipes.small import configure, interrupted, launch_training
from train import distill

METHOD = {"name": "progressive", "start": 8, "finish": 2}
SETTINGS: dict[str, Any] = {
    "method": METHOD,
    "steps": 6,  # the second stage begins with step 3
    "loss": {"name": "l2"},
    "optimizer": {"schedule": "cosine", "warmup_steps": 1},
    "checkpoint": {"every": 1, "keep": 9},
}


@pytest.fixture(autouse=True)
def _cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


@pytest.fixture(scope="module")
def straight(distill_keys: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing interrupts."""
    return distill.main(configure(distill_keys, tmp_path_factory.mktemp("straight"), **SETTINGS))


def state(run: Path, step: int, name: str) -> dict[str, torch.Tensor]:
    return load_file(run / f"state/step-{step:06d}/{name}.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in b)


def test_the_second_stage_is_taught_by_the_student_that_the_first_one_left(straight: Path) -> None:
    left = state(straight, 3, "lora")
    assert not same(left, state(straight, 4, "lora")), "this test could not fail"
    assert all(same(state(straight, step, "ema"), left) for step in (4, 5, 6))
    assert not same(state(straight, 3, "ema"), left)  # it is taken where the stage begins


def test_the_rate_begins_anew(straight: Path) -> None:
    lines = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
    rates = [line["lr"] for line in lines]
    assert rates[:3] == rates[3:] and rates[1] > rates[2]


@pytest.mark.parametrize("at", [2, 3, 4])
def test_a_run_that_was_killed_around_an_edge_goes_on_bit_for_bit(
    distill_keys: dict[str, Any], straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    config = configure(distill_keys, tmp_path, **SETTINGS)
    interrupted(config, monkeypatch, at)
    assert max(int(path.name[-6:]) for path in (tmp_path / "state").iterdir()) == at
    distill.main(config)
    for file in sorted(straight.glob("state/*/*")) + sorted(straight.glob("adapter/*")):
        assert (tmp_path / file.relative_to(straight)).read_bytes() == file.read_bytes(), file


def test_its_length_moves_the_edges_and_is_held(
    distill_keys: dict[str, Any], straight: Path, tmp_path: Path
) -> None:
    shutil.copytree(straight, tmp_path / "run")
    with pytest.raises(UserError, match=r"started with steps 6 and the config says 12; set it back"):
        distill.main(configure(distill_keys, tmp_path / "run", **{**SETTINGS, "steps": 12}))


def test_the_files_say_how_it_is_drawn(straight: Path, tmp_path: Path) -> None:
    """DDIM at the last student's number of steps, and no grid of a solver's, which it has not."""
    files = export_run(straight, output=tmp_path / "export")
    card = (tmp_path / "export/README.md").read_text()
    assert "| method | progressive distillation |" in card and "progressive-distillation" in card
    assert (
        "| sampler | DDIM, trailing timesteps |\n| steps | 2, what it was made for, and no other number |"
        in card
    )
    assert "num_inference_steps=2, guidance_scale=1.0" in card and "| guidance baked in | 2 to 6 |" in card
    wanted = MethodInfo("progressive", Progressive.title, ("ddim",), (2,), Progressive.tags)
    for file in files.values():
        with safe_open(file, "pt") as opened:
            told = opened.metadata()
        made = provenance_from_header(told, "x")
        assert made.student == wanted and made.grid is None and told["lcm_kit.sampling_steps"] == "2"
        assert "distilled by progressive distillation in 6 optimizer steps" in told["modelspec.description"]
        assert str(recommended.settings(None, recommended.method_of(file))).startswith("ddim, 2 steps")


def test_the_report_names_the_stages(straight: Path) -> None:
    assert (
        build._facts(straight, config_of(straight))["solver"]
        == "ddim, from 8 steps to 2, halved in each stage"
    )


def test_sharded_weights_are_refused_in_a_sentence(
    distill_keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "sharded", lambda accelerator: True)
    with pytest.raises(UserError, match="a method in stages does not work where FSDP shards the weights"):
        runtime.start(configure(distill_keys, tmp_path, **SETTINGS))


@pytest.mark.slow  # processes that import torch anew
def test_two_processes_are_one_with_twice_the_batch(distill_keys: dict[str, Any], tmp_path: Path) -> None:
    settings = {**SETTINGS, "optimizer": {"eps": 1e-3}}  # eps: as in test_distill's accumulation
    config = configure(distill_keys, tmp_path / "two", batch_size=2, **settings)
    launch_training("distill", config, tmp_path)
    one = distill.main(configure(distill_keys, tmp_path / "one", batch_size=4, **settings))
    for name in ("lora", "ema"):
        two, whole = state(tmp_path / "two", 6, name), state(one, 6, name)
        assert max(float((two[key] - whole[key]).abs().max()) for key in whole) < 1e-4
