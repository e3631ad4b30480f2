"""What a student learns, as keys: on which grid and where on it, with which guidance, by which distance."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from lcm_kit.config.data import STRICT, Number, Rate, Scale, Whole

SAMPLING_KEYS = {"lognormal": ("log_mean", "log_std"), "shifted": ("shift",)}
"""The keys of `Grid` that a `sampling` has for itself."""


@dataclass(frozen=True, config=STRICT)
class Grid:
    """The solver's grid over the base's timesteps: `steps` intervals; `steps_start`: coarse to fine.

    The grid doubles from `steps_start` to `steps` in equal parts of the run (as the discretisation curriculum
    of improved consistency training, arXiv:2310.14189): the boundary condition propagates one grid
    interval per update, so a coarse grid learns fast and a fine one learns exactly.
    """

    steps: Annotated[Whole, Field(ge=2, le=1000)] = 50
    steps_start: Annotated[Whole, Field(ge=2, le=1000)] | None = None  # null: `steps` throughout
    # which of its intervals are trained how often. uniform: all alike; lognormal: by a normal distribution of
    # log(sigma / alpha), improved consistency training's, most at little noise; shifted: by a timestep shift,
    # most at much noise, where one-step sampling starts
    sampling: Literal["uniform", "lognormal", "shifted"] = "uniform"
    log_mean: Annotated[Number, Field(ge=-100, le=100)] = -1.1  # of log(sigma / alpha), for lognormal
    log_std: Annotated[Number, Field(ge=0.1, le=100)] = 2.0
    shift: Annotated[Number, Field(ge=0.01, le=100)] = 3.0  # for shifted; 3: half of all above 3/4 of time

    @model_validator(mode="after")
    def _order(self) -> Grid:
        if self.steps_start is not None and self.steps_start > self.steps:
            raise ValueError(f"steps_start {self.steps_start} is larger than steps {self.steps}; lower it")
        for sampling, names in SAMPLING_KEYS.items():
            unused = [name for name in names if getattr(self, name) != getattr(Grid, name)]
            if unused and self.sampling != sampling:
                raise ValueError(
                    f"{unused[0]} has no effect with sampling {self.sampling}; set sampling to {sampling}, "
                    f"or remove {unused[0]}"
                )
        return self


@dataclass(frozen=True, config=STRICT)
class Guidance:
    """The teacher's guidance_scale: uniform in [min, max] for each sample, baked into the student.

    A number alone is both. 1 bakes none in: the student is drawn with guidance and negative prompts, as its
    teacher is, and the teacher is asked once instead of twice.
    """

    min: Scale = 3.0
    max: Scale = 8.0

    @model_validator(mode="after")
    def _order(self) -> Guidance:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is larger than max {self.max}; swap them")
        return self


def both(given: Any) -> Any:
    """A number alone as the least and the greatest guidance_scale."""
    number = isinstance(given, int | float) and not isinstance(given, bool)
    return {"min": given, "max": given} if number else given


@dataclass(frozen=True, config=STRICT)
class Loss:
    """Distance between the student's endpoint and its target."""

    # huber: of each element; huber_norm: of a sample's RMS difference, as improved consistency training;
    # cauchy: of the same, c log(1 + d^2 / (2 c^2)), which outliers pull at least
    name: Literal["huber", "huber_norm", "cauchy", "l2"] = "huber"
    # the difference d below which the distance is quadratic: sqrt(d^2 + c^2) - c; unused by l2
    c: Rate = 0.001
    # interval: 1 / (difference of sigma / alpha between t and s), improved consistency training's weight
    weighting: Literal["none", "interval"] = "none"
    # true: c is of the last grid, and larger on the coarser ones before it, by (grid.steps / intervals)^1.15
    adaptive: bool = False

    @model_validator(mode="after")
    def _effect(self) -> Loss:
        if self.adaptive and self.name == "l2":
            raise ValueError("adaptive is of c, which l2 has not; set adaptive to false, or another name")
        return self
