"""Each row of a batch is taught by its own teacher, and nobody is asked in vain."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter

from lcm_kit.config.load import RECIPES
from lcm_kit.data.split import of_the_base
from lcm_kit.families.condition import Condition
from lcm_kit.methods import Times
from lcm_kit.roles import Given, Objective, Roles, by_teacher
from lcm_kit.schedule import Schedule

X = torch.arange(12.0).view(4, 3)


def asked(bases: list[bool], *, always: bool = False) -> tuple[torch.Tensor, list[tuple[list[int], bool]]]:
    """Rows of X, negative where the base alone teaches; and what was asked of whom."""
    calls: list[tuple[list[int], bool]] = []

    def ask(rows: list[int], styled: bool) -> torch.Tensor:
        calls.append((rows, styled))
        return X[rows] if styled else -X[rows]

    return by_teacher(ask, bases, always=always), calls


@pytest.mark.parametrize(
    "bases",
    [[True, False, False, True], [False, True, False, False], [False, False, True, True]],
)
def test_rows_come_back_in_order(bases: list[bool]) -> None:
    found, calls = asked(bases)
    assert torch.equal(found, torch.stack([-x if base else x for x, base in zip(X, bases, strict=True)]))
    assert calls == [
        ([i for i in range(4) if not bases[i]], True),
        ([i for i in range(4) if bases[i]], False),
    ]


@pytest.mark.parametrize("base", [True, False])
def test_a_teacher_without_rows_is_asked_only_where_it_must_be(base: bool) -> None:
    wanted = -X if base else X
    found, calls = asked([base] * 4)
    assert torch.equal(found, wanted) and calls == [([0, 1, 2, 3], not base)]
    found, calls = asked([base] * 4, always=True)
    assert torch.equal(found, wanted) and len(calls) == 2 and ([0], base) in calls


@pytest.mark.parametrize(
    ("teacher", "general"),
    [
        ({}, False),  # one teacher only
        ({"adapters": ["a"]}, True),
        ({"adapters": ["a"], "regularisation": "adapters"}, False),
        ({"adapters": ["a"], "in_student": True}, False),
    ],
)
def test_whose_the_general_pictures_are(teacher: dict[str, Any], general: bool) -> None:
    keys = {"recipe": "train/distill", "output": "x", "teacher": teacher}
    config = TypeAdapter(RECIPES["train/distill"]).validate_python(keys)
    assert of_the_base(config, ["a.png", "regularisation/a.png", "teacher/00001"]) == [False, general, False]


def test_the_interval_weighs_each_sample_by_its_closed_form() -> None:
    """1 / (rho_t - rho_s), rho = sigma / alpha, from the betas in float64; nothing else differs."""
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    schedule, config = Schedule.from_config(betas), TypeAdapter(RECIPES["train/distill"])
    unet = SimpleNamespace(_lora_layers=[])
    g = torch.Generator().manual_seed(0)
    given = Given(
        torch.randn(2, 4, 2, 2, generator=g), torch.randn(2, 4, 2, 2, generator=g),
        Times(torch.tensor([999, 499]), torch.tensor([979, 479]), torch.zeros(2, dtype=torch.long)),
        torch.tensor([2.0, 5.0]), Condition(torch.randn(2, 3, 5, generator=g)),
    )  # fmt: skip

    def call(x: torch.Tensor, t: torch.Tensor, encoder_hidden_states: torch.Tensor) -> Any:
        return SimpleNamespace(sample=0.1 * x + encoder_hidden_states.mean((1, 2)).view(-1, 1, 1, 1))

    def losses(weighting: str) -> torch.Tensor:
        keys = {"recipe": "train/distill", "output": "x", "loss": {"weighting": weighting}}
        objective = Objective.of(config.validate_python(keys))
        empty = Condition(torch.zeros(1, 3, 5))
        return Roles(unet, call, [], [], empty, schedule, "epsilon", objective, torch.float32).losses(given)

    beta = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    rho = np.sqrt(1 / np.cumprod(1 - beta) - 1)
    wanted = 1 / (rho[[999, 499]] - rho[[979, 479]])
    assert (losses("interval") / losses("none")).numpy() == pytest.approx(wanted, rel=1e-4)
