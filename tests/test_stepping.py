"""A step over two processes and after a failed try."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import Tensor

from lcm_kit.training import processes, runtime
from lcm_kit.training.stepping import Passes, Step

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
        assert float(found.loss) == pytest.approx(loss) and float(found.norm) == pytest.approx(float(norm))
        for mine, wanted in zip(left, gradient, strict=True):
            torch.testing.assert_close(mine, wanted * CLIP / norm)


@pytest.mark.parametrize("other", [False, True])
def test_a_flag_of_one_process_counts_for_all(other: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes from host to host: nothing of it lies on a GPU."""

    def all_reduce(told: Tensor, how: Any, group: Any) -> None:
        assert how == torch.distributed.ReduceOp.MAX and group == "hosts" and told.device.type == "cpu"
        told.clamp_(min=int(other))

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    monkeypatch.setattr(processes, "_hosts", lambda world: "hosts")
    two: Any = FirstOfTwo(Step(torch.zeros(()), torch.zeros(()), torch.zeros(0)))
    assert [runtime.any_of(two, mine) for mine in (False, True)] == [other, True]


# -- Memory --------------------------------------------------------------------------------------------------


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
    assert float(made.loss) == pytest.approx(float(whole.loss))
    assert float(made.norm) == pytest.approx(float(whole.norm))
    for mine, other in zip((w.grad, b.grad), wanted, strict=True):
        torch.testing.assert_close(mine, other)


def test_another_error_is_no_lack_of_memory() -> None:
    passes = Passes(Accelerator(), None, [torch.ones(1, requires_grad=True)], 4, 4, CLIP)

    def losses_of(part: slice) -> Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        passes(1, losses_of)
