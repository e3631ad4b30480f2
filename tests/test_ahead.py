"""What a step needs is made early on a GPU, once, and never tells on the step that runs meanwhile."""

from __future__ import annotations

import pytest
import torch

from lcm_kit.core.transfer import sent
from lcm_kit.training.ahead import Ahead

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


def test_a_gpu_gets_the_next_step_early_and_each_once() -> None:
    made: list[int] = []
    ahead = Ahead(lambda step: made.append(step) or 10 * step, 4, CUDA)
    found = []
    for step in range(1, 4):
        found.append(ahead.at(step))
        ahead.prepare(step + 1)
        assert made == list(range(1, min(step + 2, 4)))  # there is no fifth
    assert found == [10, 20, 30]


def test_a_cpu_makes_it_when_it_is_asked_for() -> None:
    made: list[int] = []
    ahead = Ahead(lambda step: made.append(step) or step, 4, CPU)
    ahead.prepare(2)
    assert not made and ahead.at(2) == 2 and made == [2]


def test_another_step_than_the_one_prepared_is_made_anew() -> None:
    ahead = Ahead(lambda step: step, 9, CUDA)
    ahead.prepare(3)
    assert ahead.at(5) == 5 and ahead.at(3) == 3


def test_an_error_is_raised_by_the_step_that_needs_it_and_may_be_gone_by_then() -> None:
    left = [OSError("the first time"), OSError("the second time")]

    def make(step: int) -> int:
        if left:
            raise left.pop(0)
        return step

    ahead = Ahead(make, 9, CUDA)
    ahead.prepare(1)
    with pytest.raises(OSError, match="the second time"):
        ahead.at(1)
    left.append(OSError("once"))
    ahead.prepare(2)
    assert ahead.at(2) == 2


def test_a_wish_to_stop_is_no_error_to_wait_with() -> None:
    def make(step: int) -> int:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Ahead(make, 9, CUDA).prepare(1)


def test_what_goes_to_a_gpu_goes_from_pinned_memory_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no GPU here: what would be asked of one is noted."""
    asked: list[object] = []
    there = torch.ones(2)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: asked.append("pinned") or self)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *a, **k: asked.append((a, k)) or there)
    assert sent(torch.zeros(2), "cuda:0") is there
    assert asked == ["pinned", ((torch.device("cuda:0"),), {"non_blocking": True})]
    asked.clear()
    sent(torch.zeros(2), CPU)
    assert asked == [((CPU,), {"non_blocking": True})]
    tensor = torch.zeros(2)
    assert sent(tensor, None) is tensor
