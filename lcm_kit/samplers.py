"""The samplers: one entry for each way of drawing a picture, from which everything else of it follows.

A sampler draws whole pictures with one of diffusers' schedulers; a solver (`lcm_kit.core.solvers`) is one
step of the ODE within distillation. Configs, the command line, sweeps, reports, cards and metadata take
names, titles and what a sampler is good for from `SAMPLERS`. Nothing heavy is imported: `scheduler` is the
name of a class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lcm_kit.errors import UserError


@dataclass(frozen=True)
class Sampler:
    """How a sampler is called, which scheduler of diffusers it is, and what it may be used for.

    The noise and the prediction type always come from the base's own scheduler; `settings` are all the rest.
    """

    title: str  # in tables, plots and sentences
    scheduler: str  # class in diffusers
    settings: Mapping[str, Any]  # of its configuration
    app_title: str | None = None  # on cards and in metadata, as apps call it; None: as `title`
    call: Mapping[str, Any] = field(default_factory=dict)  # what the pipeline's call takes besides
    stochastic: bool = False  # it draws fresh noise on its way, from two steps on
    most_steps: int = 1000
    for_adapter: bool = False  # a few-step adapter may be drawn, swept and recommended with it
    for_base: bool = False  # the base alone may: plain rows of comparisons, the teacher's own samples

    @property
    def name_in_apps(self) -> str:
        """As apps call it."""
        return self.app_title or self.title


# Plain samplers use trailing timesteps (they start at T-1, where the noise is) and end at clean data, which
# is their best at few steps. LCM and TCD choose among 50 timesteps, the distilled ones. None clips latents.
SAMPLERS: dict[str, Sampler] = {
    "lcm": Sampler(
        "LCM", "LCMScheduler", {"clip_sample": False}, stochastic=True, most_steps=50, for_adapter=True
    ),
    "tcd": Sampler(
        "TCD", "TCDScheduler", {"clip_sample": False}, stochastic=True, most_steps=50, for_adapter=True,
        call={"eta": 0.3},  # how much noise it renews on its way: its authors' choice (arXiv:2402.19159)
    ),
    "ddim": Sampler(
        "DDIM", "DDIMScheduler",
        {"timestep_spacing": "trailing", "set_alpha_to_one": True, "clip_sample": False},
        app_title="DDIM, trailing timesteps", for_adapter=True, for_base=True,
    ),
    "dpmpp_2m": Sampler(
        "DPM-Solver++ 2M", "DPMSolverMultistepScheduler",
        {
            "timestep_spacing": "trailing", "algorithm_type": "dpmsolver++", "solver_order": 2,
            "final_sigmas_type": "zero",
        },
        for_base=True,
    ),
}  # fmt: skip


def names() -> list[str]:
    """Of all samplers, in the table's order."""
    return list(SAMPLERS)


def for_adapter() -> list[str]:
    """Names of the samplers that a few-step adapter may be drawn with."""
    return [name for name, sampler in SAMPLERS.items() if sampler.for_adapter]


def for_base() -> list[str]:
    """Names of the samplers that the base alone is drawn with."""
    return [name for name, sampler in SAMPLERS.items() if sampler.for_base]


def sampler_of(name: str) -> Sampler:
    """The sampler called `name`. Raises `UserError`, which lists the table, for another name."""
    if name not in SAMPLERS:
        raise UserError(f"sampler {name!r} is unknown; choose one of {', '.join(SAMPLERS)}")
    return SAMPLERS[name]


def title_of(name: str) -> str:
    """How people call a sampler; the name itself where the table lacks it, as in older results."""
    return SAMPLERS[name].title if name in SAMPLERS else name


def deterministic(name: str, steps: int) -> bool:
    """Whether a picture of `steps` steps follows from its initial noise alone."""
    return steps == 1 or not SAMPLERS[name].stochastic
