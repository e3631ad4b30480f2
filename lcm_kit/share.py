"""Work that several processes share: who does which part, and when all must be done."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def started_together() -> int:
    """How many processes torchrun, accelerate or a scheduler started for one work; 1: this one alone."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _nobody_to_wait_for() -> None:
    pass


def _nobody_to_share_with(folder: Path) -> None:
    pass


def _nobody_to_agree_with(facts: Mapping[str, object]) -> None:
    pass


@dataclass(frozen=True)
class Share:
    """This process's part; alone, it is everything. `lcm_kit.training.processes` finds it out."""

    rank: int = 0
    world: int = 1
    wait: Callable[[], None] = _nobody_to_wait_for  # until every process is here
    require_shared: Callable[[Path], None] = _nobody_to_share_with  # a folder that all processes see
    require_same: Callable[[Mapping[str, object]], None] = _nobody_to_agree_with  # facts, by name

    def of(self, items: Sequence[T]) -> Sequence[T]:
        """The items of this process: every `world`-th, from `rank` on."""
        return items[self.rank :: self.world]

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes what all made."""
        return self.rank == 0


ALONE = Share()
