"""Phased consistency (PCM, arXiv:2405.18407): a trajectory's points in a phase map to its lower edge."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Ge, Le

from lcm_kit.core.methods.base import Landing, Times

if TYPE_CHECKING:
    import torch

    from lcm_kit.core.schedule import Schedule


@dataclass(frozen=True)
class PCM(Landing):
    """As many phases as the steps that it serves: DDIM with trailing timesteps goes from edge to edge.

    No step renews noise, so that a picture follows from its first noise, and errors do not pass an edge. The
    endpoint is arXiv:2405.18407, eq. 9.
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

        from lcm_kit.core.schedule import grid, trailing

        edges = torch.cat([torch.zeros(1, dtype=torch.int64), trailing(schedule.steps, self.phases)])
        points = torch.unique(torch.cat([edges, grid(schedule.steps, n_grid)]))
        index = torch.randint(len(points) - 1, (batch,), generator=generator)
        s = points[index]
        return Times(t=points[index + 1], s=s, end=edges[torch.searchsorted(edges, s, right=True) - 1])
