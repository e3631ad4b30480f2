"""Phased consistency (PCM, arXiv:2405.18407): a trajectory's points in a phase map to its lower edge."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Ge, Le

from lcm_kit.core.methods.base import Method, Times

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lcm_kit.core.schedule import Schedule


@dataclass(frozen=True)
class PCM(Method):
    """As many phases as the steps that it serves: DDIM with trailing timesteps goes from edge to edge.

    No step renews noise, so that a picture follows from its first noise, and errors do not pass an edge.
    """

    title: ClassVar[str] = "phased consistency distillation (PCM)"
    samplers: ClassVar[tuple[str, ...]] = ("ddim",)
    tags: ClassVar[tuple[str, ...]] = ("pcm",)

    name: Literal["pcm"] = "pcm"
    phases: Annotated[int, Ge(1), Le(50)] = 4

    @property
    def steps(self) -> tuple[int, ...]:  # type: ignore[override]  # of an object, where others' are the class's
        """The number of phases: with another number a step of the sampler begins or ends within one."""
        return (self.phases,)

    def times(self, schedule: Schedule, n_grid: int, batch: int, generator: torch.Generator) -> Times:
        """Draw t uniformly from the solver grid with the phases' edges; s is the point before t.

        `end` is the lower edge of the phase that they are in, 0 in the first: for 4 phases of 1000 timesteps
        0, 249, 499 and 749, where DDIM's trailing steps begin. An edge above is a t, and never an s of
        another phase (arXiv:2405.18407, section 3.1).
        """
        import torch

        from lcm_kit.core.schedule import grid

        n = self.phases
        length = schedule.steps - (schedule.steps - schedule.steps / n)  # with the rounding of DDIM's own
        below = schedule.steps - length * torch.arange(n - 1, -1, -1, dtype=torch.float64)
        edges = torch.cat([torch.zeros(1, dtype=torch.int64), below.round().long() - 1])
        points = torch.unique(torch.cat([edges, grid(schedule.steps, n_grid)]))
        index = torch.randint(len(points) - 1, (batch,), generator=generator)
        s = points[index]
        return Times(t=points[index + 1], s=s, end=edges[torch.searchsorted(edges, s, right=True) - 1])

    def endpoint(
        self, schedule: Schedule, x: Tensor, x0: Tensor, eps: Tensor, t: Tensor, end: Tensor
    ) -> Tensor:
        """Return f(x, t) = alpha_end x0 + sigma_end eps, float32 [B, C, h, w]; x exactly where end = t.

        arXiv:2405.18407, eq. 9: DDIM's step to the edge, for eps and v alike, since both are (x0, eps) here.
        """
        from lcm_kit.core.solvers import landed

        return landed(schedule, x0, eps, end)
