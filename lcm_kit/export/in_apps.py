"""How a LoRA is drawn, for the card: in diffusers' words, and what apps take that lack or rename its sampler.

Read in the apps' own code, in the versions of `apps.VERSIONS`; docs/lora-files.md has the table, and
`tests/test_app_samplers.py` holds it against diffusers. *LCM*. ComfyUI: the mode `lcm` of
`comfy_extras/nodes_model_advanced.py` derives from `EPS` and keeps 50 of 1000 sigmas, of which the scheduler
`simple` (`comfy/samplers.py`) takes those of diffusers' `LCMScheduler`; `nodes.py` names the nodes. A1111 and
Forge: `LCMCompVisDenoiser` of `modules/sd_samplers_lcm.py` keeps the same 50; A1111's takes every output for
epsilon, Forge's asks the model's own predictor, which `backend/loader.py` sets up. InvokeAI draws with
diffusers' schedulers and the base's scheduler config (`invocations/denoise_latents.py`).

*DDIM with trailing timesteps* is `euler` over the sigmas that `simple` takes of all 1000
(`comfy/samplers.py`, whose `ddim` is `euler`; `modules/sd_schedulers.py`). What A1111 and Forge call DDIM
counts its timesteps from 1 up in steps of 1000 / n and makes n - 1 calls
(`modules/sd_samplers_timesteps.py`). InvokeAI's takes the spacing from the base's scheduler config, where the
published ones say nothing or `leading`.

*TCD* is in neither ComfyUI nor A1111 nor Forge. The custom nodes JettHu/ComfyUI-TCD (f2b6e97) are
diffusers' scheduler for epsilon bases. Euler a steps down to a sigma between and renews noise up from there,
as TCD does: only how far down differs, which its eta sets (`ancestral_eta`). InvokeAI has diffusers' TCD with
an eta of 1.

No app but diffusers asks the UNet of pure noise at another timestep than the noise's own (`lcm:399`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from lcm_kit import samplers
from lcm_kit.lora.provenance import Provenance


class Use(NamedTuple):
    """How a few-step LoRA is drawn: as was measured to serve best, else as its method says."""

    sampler: str  # its name in `samplers`, without a gamma
    name: str  # as apps call it
    steps: int
    scheduler: str  # diffusers' class
    settings: str  # what its `from_config` takes besides the base's own, as `, timestep_spacing="trailing"`
    call: str  # what the pipeline's call takes besides, as `, eta=0.3`
    gamma: float | None  # the share of noise renewed, where it can be chosen
    eta: float | None  # of Euler a, to renew about as much
    timestep: int | None  # that the UNet is told in the one step of `lcm:399`; None: the noise's own
    tried: str | None  # other numbers of steps that are worth a trial: `2 to 8`
    only: str | None  # why there is no other number


def use_of(facts: Provenance) -> Use:
    """What the card says of drawing with the LoRA that `facts` are of."""
    method, best = facts.student, facts.recommended
    measured = best is not None and best.steps is not None
    sampler, steps = method.sampler, method.usual_steps
    if best is not None and best.sampler is not None and best.steps is not None:
        sampler, steps = best.sampler, best.steps
    entry = samplers.sampler_of(sampler)
    gamma, (timestep,) = entry.call.get("eta"), entry.call.get("timesteps", [None])
    several = [n for n in method.judged_steps if n > 1]
    return Use(
        sampler.partition(":")[0], entry.name_in_apps, steps, entry.scheduler,
        samplers.keywords(entry.settings), samplers.keywords(entry.call), gamma,
        None if gamma is None else ancestral_eta(gamma, steps), timestep,
        spread(several) if len(several) > 1 else None,
        None if measured or method.only_steps is None else _why_only(facts),
    )  # fmt: skip


def _why_only(facts: Provenance) -> str:
    return "one for each of its phases" if "phases" in facts.method.constants else "what it was made for"


def spread(values: Iterable[float]) -> str:
    """`4`, or `4 to 6` where the values differ."""
    values = list(values)
    ends = [f"{end:g}" for end in (min(values), max(values))]
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)


def ancestral_eta(gamma: float, steps: int) -> float:
    """The eta of Euler a that renews about as much noise in `steps` steps as TCD with `gamma`, to 0.05.

    In sigma / alpha, of Stable Diffusion's noise, TCD steps from a down to that of (1 - gamma) t', and up
    again to that of t', b; Euler a down to sqrt(b^2 - up^2) with up = eta b sqrt(a^2 - b^2) / a. So each step
    has an eta of its own, and an app one for all: their mean, at most 1. One step renews nothing: then 0.
    """
    from lcm_kit.core.schedule import SD_BETAS, Schedule, trailing

    schedule = Schedule.from_config(SD_BETAS)
    noise = (schedule.sigma / schedule.alpha).double().tolist()
    times = trailing(schedule.steps, steps).flip(0).tolist()
    found = []
    for t, after in zip(times, times[1:], strict=False):
        down = noise[int((1 - gamma) * after)] / noise[after]
        found.append(min(1.0, ((1 - down**2) / (1 - (noise[after] / noise[t]) ** 2)) ** 0.5))
    return round(20 * sum(found) / len(found)) / 20 if found else 0.0
