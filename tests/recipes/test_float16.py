"""Training in float16 with its gradient scaler, from the first step to the exported weights, on a CPU.

accelerate gives a scaler to GPUs alone, and so the kit refuses float16 on a CPU. torch has all that it takes,
and the optimizer is the fused one on both. So what accelerate leaves out is put in its place here, and the
recipe is the one that runs on a GPU.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from lcm_kit.training import checkpoints, run_files, runtime
from tests.recipes.small import configure, contents, interrupted
from train import distill

# Gradients of the small base overflow at first and fit after some halvings; the scale grows after three
# good steps, so that it is not the same from one step to the next, and neither is its counter
SCALER = {"init_scale": 2.0**22, "growth_interval": 3}
STEPS, BROKEN = 12, 9  # the second is the step whose loss is no number
SETTINGS: dict[str, Any] = {
    "steps": STEPS,
    "precision": "float16",
    "ema": 0.5,
    "non_finite": "skip",
    "optimizer": {"schedule": "cosine", "warmup_steps": 2},
    "checkpoint": {"every": 1, "keep": STEPS},
}


@pytest.fixture(autouse=True)
def _float16(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU has: an accelerator with autocast and a scaler in float16."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    made = Accelerator.__init__

    def make(self: Any, *args: Any, **settings: Any) -> None:
        made(self, *args, **settings)
        if self.state.mixed_precision == "fp16":
            self.native_amp, self.scaler = True, torch.amp.GradScaler("cpu", **SCALER)

    precision = runtime._precision
    monkeypatch.setattr(Accelerator, "__init__", make)
    monkeypatch.setattr(
        runtime, "_precision",
        lambda wanted, device: wanted if wanted == "float16" else precision(wanted, device),
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _broken(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = distill.step_randomness

    def spoil(*args: Any) -> Any:
        drawn = draw(*args)
        return drawn._replace(noise=drawn.noise * math.nan) if args[-1] == BROKEN - 1 else drawn

    monkeypatch.setattr(distill, "step_randomness", spoil)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs that several tests look at, by name; each is made by the first that asks."""
    return {"": tmp_path_factory.mktemp("float16")}


def straight(runs: dict[str, Path], keys: dict[str, Any], name: str = "straight", **changes: Any) -> Path:
    """The run that nothing interrupts."""
    if name not in runs:
        runs[name] = distill.main(configure(keys, runs[""] / name, **{**SETTINGS, **changes}))
    return runs[name]


def states(run: Path) -> list[checkpoints.State]:
    """After each step."""
    found = [checkpoints.read(folder) for folder in run_files.folders(run)]
    assert [state.step for state in found] == list(range(1, STEPS + 1))
    return found


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def lines(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def timeless(run: Path) -> list[dict[str, float]]:
    other = ("images_per_second", "hash")
    return [{key: value for key, value in line.items() if key not in other} for line in lines(run)]


def test_the_scale_is_found_by_updates_that_are_left_out(
    runs: dict[str, Path], distill_keys: dict[str, Any]
) -> None:
    """Half after an overflow, where the weights stay; twice after three good steps (GradScaler)."""
    scale, good, weights, overflows, grown = SCALER["init_scale"], 0, None, 0, 0
    run = straight(runs, distill_keys)
    norms = {int(line["step"]): line.get("grad_norm") for line in lines(run)}
    for state in states(run):
        assert state.scaler is not None
        left_out = norms[state.step] is None  # a norm that is not finite is not logged
        if left_out:
            scale, good, overflows = scale / 2, 0, overflows + 1
        else:
            good = (good + 1) % 3
            scale, grown = (scale, grown) if good else (scale * 2, grown + 1)
        assert (state.scaler["scale"], state.scaler["_growth_tracker"]) == (scale, good)
        if weights is not None:
            assert same(weights, state.lora) == left_out
        weights = state.lora
    assert overflows >= 2 and grown >= 1 and STEPS - overflows >= 6
    assert weights is not None and all(t.dtype == torch.float32 for t in weights.values())
    ups = {key: tensor for key, tensor in weights.items() if "lora_B" in key}
    assert ups and all(float(tensor.abs().max()) > 1e-3 for tensor in ups.values())


def test_gradients_are_those_of_float32(runs: dict[str, Path], distill_keys: dict[str, Any]) -> None:
    """The first update that is made is of the weights that float32 begins with.

    Half precision has 11 bits: of the loss and of the norm, in which errors cancel, a percent is left.
    """
    sixteen = lines(straight(runs, distill_keys))
    first = next(line for line in sixteen if "grad_norm" in line)
    at = int(first["step"])
    # float32 at the same step's draws, with no update before: a rate of next to nothing
    still = {"optimizer": {"lr": 1e-30}, "precision": "float32", "ema": 0.0}
    exact = next(line for line in lines(straight(runs, distill_keys, "exact", **still)) if line["step"] == at)
    assert at > 2
    assert first["loss"] == pytest.approx(exact["loss"], rel=0.02)
    assert first["grad_norm"] == pytest.approx(exact["grad_norm"], rel=0.02)


@pytest.mark.parametrize("at", [1, BROKEN])  # while the scale is sought, and right after the step left out
def test_a_run_that_was_stopped_is_the_straight_one_bit_for_bit(
    at: int, runs: dict[str, Path], distill_keys: dict[str, Any], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    config = configure(distill_keys, tmp_path, **SETTINGS)
    interrupted(config, monkeypatch, at)
    assert len(run_files.folders(tmp_path)) == at
    torch.manual_seed(12345)  # another process has another global random state
    distill.main(config)
    expected = straight(runs, distill_keys)
    assert contents(tmp_path) == contents(expected)
    assert timeless(tmp_path) == timeless(expected)


def test_a_step_without_a_number_is_skipped_and_halves_the_scale(
    runs: dict[str, Path], distill_keys: dict[str, Any]
) -> None:
    run = straight(runs, distill_keys)
    before, after, later = states(run)[BROKEN - 2 : BROKEN + 1]
    assert before.scaler is not None and after.scaler is not None
    assert {line["step"] for line in lines(run) if line.get("skipped")} == {BROKEN}
    assert same(before.lora, after.lora) and same(before.ema, after.ema)
    moments = [state.optimizers["adapter"]["state"] for state in (before, after)]
    assert all(same(slots, moments[1][index]) for index, slots in moments[0].items()) and moments[0]
    assert after.scaler["scale"] == before.scaler["scale"] / 2
    assert not same(after.lora, later.lora) and all(t.isfinite().all() for t in later.lora.values())


@pytest.mark.slow
def test_the_fake_score_and_the_student_share_the_scale(
    distill_keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has an optimizer of its own: an overflow leaves its update out, and halves the scale of both."""
    settings = {**SETTINGS, "ema": 0.0, "method": {"name": "dmd"}, "non_finite": "stop"}
    expected = distill.main(configure(distill_keys, tmp_path / "straight", **settings))
    found = states(expected)
    scales = [state.scaler["scale"] for state in found if state.scaler]
    assert len(scales) == STEPS and scales[0] < SCALER["init_scale"] and min(scales) < max(scales)
    for name in ("", "fake/"):
        mine = {key: t for key, t in found[-1].lora.items() if key.startswith("fake/") == bool(name)}
        ups = [t for key, t in mine.items() if "lora_B" in key]
        assert ups and all(t.dtype == torch.float32 and float(t.abs().max()) > 1e-4 for t in ups)

    config = configure(distill_keys, tmp_path / "stopped", **settings)
    interrupted(config, monkeypatch, at=5)
    distill.main(config)
    assert contents(tmp_path / "stopped") == contents(expected)
    assert timeless(tmp_path / "stopped") == timeless(expected)
