"""Validation while training: when, on what, and the number's formula."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from lcm_kit.errors import UserError
from lcm_kit.training.validation import Validation, rms
from tests.recipes.small import TEMPLATE, configure


def prepare(folder: Path, **changes: object) -> Validation | None:
    (folder / "prompts.txt").write_text("red\n\n# not a prompt\nblue\n")
    wanted = {"prompts": str(folder / "prompts.txt"), "count": 3, **changes}
    return Validation.prepare(configure(TEMPLATE, folder / "run", validation=wanted), "hash")


def test_rms() -> None:
    assert rms(torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])) == pytest.approx(math.sqrt(12.5))


def test_when_and_on_what(tmp_path: Path) -> None:
    at_the_end, often = prepare(tmp_path), prepare(tmp_path, every=3)
    assert at_the_end is not None and often is not None
    assert at_the_end.prompts == ("red", "blue", "red")
    assert [step for step in range(1, 9) if at_the_end.due(step, 8)] == [8]
    assert [step for step in range(1, 9) if often.due(step, 8)] == [3, 6, 8]
    assert prepare(tmp_path, prompts=None) is None
    with pytest.raises(UserError, match="no such file"):
        prepare(tmp_path, prompts=str(tmp_path / "none.txt"))
