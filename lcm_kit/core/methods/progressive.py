"""Progressive distillation (arXiv:2202.00512): two steps of a teacher become one of its student, anew."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, NamedTuple

from annotated_types import Ge, Gt, Le

from lcm_kit.core.methods.base import Landing, Times

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lcm_kit.core.schedule import Schedule


class Stage(NamedTuple):
    """A part of a run, the optimizer steps `first` .. `end` - 1 (from 0), and the grid that is its own."""

    number: int  # from 0
    first: int
    end: int
    n_grid: int  # what `Method.times` is asked for

    @property
    def steps(self) -> int:
        """How many optimizer steps it has."""
        return self.end - self.first


@dataclass(frozen=True)
class Progressive(Landing):
    """From `start` steps to `finish`, halved in each stage; the first teacher is the base with guidance.

    After that stage the teacher is the student as the stage before left it, in which guidance is by then
    (arXiv:2210.03142). Steps are DDIM's with trailing timesteps, from edge to edge.
    """

    title: ClassVar[str] = "progressive distillation"
    samplers: ClassVar[tuple[str, ...]] = ("ddim",)
    tags: ClassVar[tuple[str, ...]] = ("progressive-distillation",)
    refuses: ClassVar[Mapping[str, str]] = {
        "ema": "its target is the teacher, no average",
        "solver": "its steps are DDIM's",
        "grid": "each stage has a grid of its own",
        "loss.weighting": "its weight is method.weighting",
        "loss.adaptive": "c would follow grid.steps, which it has not",
        "teacher.weight": "its teacher takes both steps",
        "teacher.reuse": "its teacher's second step begins where guidance moved the first",
        "validation.held_out": "losses of different stages do not compare",
        "validation.control": "before its last stage the student serves other numbers of steps",
    }

    name: Literal["progressive"] = "progressive"
    start: Annotated[int, Ge(2), Le(256)] = 32  # the first teacher's steps
    finish: Annotated[int, Ge(1), Le(50)] = 4  # the last student's
    # lengths of the stages, one to another; none: they are equal
    parts: tuple[Annotated[float, Gt(0), Le(1e9)], ...] = ()
    # what an error in x0 weighs: max(snr, 1), snr + 1, or what it weighs where the step lands
    weighting: Literal["truncated_snr", "snr_plus_one", "landing"] = "truncated_snr"

    def __post_init__(self) -> None:
        """Raise `ValueError` for stages that there cannot be."""
        halved, rest = divmod(self.start, self.finish)
        if rest or halved < 2 or halved & (halved - 1):
            raise ValueError(
                f"start {self.start} does not become finish {self.finish} by halving; give {self.finish} "
                "times 2, 4, 8 or another power of two"
            )
        if self.parts and len(self.parts) != self.halvings:
            raise ValueError(
                f"parts has {len(self.parts)} entries for {self.halvings} stages, from {self.start} steps to "
                f"{self.finish}; give one for each, or leave it out"
            )

    @property
    def steps(self) -> tuple[int, ...]:  # type: ignore[override]  # of an object, where others' are the class's
        """The last student's: between its timesteps it learned nothing."""
        return (self.finish,)

    @property
    def halvings(self) -> int:
        """The number of stages."""
        return (self.start // self.finish).bit_length() - 1

    def stages(self, steps: int) -> tuple[Stage, ...]:
        """The stages of a run of so many optimizer steps; `n_grid` is the student's number of steps.

        Raises `ValueError` if one of them would have none.
        """
        parts = tuple(self.parts) or (1.0,) * self.halvings
        edges = [0, *(round(steps * until / sum(parts)) for until in accumulate(parts))]
        found = tuple(
            Stage(k, first, end, self.start >> k + 1)
            for k, (first, end) in enumerate(zip(edges[:-1], edges[1:], strict=True))
        )
        if empty := [stage.number + 1 for stage in found if not stage.steps]:
            raise ValueError(
                f"of {steps} steps none is left for stage {empty[0]} of {len(found)}, from method.start "
                f"{self.start} to finish {self.finish}; give more steps, a lower start or other parts"
            )
        return found

    def times(self, schedule: Schedule, n_grid: int, batch: int, generator: torch.Generator) -> Times:
        """Draw one of the student's `n_grid` steps, t to `end`; s is where its teacher's first step ends.

        That is the point between them among the timesteps of a sampler with twice as many. The last step ends
        at 0.
        """
        import torch

        from lcm_kit.core.schedule import trailing

        points = torch.cat([torch.zeros(1, dtype=torch.int64), trailing(schedule.steps, 2 * n_grid)])
        index = 2 * torch.randint(n_grid, (batch,), generator=generator)
        return Times(t=points[index + 2], s=points[index + 1], end=points[index])

    def unit(self, schedule: Schedule, times: Times) -> Tensor:
        """Return what to multiply both ends of a step by, so that a squared difference has the weight.

        float32 [B, 1, 1, 1]. As eps = (x_t - alpha_t x0) / sigma_t, an error d in the student's x0 is
        (alpha_end - sigma_end alpha_t / sigma_t) d where it lands. The weights are those of
        arXiv:2202.00512, section 4.
        """
        (alpha, sigma), (alpha_end, sigma_end) = schedule.at(times.t), schedule.at(times.end)
        if self.weighting == "landing":
            return alpha.new_ones(alpha.shape)
        snr = (alpha / sigma) ** 2
        weight = snr.clamp_min(1.0) if self.weighting == "truncated_snr" else snr + 1.0
        return weight.sqrt() / (alpha_end - sigma_end * alpha / sigma)
