"""Updates that are made, left out and told of: by the host at once, by a flag on the device a step late."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from lcm_kit.errors import UserError
from lcm_kit.training import run_metrics
from lcm_kit.training.stepping import Passes, Step
from lcm_kit.training.updates import Guard
from tests.recipes.small import TEMPLATE, configure

EMA = 0.75
IDS = ["a", "b"]
both_ways = pytest.mark.parametrize("fused", [False, True], ids=["by the host", "by a flag"])


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


def with_scaler() -> Any:
    """An accelerator as float16 has it on a GPU: accelerate itself refuses that on a CPU, torch does not."""
    accelerator = Accelerator()
    accelerator.state._mixed_precision = "fp16"
    accelerator.native_amp = True
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    return accelerator


class Run:
    """70 weights that are trained, two samples a step, by the losses that a test wants."""

    def __init__(
        self, folder: Path, accelerator: Any, fused: bool, how: str = "skip", steps: int = 100
    ) -> None:
        g = torch.Generator().manual_seed(0)  # 70: more than the average moves at once
        self.weights = [nn.Parameter(torch.randn(3, generator=g)) for _ in range(70)]
        self.ema = [w.detach().clone() for w in self.weights]
        self.plain = torch.optim.AdamW(self.weights, lr=0.1, fused=fused)
        optimizer = accelerator.prepare_optimizer(self.plain)
        config = configure(TEMPLATE, folder, non_finite=how, steps=steps, ema=EMA)
        metrics = run_metrics.Metrics.open(config, accelerator, 0)
        self.passes = Passes(accelerator, nn.Linear(1, 1), self.weights, 2, 2, 1e9)
        self.guard = Guard(accelerator, config, metrics, optimizer, self.weights, self.ema)
        self.optimizer, self.accelerator, self.file = optimizer, accelerator, folder / "metrics.jsonl"

    def step(self, number: int, *factors: float) -> None:
        """A step on the losses factor * sum of squares, for each sample a factor."""
        scale = torch.tensor(factors or (1.0, 2.0))
        square = lambda: torch.stack([w.square().sum() for w in self.weights]).sum()  # noqa: E731
        made = self.passes(number, lambda part: scale[part] * square())
        self.guard.update(number, made, IDS)
        self.optimizer.zero_grad()

    def state(self) -> list[Tensor]:
        """Weights, their average, and all that the optimizer holds."""
        held = [value for w in self.weights for value in self.plain.state[w].values()]
        return [t.detach().clone() for t in (*self.weights, *self.ema, *held)]

    def lines(self) -> list[dict[str, float]]:
        if not self.file.exists():
            return []
        told = map(json.loads, self.file.read_text().splitlines())
        return [{key: value for key, value in line.items() if key != "hash"} for line in told]


# -- What is no number ---------------------------------------------------------------------------------------


@both_ways
@pytest.mark.parametrize("bad", [(1.0, math.nan), (math.inf, 1.0), (-math.inf, math.inf)])
def test_a_bad_step_moves_nothing(tmp_path: Path, fused: bool, bad: tuple[float, float]) -> None:
    """Not even the optimizer's count of steps: the run ends as one that never had it, bit for bit."""
    spoilt, straight = (Run(tmp_path / name, Accelerator(), fused) for name in ("spoilt", "straight"))
    for run, factors in ((spoilt, [(), (), bad, (3.0, 1.0), ()]), (straight, [(), (), (3.0, 1.0), ()])):
        for number, given in enumerate(factors, 1):
            before = run.state()
            run.step(number, *given)
            now = run.state()
            assert (given is bad) == all(map(torch.equal, before, now)) and len(now) >= len(before)
            assert all(t.isfinite().all() for t in now)
        run.guard.settle()
    assert all(map(torch.equal, spoilt.state(), straight.state()))
    assert spoilt.guard.window == straight.guard.window and len(straight.guard.window) == 4
    assert (spoilt.guard.updates, spoilt.guard.skipped) == (4, 0)
    assert spoilt.lines() == [{"step": 3, "skipped": 1.0}] and straight.lines() == []


@both_ways
def test_the_first_step_may_be_the_bad_one(tmp_path: Path, fused: bool) -> None:
    spoilt, straight = (Run(tmp_path / name, Accelerator(), fused) for name in ("spoilt", "straight"))
    spoilt.step(1, math.nan, 1.0)
    for run in (spoilt, straight):
        run.step(2)
        run.step(3)
        run.guard.settle()
    assert all(map(torch.equal, spoilt.state(), straight.state()))


def test_a_flag_gives_the_weights_and_the_average_of_the_host(tmp_path: Path) -> None:
    """To rounding: fused AdamW rounds otherwise, and so does an average that moves by a factor."""
    runs = [Run(tmp_path / str(fused), Accelerator(), fused) for fused in (False, True)]
    for number, factors in enumerate([(), (0.5, 1.0), (math.nan, 1.0), (1.0, 1.0)], 1):
        for run in runs:
            run.step(number, *factors)
            run.guard.settle()
    for ours, theirs in zip(runs[0].weights + runs[0].ema, runs[1].weights + runs[1].ema, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert runs[0].guard.window == pytest.approx(runs[1].guard.window)


def test_only_the_flag_is_told_of_a_step_late(tmp_path: Path) -> None:
    """The host that decides has read; the flagged one reads when the next step is there, or is asked to."""
    for fused in (False, True):
        run = Run(tmp_path / str(fused), Accelerator(), fused)
        run.step(1, 1.0, 1.0)
        assert math.isnan(run.guard.last.loss) == fused and len(run.guard.window) == 1 - fused
        run.step(2, math.nan, 1.0)
        assert len(run.guard.window) == 1 and run.lines() == ([] if fused else [{"step": 2, "skipped": 1.0}])
        run.guard.settle()
        assert math.isnan(run.guard.last.loss) and run.lines() == [{"step": 2, "skipped": 1.0}]
        run.guard.settle()
        assert run.lines() == [{"step": 2, "skipped": 1.0}]


@both_ways
@pytest.mark.parametrize(
    ("factors", "said"),
    [
        ((0.5, math.nan), "the loss is nan at step 2, records b: training diverged"),
        ((math.inf, 1.0), "the loss is inf at step 2, records a: training diverged"),
    ],
)
def test_what_is_no_number_stops_and_names_its_records(
    tmp_path: Path, fused: bool, factors: tuple[float, float], said: str
) -> None:
    run = Run(tmp_path, Accelerator(), fused, "stop")
    run.step(1)
    before = run.state()
    with pytest.raises(UserError, match=said):
        run.step(2, *factors)
        run.step(3)  # which is as late as it gets
    assert all(map(torch.equal, before, run.state()))  # nor did the third step's update come to pass


@both_ways
def test_a_gradient_alone_stops_too(tmp_path: Path, fused: bool) -> None:
    run = Run(tmp_path, Accelerator(), fused, "stop")
    before = [w.detach().clone() for w in run.weights]
    step = Step(torch.tensor(1.0), torch.tensor(math.inf), torch.tensor([1.0, 1.0]))
    for w in run.weights:
        w.grad = torch.full_like(w, math.nan)
    with pytest.raises(UserError, match="the gradient's norm is inf at step 7, records a, b: training div"):
        run.guard.update(7, step, IDS)
        run.guard.settle()
    assert all(map(torch.equal, before, run.weights))


@both_ways
def test_the_tenth_skipped_step_in_a_row_stops(tmp_path: Path, fused: bool) -> None:
    run = Run(tmp_path, Accelerator(), fused)
    for number, bad in enumerate([*[True] * 9, False, *[True] * 9], 1):
        run.step(number, *((math.nan, math.nan) if bad else ()))
    run.guard.settle()
    assert [line["step"] for line in run.lines()] == [*range(1, 10), *range(11, 20)]
    with pytest.raises(UserError, match="at step 20, records a, b, the 10th in a row: training diverged"):
        run.step(20, math.nan, math.nan)
        run.step(21)


# -- Float16's scaler ----------------------------------------------------------------------------------------


@both_ways
def test_the_step_after_a_skipped_one_is_made_and_the_scale_is_halved(tmp_path: Path, fused: bool) -> None:
    """Clipping tells the scaler of the gradients; without its update it would refuse the next step's."""
    run, scales = Run(tmp_path, with_scaler(), fused), []
    for number, factors in enumerate([(), (math.nan, 1.0), (1.0, 1e36), ()], 1):
        before = run.state()
        run.step(number, *factors)
        scales.append(run.accelerator.scaler.get_scale())
        assert (number in (2, 3)) == all(map(torch.equal, before, run.state()))
    run.guard.settle()
    # a loss that is none, then finite losses whose scaled gradients are not: only the first is a fault
    assert scales == [1024.0, 512.0, 256.0, 256.0] and run.lines() == [{"step": 2, "skipped": 1.0}]
    assert (run.guard.updates, run.guard.left_out, len(run.guard.window)) == (2, 1, 3)


@both_ways
def test_a_loss_that_is_none_with_gradients_that_fit_is_left_out(tmp_path: Path, fused: bool) -> None:
    """The scaler alone would make that update."""
    run = Run(tmp_path, with_scaler(), fused)
    run.step(1)
    before = run.state()
    made = run.passes(
        2, lambda part: torch.stack([w.square().sum() for w in run.weights]).sum()[None].expand(2)
    )
    run.guard.update(2, made._replace(loss=torch.tensor(math.nan)), IDS)
    run.guard.settle()
    assert all(map(torch.equal, before, run.state())) and run.lines() == [{"step": 2, "skipped": 1.0}]


def over(run: Run, number: int) -> None:
    run.step(number, 1.0, 1e36)


@both_ways
def test_updates_that_float16_always_leaves_out_stop_the_run(tmp_path: Path, fused: bool) -> None:
    accelerator = with_scaler()
    run = Run(tmp_path, accelerator, fused, "stop")
    for number in range(1, 24):
        over(run, number)
        accelerator.scaler.update(1024.0)  # as if it did not learn
    run.step(24)  # one that is made ends the row
    for number in range(25, 48):
        over(run, number)
        accelerator.scaler.update(1024.0)
    with pytest.raises(
        UserError, match="last 24 steps until step 48 overflowed in float16, at a scale of 1024"
    ):
        over(run, 48)
        run.guard.settle()


@both_ways
@pytest.mark.parametrize("made", [0, 1])
def test_a_run_that_made_no_update_does_not_finish(
    made: int, fused: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, last = Run(tmp_path, with_scaler(), fused, "stop", steps=5), 5
    for number in range(1, last):
        run.step(number) if number <= made else over(run, number)
    if made:
        over(run, last)
        run.guard.settle()
        assert "4 updates were left out" in capsys.readouterr().out
    else:
        with pytest.raises(UserError, match=f"of the last {last} steps .* no update was made by them"):
            over(run, last)
            run.guard.settle()
