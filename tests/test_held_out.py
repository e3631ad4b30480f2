"""The held-out loss is fixed noise and times and a plain mean."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lcm_kit.bases.condition import Condition
from lcm_kit.data.order import Run
from lcm_kit.data.split import Rows
from lcm_kit.training.held_out import HeldOut


class Pictures:
    """Picture i is full of i, its text too."""

    ids = ("a", "b", "c")
    runs = (Run(3),)

    def weights(self, index: list[int]) -> None:
        return None

    def latents(self, index: list[int]) -> Tensor:
        return torch.tensor(index).float().view(-1, 1, 1, 1).expand(-1, 4, 2, 2)

    def condition(self, index: list[int], chances: None = None) -> Condition:
        return Condition(torch.tensor(index).float().view(-1, 1, 1))


def test_every_picture_is_measured_at_every_time_and_no_batch_size_matters() -> None:
    seen: dict[int, list[Any]] = {}
    found = []
    for size in (1, 5, 24, 100):

        def losses_at(
            x0: Tensor, condition: Condition, noise: Tensor, t: Tensor, _: None, size: int = size
        ) -> Tensor:
            assert torch.equal(x0[:, 0, 0, 0], condition.embeds.flatten())
            assert not torch.is_grad_enabled() and len(t) <= size
            seen.setdefault(size, []).extend(zip(x0[:, 0, 0, 0].tolist(), t.tolist(), noise, strict=True))
            return x0[:, 0, 0, 0] + t / 1000 + noise.mean((1, 2, 3))

        pictures: Any = Rows(Pictures(), [2, 0])  # type: ignore[arg-type]
        found.append(HeldOut(pictures, 7, 1000, size).mean_at(losses_at))
    times = [62, 187, 312, 437, 562, 687, 812, 937]  # the middles of eight equal parts
    assert [pair[:2] for pair in seen[5]] == [(i, t) for i in (2.0, 0.0) for t in times]
    noise = torch.stack([n for *_, n in seen[5]])
    assert all(torch.equal(torch.stack([n for *_, n in seen[size]]), noise) for size in seen)
    assert len({float(n[0, 0, 0]) for n in noise}) == 16
    wanted = 1.0 + sum(times) / 8000 + float(noise.mean())
    assert found == pytest.approx([wanted] * 4, rel=1e-6)
