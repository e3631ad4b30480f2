"""The samplers: one entry for each way of drawing a picture, from which everything else of it follows.

A sampler draws whole pictures with one of diffusers' schedulers; a solver (`lcm_kit.core.solvers`) is one
step of the ODE within distillation. Configs, the command line, sweeps, reports, cards and metadata take
names, titles and what a sampler is good for from `SAMPLERS`. Nothing heavy is imported: `scheduler` is the
name of a class.

A sampler that renews a share of the noise is called with it: `tcd:0.5` is TCD with a gamma of 0.5, and `tcd`
has its entry's own. What stands behind the colon is read here alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
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
    gamma: str | None = None  # the key of `call` that a name may set, as tcd:0.5: the noise renewed, 0 to 1
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
        call={"eta": 0.3}, gamma="eta",  # its authors' choice and diffusers' word (arXiv:2402.19159)
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
    """The sampler called `name`, which may say a gamma: `tcd:0.5`. Raises `UserError` for what is none."""
    plain, colon, given = name.partition(":")
    if plain not in SAMPLERS:
        raise UserError(f"sampler {name!r} is unknown; choose one of {', '.join(SAMPLERS)}")
    entry = SAMPLERS[plain]
    if not colon:
        return entry
    if entry.gamma is None:
        able = ", ".join(other for other, each in SAMPLERS.items() if each.gamma)
        raise UserError(f"sampler {name!r}: {plain} has no gamma, the share of noise renewed; {able} has")
    gamma = _gamma(given)
    if gamma is None:
        raise UserError(f"sampler {name!r}: gamma is a number from 0 (no noise renewed) to 1, as {plain}:0.5")
    told = f", gamma {gamma:g}"
    return replace(
        entry, title=entry.title + told, app_title=entry.app_title and entry.app_title + told,
        call={**entry.call, entry.gamma: gamma}, stochastic=entry.stochastic and gamma > 0,
    )  # fmt: skip


def _gamma(text: str) -> float | None:
    try:
        gamma = float(text)
    except ValueError:
        return None
    return abs(gamma) if 0 <= gamma <= 1 else None  # a NaN is neither; -0 is 0


def spelled(name: str) -> str:
    """`name` as configs and results have it: one spelling for each gamma. Raises as `sampler_of`."""
    sampler_of(name)
    plain, colon, given = name.partition(":")
    return f"{plain}:{_gamma(given):g}" if colon else name


def serves_adapter(name: str) -> bool:
    """Whether a few-step adapter may be drawn with the sampler of that name; False for a name of none."""
    try:
        return sampler_of(name).for_adapter
    except UserError:
        return False


def in_file_name(name: str) -> str:
    """A sampler's name as part of a file's, where `:` may not stand."""
    return name.replace(":", "")


def title_of(name: str) -> str:
    """How people call a sampler; the name itself where the table lacks it, as in older results."""
    try:
        return sampler_of(name).title
    except UserError:
        return name


def deterministic(name: str, steps: int) -> bool:
    """Whether a picture of `steps` steps follows from its initial noise alone."""
    return steps == 1 or not sampler_of(name).stochastic
