"""The samplers: one entry for each way of drawing a picture, from which everything else of it follows.

A sampler draws whole pictures with one of diffusers' schedulers; a solver (`lcm_kit.core.solvers`) is one
step of the ODE within distillation. Configs, the command line, sweeps, reports, cards and metadata take
names, titles and what a sampler is good for from `SAMPLERS`. Nothing heavy is imported: `scheduler` is the
name of a class.

A name may say one setting behind a colon, which is read here alone: `tcd:0.5` is TCD with a gamma of 0.5, and
`tcd` has its entry's own; `lcm:399` is one step of LCM that tells the UNet timestep 399 of its pure noise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lcm_kit.errors import UserError


@dataclass(frozen=True)
class Option:
    """What a sampler's name may say behind a colon, and what follows from it."""

    what: str  # within a sentence that says what it must be
    read: Callable[[str], float | None]  # None for a text that is none
    told: str  # at the end of a title, with the value
    changes: Callable[[Any], dict[str, Any]]  # of the entry, by field


def _gamma(text: str) -> float | None:
    try:
        gamma = float(text)
    except ValueError:
        return None
    return abs(gamma) if 0 <= gamma <= 1 else None  # a NaN is neither; -0 is 0


def _timestep(text: str) -> float | None:
    """One of the 50 that LCMScheduler knows."""
    timestep = int(text) if text.isascii() and text.isdigit() else 0
    return timestep if timestep < 1000 and (timestep + 1) % 20 == 0 else None


GAMMA = Option(
    "a gamma from 0 (no noise renewed) to 1, as tcd:0.5", _gamma, ", gamma {:g}",
    lambda gamma: {"call": {"eta": gamma}, "stochastic": gamma > 0},
)  # fmt: skip
TIMESTEP = Option(
    "one of its timesteps, 19 to 999, as lcm:399", _timestep, ", one step at timestep {:g}",
    lambda timestep: {
        "call": {"timesteps": [timestep]}, "most_steps": 1, "schedule": None,
        "instead": f"Only diffusers draws so, with timesteps=[{timestep}] in the pipeline's call.",
    },
)  # fmt: skip


@dataclass(frozen=True)
class Sampler:
    """How a sampler is called, which scheduler of diffusers it is, and what it may be used for.

    The noise and the prediction type always come from the base's own scheduler; `settings` are all the rest.
    """

    title: str  # in tables, plots and sentences
    scheduler: str  # class in diffusers
    settings: Mapping[str, Any]  # of its configuration
    app_title: str | None = None  # on cards and in metadata, as apps call it; None: as `title`
    schedule: str | None = None  # the scheduler / schedule type that goes with it in apps
    instead: str | None = None  # a sentence on apps that call it something else, or lack it
    # its sampler and schedule type as A1111 writes them into pictures; None: its title, and no type
    in_pictures: tuple[str, str] | None = None
    call: Mapping[str, Any] = field(default_factory=dict)  # what the pipeline's call takes besides
    option: Option | None = None  # what its name may say behind a colon
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
        "LCM", "LCMScheduler", {"clip_sample": False}, schedule="Simple", in_pictures=("LCM", "Simple"),
        stochastic=True, most_steps=50, for_adapter=True, option=TIMESTEP,
    ),
    "tcd": Sampler(
        "TCD", "TCDScheduler", {"clip_sample": False}, in_pictures=("TCD", "Simple"), stochastic=True,
        most_steps=50, for_adapter=True,
        instead="In apps without TCD: Euler a (without new noise Euler), scheduler / schedule type Simple.",
        call={"eta": 0.3}, option=GAMMA,  # its authors' choice and diffusers' word (arXiv:2402.19159)
    ),
    "ddim": Sampler(
        "DDIM", "DDIMScheduler",
        {"timestep_spacing": "trailing", "set_alpha_to_one": True, "clip_sample": False},
        app_title="DDIM, trailing timesteps", in_pictures=("Euler", "Simple"), for_adapter=True,
        for_base=True,
        instead="In ComfyUI, A1111 and Forge: Euler, scheduler / schedule type Simple.",
    ),
    "dpmpp_2m": Sampler(
        "DPM-Solver++ 2M", "DPMSolverMultistepScheduler",
        {
            "timestep_spacing": "trailing", "algorithm_type": "dpmsolver++", "solver_order": 2,
            "final_sigmas_type": "zero",
        },
        in_pictures=("DPM++ 2M", "Simple"), for_base=True,
    ),
}  # fmt: skip


def keywords(settings: Mapping[str, Any]) -> str:
    """`settings`, or a call's, as they stand in a program: `, clip_sample=False, ...` each behind a comma."""
    return "".join(f", {key}={_literal(value)}" for key, value in settings.items())


def _literal(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


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
    """The sampler called `name`, which may say its option. Raises `UserError` for what is none."""
    plain, colon, given = name.partition(":")
    if plain not in SAMPLERS:
        raise UserError(f"sampler {name!r} is unknown; choose one of {', '.join(SAMPLERS)}")
    entry = SAMPLERS[plain]
    if not colon:
        return entry
    if entry.option is None:
        able = " and ".join(f"{other}:..." for other, each in SAMPLERS.items() if each.option)
        raise UserError(f"sampler {name!r}: {plain} takes no setting behind a colon; only {able} do")
    value = entry.option.read(given)
    if value is None:
        raise UserError(f"sampler {name!r}: behind the colon stands {entry.option.what}")
    told = entry.option.told.format(value)
    return replace(
        entry, title=entry.title + told, app_title=entry.app_title and entry.app_title + told,
        **entry.option.changes(value),
    )  # fmt: skip


def spelled(name: str) -> str:
    """`name` as configs and results have it: one spelling for each setting. Raises as `sampler_of`."""
    option = sampler_of(name).option
    plain, colon, given = name.partition(":")
    return f"{plain}:{option.read(given):g}" if colon and option else name


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
