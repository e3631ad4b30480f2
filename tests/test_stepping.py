"""A step over two processes and after a failed try, what is no number, and float16's scaler; on the CPU."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import Tensor, nn

from lcm_kit.errors import UserError
from lcm_kit.training import run_metrics, runtime
from lcm_kit.training.stepping import Guard, Passes, Step
from tests.recipes.small import TEMPLATE, configure

SAMPLES = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.5, 4.0], [-2.0, 1.0]])
CLIP = 0.75


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


# -- Two processes -------------------------------------------------------------------------------------------


class FirstOfTwo:
    """What `Passes` asks of an accelerator that is the first of two processes, the other being `other`."""

    num_processes = 2
    distributed_type = DistributedType.MULTI_CPU
    device = torch.device("cpu")

    def __init__(self, other: Step) -> None:
        self.other = other

    def reduce(self, value: Tensor, reduction: str = "sum") -> Tensor:
        return (value + self.other.loss) / (2 if reduction == "mean" else 1)

    def no_sync(self, model: Any) -> Any:
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def unscale_gradients(self) -> None:
        pass


def step_of(
    accelerator: Any, samples: Tensor, clip: float = CLIP, micro: int = 1
) -> tuple[Step, list[Tensor]]:
    """One step of w, b at ones on the losses (x . w + b)^2, and the gradients that it leaves."""
    w, b = torch.ones(2, requires_grad=True), torch.ones(1, requires_grad=True)
    passes = Passes(accelerator, None, [w, b], len(samples), micro, clip)
    made = passes(1, lambda part: (samples[part] @ w + b).square())
    assert w.grad is not None and b.grad is not None
    return made, [w.grad, b.grad]


def test_two_processes_have_the_mean_of_their_losses_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: x . w + b is 4, 3, 5.5, 0, and the gradient is twice the mean of that times x, or 1."""
    loss, gradient = 13.8125, [torch.tensor([7.875, 13.5]), torch.tensor([6.25])]
    norm = torch.cat(gradient).norm()
    alone = Accelerator()
    other, grads = step_of(alone, SAMPLES[2:], clip=1e9)

    def all_reduce(flat: Tensor) -> None:
        assert flat.shape == (3,)
        flat += torch.cat(grads)

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    monkeypatch.setattr("lcm_kit.training.stepping.any_of", lambda accelerator, flag: flag)
    for found, left in (step_of(FirstOfTwo(other), SAMPLES[:2]), step_of(alone, SAMPLES, micro=4)):
        assert found.loss == pytest.approx(loss) and found.norm == pytest.approx(float(norm))
        for mine, wanted in zip(left, gradient, strict=True):
            torch.testing.assert_close(mine, wanted * CLIP / norm)


def test_a_flag_of_one_process_counts_for_all() -> None:
    class Two(FirstOfTwo):
        def __init__(self, flag: bool) -> None:
            self.flag = flag

        def reduce(self, value: Tensor, reduction: str = "sum") -> Tensor:
            return (value + float(self.flag)) / (2 if reduction == "mean" else 1)

    said = [[runtime.any_of(Two(other), mine) for mine in (False, True)] for other in (False, True)]  # type: ignore[arg-type]
    assert said == [[False, True], [True, True]]


# -- Memory and losses that are no numbers -------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: out of memory"),
    ],
    ids=["torch", "cudnn", "cublas", "cuda"],
)
def test_a_try_that_ran_out_of_memory_leaves_no_gradient(
    error: RuntimeError, capsys: pytest.CaptureFixture[str]
) -> None:
    """It runs out in the second half, when the first half's gradients are there already."""
    whole, wanted = step_of(Accelerator(), SAMPLES, micro=2)
    w, b = torch.ones(2, requires_grad=True), torch.ones(1, requires_grad=True)
    passes = Passes(Accelerator(), None, [w, b], 4, 2, CLIP)
    sizes: list[int] = []

    def losses_of(part: slice) -> Tensor:
        sizes.append(len(SAMPLES[part]))
        if len(sizes) == 2:
            raise error
        return (SAMPLES[part] @ w + b).square()

    made = passes(3, losses_of)
    assert sizes == [2, 2, 1, 1, 1, 1] and "out of memory at step 3" in capsys.readouterr().out
    assert made.loss == pytest.approx(whole.loss) and made.norm == pytest.approx(whole.norm)
    for mine, other in zip((w.grad, b.grad), wanted, strict=True):
        torch.testing.assert_close(mine, other)


def test_another_error_is_no_lack_of_memory() -> None:
    passes = Passes(Accelerator(), None, [torch.ones(1, requires_grad=True)], 4, 4, CLIP)

    def losses_of(part: slice) -> Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        passes(1, losses_of)


def guard(tmp_path: Path, accelerator: Any, how: str, steps: int = 100) -> Guard:
    config = configure(TEMPLATE, tmp_path, non_finite=how, steps=steps)
    return Guard(accelerator, config, run_metrics.Metrics.open(config, accelerator, 0))


def step(loss: float, norm: float, *losses: float) -> Step:
    return Step(loss, norm, torch.tensor(losses or (loss, loss)))


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (step(math.nan, 1.0, 0.5, math.nan), "the loss is nan at step 7, records b: training diverged"),
        (step(math.inf, 1.0, math.inf, 1.0), "the loss is inf at step 7, records a: training diverged"),
        (step(1.0, math.inf), "the gradient's norm is inf at step 7, records a, b: training diverged"),
    ],
)
def test_what_is_no_number_stops_and_names_its_records(tmp_path: Path, made: Step, said: str) -> None:
    stops = guard(tmp_path, Accelerator(), "stop")
    assert stops.accepts(6, step(1.0, 1.0), ["a", "b"])
    with pytest.raises(UserError, match=said):
        stops.accepts(7, made, ["a", "b"])


def test_the_tenth_skipped_step_in_a_row_stops(tmp_path: Path) -> None:
    skips = guard(tmp_path, Accelerator(), "skip")
    bad, number = step(math.nan, 1.0), 0
    for good in (False, True, False):
        for _ in range(1 if good else 9):
            number += 1
            assert skips.accepts(number, step(1.0, 1.0) if good else bad, ["a", "b"]) is good
    with pytest.raises(UserError, match="at step 20, records a, b, the 10th in a row: training diverged"):
        skips.accepts(20, bad, ["a", "b"])


# -- Float16's scaler ----------------------------------------------------------------------------------------


def with_scaler() -> Any:
    """An accelerator as float16 has it on a GPU: accelerate itself refuses that on a CPU, torch does not."""
    accelerator = Accelerator()
    accelerator.state._mixed_precision = "fp16"
    accelerator.native_amp = True
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    return accelerator


def test_the_step_after_a_skipped_one_is_made_and_the_scale_is_halved(tmp_path: Path) -> None:
    """Clipping tells the scaler of the gradients; without its update it would refuse the next step's."""
    accelerator = with_scaler()
    w = nn.Parameter(torch.tensor([2.0]))
    optimizer = accelerator.prepare_optimizer(torch.optim.SGD([w], lr=0.1))
    passes = Passes(accelerator, nn.Linear(1, 1), [w], 1, 1, 1e9)
    skips = guard(tmp_path, accelerator, "skip")
    assert skips.accepts(0, step(1.0, math.inf), ["a record"])  # the scaler itself leaves that update out
    made = []
    for number, factor in enumerate((1.0, float("nan"), 1.0), start=1):
        optimizer.zero_grad()
        found = passes(number, lambda part, factor=factor: factor * w**2)
        if skips.accepts(number, found, ["a record"]):
            optimizer.step()
        made.append((float(w.detach()), accelerator.scaler.get_scale()))
    # w - 0.1 * 2 w is 0.8 w: the gradient was scaled back before it was used
    assert made == [(pytest.approx(1.6), 1024.0), (pytest.approx(1.6), 512.0), (pytest.approx(1.28), 512.0)]


def test_updates_that_float16_always_leaves_out_stop_the_run(tmp_path: Path) -> None:
    skips, over = guard(tmp_path, with_scaler(), "stop"), step(1.0, math.inf)
    for number in range(1, 24):
        assert skips.accepts(number, over, ["a"])
    assert skips.accepts(24, step(1.0, 1.0), ["a"])  # one that is made ends the row
    for number in range(25, 48):
        assert skips.accepts(number, over, ["a"])
    with pytest.raises(
        UserError, match="last 24 steps until step 48 overflowed in float16, at a scale of 1024"
    ):
        skips.accepts(48, over, ["a"])


@pytest.mark.parametrize("made", [0, 1])
def test_a_run_that_made_no_update_does_not_finish(
    made: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    skips, last = guard(tmp_path, with_scaler(), "stop", steps=5), 5
    for number in range(1, last):
        assert skips.accepts(number, step(1.0, 1.0 if number <= made else math.inf), ["a"])
    if made:
        assert skips.accepts(last, step(1.0, math.inf), ["a"])
        assert "4 updates were left out" in capsys.readouterr().out
    else:
        with pytest.raises(UserError, match=f"of the last {last} steps .* no update was made by them"):
            skips.accepts(last, step(1.0, math.inf), ["a"])
