"""Around the step: learning rate, run folder, state, metrics."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from pydantic import TypeAdapter

from lcm_kit import runtime
from lcm_kit.config.schema import Distill, Optimizer
from lcm_kit.errors import UserError
from tests.recipes.small import TEMPLATE, configure


@pytest.fixture(autouse=True)
def _cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def state(step: int) -> runtime.State:
    lora = {"a.lora_A.weight": torch.full((2, 2), float(step))}
    return runtime.State(step, lora, {}, {"state": {}, "param_groups": []}, None, [0.5])


def config(output: Path, **changes: Any) -> Distill:
    return configure(TEMPLATE, output, **changes)


def rates(schedule: str, steps: int, warmup: int) -> list[float]:
    optimizer = TypeAdapter(Optimizer).validate_python(
        {"lr": 2.0, "schedule": schedule, "warmup_steps": warmup}
    )
    return [runtime.learning_rate(optimizer, step, steps) for step in range(steps)]


def test_learning_rates() -> None:
    assert rates("constant", 4, 2) == [1.0, 2.0, 2.0, 2.0]
    assert rates("linear", 4, 0) == [2.0, 1.5, 1.0, 0.5]
    assert rates("linear", 6, 2) == [1.0, 2.0, 2.0, 1.5, 1.0, 0.5]
    assert rates("cosine", 4, 0) == pytest.approx([2.0, 1 + math.sqrt(0.5), 1.0, 1 - math.sqrt(0.5)])
    assert rates("cosine", 2, 2) == [1.0, 2.0]  # warm-up only: nothing is divided by zero


def test_flat_names_every_key(tmp_path: Path) -> None:
    flat = runtime.flat(config(tmp_path))
    assert flat["optimizer.lr"] == 1e-2
    assert flat["optimizer.betas"] == [0.9, 0.999]
    assert flat["base.path"] == "asset:tiny-sd"


def test_states_are_kept_whole_and_pruned(tmp_path: Path) -> None:
    assert runtime.newest_state(tmp_path) is None
    for step in (9, 10, 100):
        runtime.save_state(tmp_path, state(step), keep=2)
    assert sorted(os.listdir(tmp_path / "state")) == ["step-000010", "step-000100"]
    found = runtime.newest_state(tmp_path)
    assert found is not None and found.step == 100 and found.window == [0.5]
    assert torch.equal(found.lora["a.lora_A.weight"], torch.full((2, 2), 100.0))


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    runtime.save_state(tmp_path, state(5), keep=2)
    (tmp_path / "state/step-000005/training.pt").write_bytes(b"half")
    with pytest.raises(UserError, match="step-000005: this state cannot be read"):
        runtime.newest_state(tmp_path)


def test_a_half_written_state_is_ignored_and_swept(tmp_path: Path) -> None:
    runtime.save_state(tmp_path, state(5), keep=2)
    (tmp_path / "state/.step-000006.x.tmp").mkdir()
    found = runtime.newest_state(tmp_path)
    assert found is not None and found.step == 5
    runtime.start(config(tmp_path))
    assert os.listdir(tmp_path / "state") == ["step-000005"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_state_on_a_full_disk_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = runtime.atomic_folder

    @contextmanager
    def full(path: Path) -> Iterator[Path]:
        with whole(path) as folder:
            (folder / "training.pt").symlink_to("/dev/full")
            yield folder

    monkeypatch.setattr(runtime, "atomic_folder", full)
    with pytest.raises(UserError, match="No space left"):
        runtime.save_state(tmp_path, state(5), keep=2)
    assert os.listdir(tmp_path / "state") == []


def test_metrics_are_cut_to_the_resumed_step(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text(
        '{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n{"step": 3, "loss": 1.0}\n{"step": 2, "lo'
    )
    accelerator = runtime.start(config(tmp_path))
    metrics = runtime.Metrics.open(config(tmp_path), accelerator, 2)
    metrics.log(3, loss=1.5, grad_norm=math.inf)  # float16 may overflow in a step that is then skipped
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 3, "loss": 1.5}]


def claim(run: Path, **changes: Any) -> bool:
    return runtime.claim(config(run, **changes), Accelerator())


def test_another_config_is_refused_by_its_key(tmp_path: Path) -> None:
    assert claim(tmp_path)
    assert claim(tmp_path, seed=1)  # nothing is trained yet
    runtime.save_state(tmp_path, state(2), keep=2)
    assert claim(tmp_path, seed=1)
    with pytest.raises(UserError, match=r"started with seed 1 and the config says 0"):
        claim(tmp_path)
    with pytest.raises(UserError, match=r"started with adapter\.rank 4 and the config says 8"):
        claim(tmp_path, seed=1, adapter={"rank": 8})
    assert claim(
        tmp_path, seed=1, steps=9, validation={"count": 1}, checkpoint={"every": 1}, logging={"every": 5}
    )
    assert "steps: 9" in (tmp_path / "config.yaml").read_text()


def test_a_finished_run_does_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert claim(tmp_path)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter.json").write_text('{"steps": 4}')
    assert not claim(tmp_path)
    assert "finished, 4 steps of 4; nothing to do" in capsys.readouterr().out
    with pytest.raises(UserError, match="state/ is gone"):
        claim(tmp_path, steps=8)


def test_impossible_settings_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "get_available_trackers", lambda: ["tensorboard"])
    with pytest.raises(UserError, match="'tensorbord' is not a tracker .* choose from .*tensorboard"):
        runtime.start(config(tmp_path, logging={"trackers": ["tensorbord"]}))
    with pytest.raises(UserError, match="'wandb' is not installed"):
        runtime.start(config(tmp_path, logging={"trackers": ["wandb"]}))
    with pytest.raises(UserError, match="float16 does not train on a CPU"):
        runtime.start(config(tmp_path, precision="float16"))
    assert runtime.dtype(runtime.start(config(tmp_path, precision="bfloat16"))) == torch.bfloat16
    assert runtime.dtype(runtime.start(config(tmp_path))) == torch.float32


def test_a_diverged_loss_is_an_error() -> None:
    assert runtime.finite(torch.tensor(0.25), 3) == 0.25
    with pytest.raises(UserError, match="nan at step 3"):
        runtime.finite(torch.tensor(math.nan), 3)
