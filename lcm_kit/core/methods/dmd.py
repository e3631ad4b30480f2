"""Distribution matching (DMD2, arXiv:2405.14867) within adapters: generator and fake score are two LoRAs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Len

from lcm_kit.core.methods.lcm import LCM

if TYPE_CHECKING:
    from lcm_kit.core.schedule import Schedule

Steps = Annotated[tuple[Annotated[int, Ge(1), Le(50)], ...], Len(1, 10)]


@dataclass(frozen=True)
class DMD(LCM):
    """The student's own pictures are moved to where the guided teacher has them (`core.matching`).

    Interval and endpoint are LCM's, of the consistency loss that can stay on beside it.
    """

    title: ClassVar[str] = "distribution matching distillation (DMD2)"
    tags: ClassVar[tuple[str, ...]] = ("dmd2",)
    name: Literal["dmd"] = "dmd"  # type: ignore[assignment]
    # numbers of steps that the student is trained to draw in, all as often
    steps: Steps = (1, 2, 4)  # type: ignore[misc]
    # ddim: the steps follow one another without new noise (TDM, arXiv:2503.06674), which keeps what differs
    # between pictures of one prompt; lcm: noise is renewed after each, as the LCM sampler does (DMD2)
    sampler: Literal["ddim", "lcm"] = "ddim"
    # the timestep that the UNet is told of pure noise, for steps: [1] alone; null: the last, which is noise's
    # own. There a base that predicts epsilon makes its picture as a small difference of large numbers, which
    # is noisy; at 399 it does not (DMD2 does so on SDXL). Only diffusers draws so, by `timesteps=[399]`
    conditioning_timestep: Annotated[int, Ge(19), Le(999)] | None = None
    # updates of the fake score for one of the student, and its learning rate, which stays, over optimizer.lr
    fake_updates: Annotated[int, Ge(1), Le(100)] = 1
    fake_lr: Annotated[float, Gt(0), Le(1e9)] = 1.0
    # weight of a consistency loss on the cached latents, beside the matching's 1
    consistency: Annotated[float, Ge(0), Le(1e9)] = 0.0

    def __post_init__(self) -> None:
        """Raise `ValueError` for steps that do not rise."""
        if list(self.steps) != sorted(set(self.steps)):
            raise ValueError(f"steps {list(self.steps)} do not rise; write {sorted(set(self.steps))}")
        if self.conditioning_timestep is not None:
            if self.steps != (1,):
                raise ValueError(
                    f"conditioning_timestep is of one step alone, and steps are {list(self.steps)}; write "
                    "steps: [1]"
                )
            if (self.conditioning_timestep + 1) % 20:
                raise ValueError(
                    f"conditioning_timestep {self.conditioning_timestep} is none that LCMScheduler knows; "
                    "give 19, 39, ... or 999, as 399"
                )

    @property
    def needs_pictures(self) -> bool:  # type: ignore[override]
        """Whether it reads latents of pictures: the consistency loss does, the matching its prompts alone."""
        return self.consistency > 0

    @property
    def refuses(self) -> Mapping[str, str]:  # type: ignore[override]
        """As `Method.refuses`: what is of the consistency loss alone."""
        reason = "it is of the consistency loss, and method.consistency is 0"
        keys = ("ema", "solver", "grid", "loss", "teacher.weight", "validation.held_out")
        own = {} if self.consistency else dict.fromkeys(keys, reason)
        return {**own, "teacher.reuse": "its teacher is asked of what the student draws, each time anew"}

    @property
    def samplers(self) -> tuple[str, ...]:  # type: ignore[override]
        """What draws its student: it was trained on the trajectory of the first."""
        if self.conditioning_timestep is not None:
            return (f"lcm:{self.conditioning_timestep}",)
        return ("lcm", "tcd") if self.sampler == "lcm" else ("ddim",)

    def points(self, schedule: Schedule, n: int) -> list[int]:
        """The timesteps of the student's n steps, falling."""
        from lcm_kit.core.matching import timesteps

        if self.conditioning_timestep is not None:
            return [self.conditioning_timestep]
        return timesteps(schedule, self.sampler, n)
