"""Samplers as diffusers' schedulers: which it is, with what of the base, and what a pipeline's call takes."""

from __future__ import annotations

import math
from typing import Any, NotRequired, TypedDict, cast

from lcm_kit.errors import UserError
from lcm_kit.samplers import sampler_of

# Keys of a scheduler's configuration that say what the base is; all others say how to sample
_NOISE = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type",
    "rescale_betas_zero_snr",
)  # fmt: skip


def noise_of(config: Any) -> dict[str, Any]:
    """What a scheduler's `config` says of the base, without how it samples."""
    return {key: config[key] for key in _NOISE if config.get(key) is not None}


def scheduler(sampler: str, config: Any) -> Any:
    """diffusers' scheduler for `sampler`, with the noise and the prediction type of the base's own `config`.

    How the base's scheduler samples (Karras' sigmas, order, spacing, clipping, ...) is not taken over:
    "ddim" is the same sampler on every base (`lcm_kit.samplers`). Raises `UserError` for an unknown sampler.
    """
    import diffusers

    chosen = sampler_of(sampler)
    return getattr(diffusers, chosen.scheduler).from_config(noise_of(config), **chosen.settings)


def unet_calls(steps: int, guidance_scale: float) -> int:
    """UNet passes for one image: guidance costs a second, unconditional pass in each step."""
    return steps * (2 if guidance_scale > 1 else 1)


def require_possible(sampler: str, steps: int, guidance_scale: float) -> None:
    """Raise `UserError` for steps that `sampler` cannot take, and for a guidance_scale that is none."""
    most = sampler_of(sampler).most_steps
    if not 1 <= steps <= most:
        raise UserError(f"steps {steps} is impossible with sampler {sampler}; give 1 to {most}")
    if not 1 <= guidance_scale < math.inf:  # a NaN is neither
        raise UserError(
            f"guidance_scale {guidance_scale} is below 1; 1 means none, the teacher's is often 3 to 8"
        )


def require_guided(negative_prompt: Any, guidance_scale: float) -> None:
    """Raise `UserError` for a negative prompt where there is no guidance that it could lead."""
    if negative_prompt is not None and guidance_scale <= 1:
        raise UserError(
            "a negative prompt does nothing without guidance; give a guidance_scale above 1, or leave it out"
        )


class CallSettings(TypedDict):
    """What a call of a diffusers pipeline takes besides the prompt to draw with a sampler."""

    num_inference_steps: int
    guidance_scale: float
    eta: NotRequired[float]  # of tcd alone
    timesteps: NotRequired[list[int]]  # of lcm:TIMESTEP alone


def call_settings(sampler: str, steps: int, guidance_scale: float) -> CallSettings:
    """The keywords of a pipeline's call that go with `scheduler(sampler, ...)`."""
    known: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": guidance_scale}
    return cast(CallSettings, {**known, **sampler_of(sampler).call})
