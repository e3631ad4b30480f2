"""A step's gradients over two processes, and float16's scaler over a step that is left out; on the CPU."""

from __future__ import annotations

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

from lcm_kit import runtime
from lcm_kit.stepping import Guard, Passes, Step
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

    def clip_grad_norm_(self, parameters: list[Tensor], most: float) -> Tensor:
        return nn.utils.clip_grad_norm_(parameters, most)


def step_of(
    accelerator: Any, samples: Tensor, clip: float = CLIP, micro: int = 1
) -> tuple[Step, list[Tensor]]:
    """One step of w, b at ones on the losses (x . w + b)^2, and the gradients that it leaves."""
    w, b = torch.ones(2, requires_grad=True), torch.ones(1, requires_grad=True)
    passes = Passes(accelerator, None, [w, b], len(samples), micro, clip)
    step = passes(1, lambda part: (samples[part] @ w + b).square())
    assert w.grad is not None and b.grad is not None
    return step, [w.grad, b.grad]


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
    monkeypatch.setattr("lcm_kit.stepping.any_of", lambda accelerator, flag: flag)
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
    config = configure(TEMPLATE, tmp_path, non_finite="skip", precision="auto")
    w = nn.Parameter(torch.tensor([2.0]))
    optimizer = accelerator.prepare_optimizer(torch.optim.SGD([w], lr=0.1))
    passes = Passes(accelerator, nn.Linear(1, 1), [w], 1, 1, 1e9)
    guard = Guard(accelerator, config, runtime.Metrics.open(config, accelerator, 0))
    made = []
    for number, factor in enumerate((1.0, float("nan"), 1.0), start=1):
        optimizer.zero_grad()
        step = passes(number, lambda part, factor=factor: factor * w**2)
        if guard.accepts(number, step, ["a record"]):
            optimizer.step()
        made.append((float(w.detach()), accelerator.scaler.get_scale()))
    # w - 0.1 * 2 w is 0.8 w: the gradient was scaled back before it was used
    assert made == [(pytest.approx(1.6), 1024.0), (pytest.approx(1.6), 512.0), (pytest.approx(1.28), 512.0)]
