"""Who teaches which sample of a batch: the base with the teacher's LoRA, or the base alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lcm_kit.config.schema import Distill
from lcm_kit.data.split import GENERAL


def of_the_base(config: Distill, ids: Sequence[str]) -> list[bool]:
    """Which records the base alone teaches: those of data.regularisation (`teacher.regularisation`)."""
    alone = config.teacher.regularisation == "base" and not config.teacher.in_student
    return [alone and bool(config.teacher.adapters) and id.startswith(GENERAL) for id in ids]


def by_teacher(
    ask: Callable[[list[int], bool], Tensor], bases: Sequence[bool], *, always: bool = False
) -> Tensor:
    """The rows that `ask(rows, styled)` gives, [len(rows), ...], from each row's own teacher, in order.

    `bases`: for each row whether the base alone teaches it. A teacher that has no row is not asked, unless
    `always`: where the weights are sharded all processes must call the model equally often.
    """
    rows = {styled: [i for i, base in enumerate(bases) if base != styled] for styled in (True, False)}
    made = {styled: ask(rows[styled] or [0], styled) for styled in rows if rows[styled] or always}
    found = torch.cat([part for styled, part in made.items() if rows[styled]])
    return found[torch.tensor([*rows[True], *rows[False]]).argsort().to(found.device)]
