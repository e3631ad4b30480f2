"""A step of two samples by a UNet that is a line of arithmetic: what is asked of whom, and what follows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from pydantic import TypeAdapter

from lcm_kit.adapter.adapted_unet import AdaptedUNet
from lcm_kit.adapter.roles import Given, Objective, Roles
from lcm_kit.bases.condition import Condition
from lcm_kit.config.load import RECIPES
from lcm_kit.config.schema import Distill
from lcm_kit.core.methods import Times
from lcm_kit.core.schedule import SD_BETAS, Schedule


def distill(**keys: Any) -> Distill:
    """A distillation's config with these keys."""
    made = TypeAdapter(RECIPES["train/distill"]).validate_python(
        {"recipe": "train/distill", "output": "x", **keys}
    )
    assert isinstance(made, Distill)
    return made


def two_samples(
    s: Sequence[int] = (979, 479), scales: Sequence[float] = (2.0, 5.0), *, seed: int = 0, **more: Any
) -> Given:
    """Two samples whose teacher steps from 999 and 499 to `s`, under guidance of `scales`."""
    g = torch.Generator().manual_seed(seed)
    return Given(
        torch.randn(2, 4, 2, 2, generator=g), torch.randn(2, 4, 2, 2, generator=g),
        Times(torch.tensor([999, 499]), torch.tensor(s), torch.zeros(2, dtype=torch.long)),
        torch.tensor(scales), Condition(torch.randn(2, 3, 5, generator=g)), **more,
    )  # fmt: skip


def line(x: torch.Tensor, t: torch.Tensor, encoder_hidden_states: torch.Tensor) -> Any:
    """What stands for the UNet."""
    return SimpleNamespace(sample=0.1 * x + encoder_hidden_states.mean((1, 2)).view(-1, 1, 1, 1))


def linear_roles(config: Distill, call: Callable[..., Any] = line) -> Roles:
    """The parts of a step, all of them `call`, on an epsilon base."""
    adapted = AdaptedUNet(torch.nn.Linear(1, 1))  # which nobody asks: `call` stands for it
    adapted.train_own_weights()
    empty, schedule = Condition(torch.zeros(1, 3, 5)), Schedule.from_config(SD_BETAS)
    return Roles(adapted, call, [], empty, schedule, "epsilon", Objective.of(config), torch.float32)
