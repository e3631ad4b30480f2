"""Each row of a batch is taught by its own teacher, and nobody is asked in vain."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lcm_kit.config.load import RECIPES
from lcm_kit.data.split import of_the_base
from lcm_kit.roles import by_teacher

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
    from pydantic import TypeAdapter

    keys = {"recipe": "train/distill", "output": "x", "teacher": teacher}
    config = TypeAdapter(RECIPES["train/distill"]).validate_python(keys)
    assert of_the_base(config, ["a.png", "regularisation/a.png", "teacher/00001"]) == [False, general, False]
