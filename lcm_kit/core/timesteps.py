"""How often each stretch of time is trained: a distribution over timesteps that reweighs what a method draws.

A distribution is its cumulative share, float64 [T] on the CPU, rising: an interval from t down to s has the
share of t less that of s. It is a function of the base's schedule and of constants, never of what training
has seen, so that a resumed run draws what an uninterrupted one would.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from lcm_kit.core.methods.base import Method, Times
from lcm_kit.core.schedule import Schedule
from lcm_kit.errors import UserError

Shares = Callable[[Schedule], Tensor]
"""Of a schedule of T timesteps: the cumulative share of each, float64 [T] on the CPU."""

_CANDIDATES = 4  # for each interval of the grid and each sample: all but 2% have one that is kept
_ROUNDS = 1000  # of candidates


def lognormal(schedule: Schedule, mean: float, std: float) -> Tensor:
    """Normal in log(sigma / alpha), float64 [T]: improved consistency training's (arXiv:2310.14189, eq. 10).

    Its differences between neighbours on a grid are, but for what makes them sum to 1, the paper's
    erf((log sigma_t - mean) / (sqrt(2) std)) - erf((log sigma_s - mean) / (sqrt(2) std)), with sigma / alpha
    for its sigma. Pure noise (alpha = 0) has all of the share: an interval that begins there has the tail.
    """
    return 0.5 * (1 + torch.erf((schedule.log_noise - mean) / (math.sqrt(2) * std)))


def shifted(schedule: Schedule, shift: float) -> Tensor:
    """A timestep shift (arXiv:2403.03206, section 5.3.2), float64 [T], over u = t / (T - 1).

    u is shift v / (1 + (shift - 1) v) of a uniform v: its median is shift / (1 + shift), 3/4 for 3.
    """
    u = torch.arange(schedule.steps, dtype=torch.float64) / (schedule.steps - 1)
    return u / (shift - (shift - 1) * u)


def reweighed(method: Method, shares: Shares) -> Method:
    """`method`, whose intervals come in proportion to their share of time times their chance in it.

    It is drawn from and kept with the interval's share for a chance (rejection sampling), which is exact for
    every method, the user's own too, whatever else it draws with an interval.
    """
    return cast(Method, _Reweighed(method, shares))


@dataclass(frozen=True)
class _Reweighed:
    """The two functions of a method; what it is called and how its student draws `method` says."""

    method: Method
    shares: Shares

    def times(self, schedule: Schedule, n_grid: int, batch: int, generator: torch.Generator) -> Times:
        """Draw `batch` intervals as `Method.times`. Raises `UserError` if next to none has a share."""
        kept: list[Tensor] = []
        share, n = self.shares(schedule), 0
        for _ in range(_ROUNDS):
            if n >= batch:
                return Times(*torch.cat(kept, 1)[:, :batch])
            drawn = self.method.times(schedule, n_grid, _CANDIDATES * n_grid * batch, generator)
            chance = (share[drawn.t] - share[drawn.s]) / (share[-1] - share[0])
            lucky = torch.rand(len(chance), generator=generator, dtype=torch.float64) < chance
            kept.append(torch.stack(tuple(drawn))[:, lucky])
            n += kept[-1].shape[1]
        raise UserError(
            f"grid.sampling leaves next to nothing of what the method {self.method.title!r} draws on a grid "
            f"of {n_grid} steps; set it to uniform, or its parameters to where the method's intervals are"
        )

    def endpoint(
        self, schedule: Schedule, x: Tensor, x0: Tensor, eps: Tensor, t: Tensor, end: Tensor
    ) -> Tensor:
        """As `method`'s."""
        return self.method.endpoint(schedule, x, x0, eps, t, end)
