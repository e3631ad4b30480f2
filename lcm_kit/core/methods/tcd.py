"""Trajectory consistency (TCD, arXiv:2402.19159): a point maps to any point before it on its trajectory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from lcm_kit.core.methods.base import Landing, Times, intervals

if TYPE_CHECKING:
    import torch

    from lcm_kit.core.schedule import Schedule


@dataclass(frozen=True)
class TCD(Landing):
    """LCM with a free end. TCDScheduler lands between its timesteps and renews the noise from there.

    The endpoint is the exponential integrator of first order (arXiv:2402.19159, eq. 15, k = 1).
    """

    title: ClassVar[str] = "trajectory consistency distillation (TCD)"
    samplers: ClassVar[tuple[str, ...]] = ("tcd", "ddim", "lcm")
    steps: ClassVar[tuple[int, ...]] = (1, 2, 4, 8)
    tags: ClassVar[tuple[str, ...]] = ("tcd",)

    name: Literal["tcd"] = "tcd"

    def times(self, schedule: Schedule, n_grid: int, batch: int, generator: torch.Generator) -> Times:
        """Draw t uniformly from the solver grid; s is the point before, `end` one of 0 .. s, all as likely.

        Algorithm 1 of arXiv:2402.19159, on the grid's points.
        """
        import torch

        points, index = intervals(schedule, n_grid, batch, generator)
        end = (torch.rand(batch, generator=generator) * (index + 1)).long()
        return Times(t=points[index + 1], s=points[index], end=points[end])
