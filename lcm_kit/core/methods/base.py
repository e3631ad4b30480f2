"""What a method is: which interval of time it draws, its consistency function, and how its student draws.

torch is imported by the functions that need it, so that a config, which holds a method, is read without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lcm_kit.core.schedule import Schedule

USUAL_STEPS = 4  # what few-step LoRAs are asked for where nothing was measured
_MOST = 100  # entries of what a file says


class Times(NamedTuple):
    """The teacher steps from t to s, the student must land at `end` from both; int64 [B], end <= s <= t."""

    t: Tensor
    s: Tensor
    end: Tensor

    def to(self, device: torch.device | str) -> Times:
        """Return the same times on `device`."""
        from lcm_kit.core.transfer import sent

        return Times(*(sent(time, device) for time in self))


class Method(Protocol):
    """A frozen dataclass: its fields are the keys of a config's `method`, its two functions what trains.

    What it is called and how its student draws it says itself; a class may inherit the defaults from here.
    """

    title: ClassVar[str]  # in words, for cards and reports: "latent consistency distillation (LCM)"
    # names of `lcm_kit.sample` that its student draws with; it is judged and recommended with the first
    samplers: ClassVar[tuple[str, ...]] = ("lcm",)
    steps: ClassVar[tuple[int, ...]] = (1, 2, 4, 8)  # that it serves and is judged at, rising
    tags: ClassVar[tuple[str, ...]] = ()  # of its card, as the hub has them
    # keys of a config, as "grid.steps", that must stay as they are by default, and why: what they would do
    # has no place in it
    refuses: ClassVar[Mapping[str, str]] = {}
    needs_pictures: ClassVar[bool] = True  # whether it reads latents of pictures, and not prompts alone

    def times(self, schedule: Schedule, n_grid: int, batch: int, generator: torch.Generator) -> Times:
        """Draw `batch` intervals on a solver grid of `n_grid` steps with a CPU generator."""
        ...

    def endpoint(
        self, schedule: Schedule, x: Tensor, x0: Tensor, eps: Tensor, t: Tensor, end: Tensor
    ) -> Tensor:
        """Return the consistency function at `end` for latents x at t, where a model says (x0, eps)."""
        ...


class Landing(Method, Protocol):
    """A method whose consistency function is the step of DDIM: constant (x0, eps), to any `end`."""

    def endpoint(
        self, schedule: Schedule, x: Tensor, x0: Tensor, eps: Tensor, t: Tensor, end: Tensor
    ) -> Tensor:
        """Return alpha_end x0 + sigma_end eps, float32 [B, C, h, w]; x exactly where end = t.

        For eps and v alike, since both are (x0, eps) here.
        """
        from lcm_kit.core.solvers import landed

        return landed(schedule, x0, eps, end)


def intervals(
    schedule: Schedule, n_grid: int, batch: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """0 and the solver grid's `n_grid` points, int64 [n_grid + 1], and `batch` of its intervals, by number.

    Interval i goes from points[i + 1] down to points[i]; all are as likely.
    """
    import torch

    from lcm_kit.core.schedule import grid

    points = torch.cat([torch.zeros(1, dtype=torch.int64), grid(schedule.steps, n_grid)])
    return points, torch.randint(n_grid, (batch,), generator=generator)


@dataclass(frozen=True)
class MethodInfo:
    """What files say of a method, so that a card or a report needs neither its class nor its code."""

    name: str  # `method.name` of the config
    title: str
    samplers: tuple[str, ...] = ()  # none: nothing is known of how its student draws
    steps: tuple[int, ...] = ()
    tags: tuple[str, ...] = ()
    # that its student is drawn with, by the config that trained it; None: 1, since guidance is baked in
    guidance_scale: float | None = None

    @classmethod
    def of(cls, method: Method | type[Method], name: str) -> MethodInfo:
        """Of a method that is called `name` in configs."""
        return cls(name, method.title, method.samplers, method.steps, method.tags)

    @classmethod
    def read(cls, said: Any) -> MethodInfo | None:
        """Back from JSON of anybody's; None where that is not what `dataclasses.asdict` of one gives."""
        if not isinstance(said, Mapping) or not all(map(_short, (said.get("name"), said.get("title")))):
            return None
        samplers, steps, tags = (_entries(said.get(key)) for key in ("samplers", "steps", "tags"))
        if samplers is None or steps is None or tags is None or not all(map(_short, (*samplers, *tags))):
            return None
        if not all(type(n) is int and 0 < n <= 1000 for n in steps):
            return None
        return cls(said["name"], said["title"], samplers, steps, tags)

    @property
    def sampler(self) -> str:
        """What its student is judged and recommended with."""
        return (self.samplers or Method.samplers)[0]

    @property
    def judged_steps(self) -> tuple[int, ...]:
        """Numbers of steps that its student is judged at."""
        return self.steps or Method.steps

    @property
    def only_steps(self) -> int | None:
        """The one number of steps that its student serves, as PCM's phases; None where it has more."""
        return self.steps[0] if len(self.steps) == 1 else None

    @property
    def usual_steps(self) -> int:
        """How many steps to begin with."""
        return usual(self.judged_steps)

    @property
    def usual_guidance(self) -> float:
        """The guidance_scale to begin with."""
        return 1.0 if self.guidance_scale is None else self.guidance_scale

    def guidance_beside(self, teacher: float) -> float:
        """The guidance_scale of its student beside a teacher at `teacher`: 1 where it is baked in."""
        return 1.0 if self.guidance_scale is None else teacher


def _entries(given: object) -> tuple[Any, ...] | None:
    return tuple(given) if isinstance(given, list | tuple) and len(given) <= _MOST else None


def _short(text: object) -> bool:
    return isinstance(text, str) and 0 < len(text) <= 200


def usual(steps: Sequence[int]) -> int:
    """Of `steps` the number that is nearest to `USUAL_STEPS`."""
    return min(steps, key=lambda n: abs(n - USUAL_STEPS))
