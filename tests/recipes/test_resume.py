"""An interrupted run, continued, is the uninterrupted one bit for bit: weights, moments, EMA, metrics."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from lcm_kit.adapter.roles import Given, Roles
from lcm_kit.config.load import dump
from lcm_kit.core.schedule import grid_steps
from lcm_kit.data.images import encode
from lcm_kit.errors import UserError
from lcm_kit.io import locks
from lcm_kit.training import checkpoints, run_files
from tests.recipes.small import configure, contents, environment, interrupted
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
    before, after = (state.optimizers["adapter"]["state"] for state in (a, b))
    for index, moments in after.items():
        assert all(torch.equal(before[index][name], value) for name, value in moments.items())
    assert metrics(run) == metrics(straight)


def metrics(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6, 7]
    return [
        {key: value for key, value in line.items() if key not in ("images_per_second", "hash")}
        for line in lines
    ]


def test_a_run_stopped_by_an_exception_continues(
    distill_keys: dict[str, Any], straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(distill_keys, tmp_path, **SETTINGS)
    interrupted(config, monkeypatch, at=5)
    state = newest(tmp_path)
    assert state is not None and state.step == 4 and len(state.window) == 1
    with pytest.raises(UserError, match=r"started with ema 0\.5 and the config says 0\.0"):
        distill.main(configure(distill_keys, tmp_path, **{**SETTINGS, "ema": 0.0}))
    torch.manual_seed(12345)  # another process has another global random state
    distill.main(config)
    assert_same(tmp_path, straight)
    whole = contents(straight)
    assert contents(tmp_path) == whole and len(whole) == 2 * 4 + 2  # manifests and pickled moments too


@pytest.mark.slow
def test_a_constant_and_a_choice_of_t_that_depend_on_the_step_continue(
    distill_keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cauchy's adapted c and lognormal t are those of the step, whatever ran before: bit for bit."""
    robust = {
        **SETTINGS,
        "loss": {"name": "cauchy", "c": 0.03, "adaptive": True},
        "grid": {"steps": 20, "steps_start": 5, "sampling": "lognormal"},
    }
    losses = Roles.losses
    seen: list[int | None] = []

    def look(self: Roles, given: Given) -> torch.Tensor:
        seen.append(given.intervals)
        return losses(self, given)

    with monkeypatch.context() as patch:
        patch.setattr(Roles, "losses", look)
        distill.main(configure(distill_keys, tmp_path / "once", **robust))
    assert seen == [grid_steps(step, 7, 5, 20) for step in range(7)] == [5, 5, 5, 10, 10, 20, 20]
    steady = {**robust, "loss": {"name": "cauchy", "c": 0.03}}
    distill.main(configure(distill_keys, tmp_path / "steady", **steady))
    even = {**robust, "grid": {"steps": 20, "steps_start": 5}}
    distill.main(configure(distill_keys, tmp_path / "even", **even))
    twice = configure(distill_keys, tmp_path / "twice", **robust)
    interrupted(twice, monkeypatch)
    distill.main(twice)
    assert_same(tmp_path / "twice", tmp_path / "once")
    whole = contents(tmp_path / "once")
    assert contents(tmp_path / "twice") == whole and len(whole) == 2 * 4 + 2
    files = [tmp_path / name / "adapter/lora.safetensors" for name in ("once", "steady", "even")]
    assert len({file.read_bytes() for file in files}) == 3  # both keys have an effect


def test_what_is_known_by_its_contents_may_move(
    distill_keys: dict[str, Any], straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pictures, cache and base, from absolute paths to relative ones; bit for bit."""
    interrupted(configure(distill_keys, tmp_path / "run", **SETTINGS), monkeypatch)
    data = distill_keys["data"]
    old = {"pictures": data["path"], "cache": data["cache"], "base": distill_keys["base"]["path"]}
    for name, place in old.items():
        shutil.copytree(place, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    moved = {"data": {"path": "pictures", "cache": "cache", "batch_size": 3}, "base": {"path": "base"}}
    config = configure(distill_keys, Path("run"), **SETTINGS, **moved)
    with pytest.raises(UserError, match=r"made for another config \(data\.path .* run `lcm-kit encode`"):
        distill.main(config)
    assert encode(config, progress=False).encoded == 0  # the pictures are those that it holds
    absolute = configure(asdict(config), Path("run"), data={"path": str(tmp_path / "pictures")})
    distill.main(absolute)
    assert_same(tmp_path / "run", straight)


def test_what_changes_no_arithmetic_may_change_bit_for_bit(
    distill_keys: dict[str, Any], straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(configure(distill_keys, tmp_path, **SETTINGS), monkeypatch)
    changes = {
        "gradient_checkpointing": True, "non_finite": "skip", "memory": {"tf32": False},
        "checkpoint": {"every": 3, "keep": 1}, "validation": {"every": 2},
    }  # fmt: skip
    distill.main(configure(distill_keys, tmp_path, **{**SETTINGS, **changes}))
    assert_same(tmp_path, straight)


@pytest.mark.parametrize(("batch_size", "accumulation"), [(1, 2)])
def test_a_step_may_be_made_of_other_parts(
    distill_keys: dict[str, Any], straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    batch_size: int, accumulation: int,
) -> None:  # fmt: skip
    """Sums come in another order: weights of 0.01 to 0.1, after 3 steps of 1e-2, agree to 1e-4."""
    interrupted(configure(distill_keys, tmp_path, **SETTINGS), monkeypatch)
    with pytest.raises(UserError, match=r"with batch_size x accumulation 2 x 1 and the config says 2 x 2"):
        distill.main(configure(distill_keys, tmp_path, **SETTINGS, accumulation=2))
    parts = {"batch_size": batch_size, "accumulation": accumulation}
    distill.main(configure(distill_keys, tmp_path, **SETTINGS, **parts))
    a, b = newest(tmp_path), newest(straight)
    assert a is not None and b is not None
    assert max(float((a.lora[key] - b.lora[key]).abs().max()) for key in b.lora) < 1e-4
    for mine, other in zip(metrics(tmp_path), metrics(straight), strict=True):
        assert mine == pytest.approx(other, rel=1e-4)


def test_other_contents_are_refused_wherever_they_lie(
    distill_keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(configure(distill_keys, tmp_path / "run", **SETTINGS), monkeypatch)
    base = Path(shutil.copytree(distill_keys["base"]["path"], tmp_path / "base"))
    file = base / "scheduler/scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "beta_end": 0.013}))
    with pytest.raises(UserError, match=r"the base has changed .* its noise schedule is not\); give back"):
        distill.main(configure(distill_keys, tmp_path / "run", **SETTINGS, base={"path": str(base)}))


def test_a_refused_run_leaves_no_folder_and_two_runs_no_mixture(
    distill_keys: dict[str, Any], tmp_path: Path
) -> None:
    missing = configure(distill_keys, tmp_path / "a/run", **SETTINGS, data={"cache": str(tmp_path / "none")})
    with pytest.raises(UserError, match="there is no finished cache"):
        distill.main(missing)
    assert list(tmp_path.iterdir()) == []
    with locks.held(tmp_path / "run", "train"):
        with pytest.raises(UserError, match=rf"run: process {os.getpid()} is at work there"):
            distill.main(configure(distill_keys, tmp_path / "run", **SETTINGS))
        assert [path.name for path in (tmp_path / "run").iterdir()] == [".train.lock"]


def test_a_finished_run_that_fails_to_go_on_is_as_it_was(
    distill_keys: dict[str, Any], straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(shutil.copytree(straight, tmp_path / "run"))
    more = configure(distill_keys, run, **{**SETTINGS, "steps": 9})
    before = (run / "config.yaml").read_bytes()
    interrupted(more, monkeypatch, at=7)
    assert (run / "config.yaml").read_bytes() == before
    interrupted(more, monkeypatch, at=8)  # after step 8 was saved
    assert "steps: 9" in (run / "config.yaml").read_text()
    assert [folder.name for folder in run_files.folders(run)] == ["step-000007", "step-000008"]


@pytest.mark.slow  # processes that import torch anew
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
    assert "finished, 7 of 7 steps; nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in straight.rglob("*") if path.is_file()} == before
    distill.main(configure(distill_keys, straight, **{**SETTINGS, "steps": 8}))
    assert "continuing after step 7 of 8" in capsys.readouterr().out
    assert json.loads((straight / "adapter/adapter.json").read_text())["steps"] == 8


def test_a_run_that_diverged_goes_on_as_the_message_says(
    distill_keys: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the last good state, with the rate that the command gives: what comes after is of that rate."""
    steady: dict[str, Any] = {"checkpoint": {"every": 1}, "logging": {"every": 1}}
    distill.main(configure(distill_keys, tmp_path / "run", **steady, steps=2))
    good = newest(tmp_path / "run")
    with pytest.raises(
        UserError, match=r"step-000003\); train again, which goes on from there, with a lower"
    ):
        distill.main(configure(distill_keys, tmp_path / "run", **steady, steps=6, optimizer={"lr": 1e9}))
    shutil.rmtree(
        tmp_path / "run/state/step-000003"
    )  # a state after the first of the wild steps: finite, and lost
    capsys.readouterr()
    distill.main(configure(distill_keys, tmp_path / "run", **steady, steps=4, optimizer={"lr": 1e-4}))
    assert "optimizer.lr was" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["lr"] for line in lines] == [1e-2, 1e-2, 1e-4, 1e-4]
    after = newest(tmp_path / "run")
    assert good is not None and after is not None and after.step == 4
    moved = max(float((after.lora[key] - good.lora[key]).abs().max()) for key in good.lora)
    assert 0 < moved < 2.5e-4  # two of Adam's steps, each of about the rate
