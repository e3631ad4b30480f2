"""What a method is: which interval of time it draws, and its consistency function."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lcm_kit.schedule import Schedule


class Times(NamedTuple):
    """The teacher steps from t to s, the student must land at `end` from both; int64 [B], end <= s <= t."""

    t: Tensor
    s: Tensor
    end: Tensor

    def to(self, device: torch.device | str) -> Times:
        """Return the same times on `device`."""
        return Times(self.t.to(device), self.s.to(device), self.end.to(device))


class Method(Protocol):
    """A frozen dataclass with these two functions and its constants as fields."""

    def times(self, schedule: Schedule, n_grid: int, batch: int, generator: torch.Generator) -> Times:
        """Draw `batch` intervals on a solver grid of `n_grid` steps with a CPU generator."""
        ...

    def endpoint(
        self, schedule: Schedule, x: Tensor, x0: Tensor, eps: Tensor, t: Tensor, end: Tensor
    ) -> Tensor:
        """Return the consistency function at `end` for latents x at t, where a model says (x0, eps)."""
        ...
