"""An interrupted run, continued, is the uninterrupted one bit for bit: weights, moments, EMA, metrics."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lcm_kit import checkpoints
from lcm_kit.config.load import dump
from lcm_kit.config.schema import Distill
from lcm_kit.errors import UserError
from tests.recipes.small import configure, environment
from train import distill

SETTINGS: dict[str, Any] = {
    "steps": 7,
    "ema": 0.5,
    "optimizer": {"schedule": "cosine", "warmup_steps": 2},
    "grid": {"steps": 20, "steps_start": 5},
    "logging": {
        "every": 3
    },  # no multiple of the checkpoints' interval: the window of losses must survive too
    "checkpoint": {"every": 2},
}

RUN = """
import sys
from pathlib import Path
from lcm_kit.config.load import load
from train import distill
distill.main(load(Path(sys.argv[1])))
"""


@pytest.fixture(autouse=True)
def _cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


@pytest.fixture(scope="module")
def straight(distill_keys: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing interrupts."""
    return distill.main(configure(distill_keys, tmp_path_factory.mktemp("straight"), **SETTINGS))


def newest(run: Path) -> checkpoints.State | None:
    folder = checkpoints.newest(run)
    return checkpoints.read(folder) if folder else None


def assert_same(run: Path, straight: Path) -> None:
    assert (run / "adapter/lora.safetensors").read_bytes() == (
        straight / "adapter/lora.safetensors"
    ).read_bytes()
    a, b = newest(run), newest(straight)
    assert a is not None and b is not None and a.step == b.step == 7 and a.window == b.window == []
    assert all(torch.equal(a.ema[key], b.ema[key]) for key in b.ema) and b.ema.keys() == a.ema.keys()
    for index, moments in b.optimizer["state"].items():
        assert all(torch.equal(a.optimizer["state"][index][name], value) for name, value in moments.items())
    assert metrics(run) == metrics(straight)


def metrics(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6, 7]
    return [{key: value for key, value in line.items() if key != "images_per_second"} for line in lines]


def test_a_run_stopped_by_an_exception_continues(
    distill_keys: dict[str, Any], straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(distill_keys, tmp_path, **SETTINGS)
    draws = distill.draws

    def stop(config: Distill, method: Any, schedule: Any, batch: Any, step: int) -> Any:
        if step == 5:
            raise KeyboardInterrupt
        return draws(config, method, schedule, batch, step)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(distill, "draws", stop)
        distill.main(config)
    state = newest(tmp_path)
    assert state is not None and state.step == 4 and len(state.window) == 1
    with pytest.raises(UserError, match=r"started with ema 0\.5 and the config says 0\.0"):
        distill.main(configure(distill_keys, tmp_path, **{**SETTINGS, "ema": 0.0}))
    torch.manual_seed(12345)  # another process has another global random state
    distill.main(config)
    assert_same(tmp_path, straight)


def test_a_run_killed_at_a_random_step_continues(
    distill_keys: dict[str, Any], straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`kill -9` cannot be caught: whatever was half-written then must not matter."""
    config = configure(distill_keys, tmp_path / "run", **SETTINGS)
    (tmp_path / "config.yaml").write_text(dump(config))
    command = [sys.executable, "-c", RUN, str(tmp_path / "config.yaml")]
    wanted, delay = random.choice(("step-000002", "step-000004", "step-000006")), random.uniform(0, 0.3)
    process = subprocess.Popen(
        command, env=environment(torch.get_num_threads()), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    state = tmp_path / "run/state" / wanted
    while process.poll() is None and not state.exists():
        time.sleep(0.01)
    time.sleep(delay)
    process.kill()
    _, errors = process.communicate()
    assert process.returncode in (-signal.SIGKILL, 0), errors.decode()[-2000:]
    assert newest(tmp_path / "run") is not None, f"killed before {wanted}"
    capsys.readouterr()
    distill.main(config)
    said = capsys.readouterr().out
    assert "continuing after step" in said or "nothing to do" in said
    assert_same(tmp_path / "run", straight)


def test_a_finished_run_is_left_alone_and_can_be_extended(
    distill_keys: dict[str, Any], straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    straight = Path(shutil.copytree(straight, tmp_path / "run"))  # other tests compare with the original
    before = {path: path.stat().st_mtime_ns for path in straight.rglob("*") if path.is_file()}
    distill.main(configure(distill_keys, straight, **SETTINGS))
    assert "finished, 7 steps of 7; nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in straight.rglob("*") if path.is_file()} == before
    distill.main(configure(distill_keys, straight, **{**SETTINGS, "steps": 8}))
    assert "continuing after step 7 of 8" in capsys.readouterr().out
    assert json.loads((straight / "adapter/adapter.json").read_text())["steps"] == 8
