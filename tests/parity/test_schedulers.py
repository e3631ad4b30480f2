"""Our schedule, noising, step and endpoint against diffusers' schedulers, which users sample with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, LCMScheduler
from torch import Tensor

from lcm_kit.core.methods import LCM
from lcm_kit.core.prediction import KINDS, predictor, to_x0_eps
from lcm_kit.core.schedule import Schedule, add_noise, grid
from lcm_kit.core.solvers import ddim
from tests.gaussians import SD

CONFIGS: dict[str, dict[str, Any]] = {
    "sd": SD,
    "linear": {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "trained": {"trained_betas": torch.linspace(0.001, 0.03, 1000).tolist()},
    "short": SD | {"num_train_timesteps": 250},
    "zero_snr": SD | {"rescale_betas_zero_snr": True},
}
T = torch.tensor([19, 259, 499, 999])


def latents(seed: int) -> Tensor:
    return torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", CONFIGS)
def test_tables(name: str) -> None:
    reference = DDPMScheduler(**CONFIGS[name])
    schedule = Schedule.from_config(reference.config)
    # diffusers goes through betas once more for zero terminal SNR, which costs digits.
    atol = 2e-5 if name == "zero_snr" else 1e-6
    torch.testing.assert_close(schedule.alpha**2, reference.alphas_cumprod, atol=atol, rtol=0)


def test_the_tables_of_stable_diffusion_are_diffusers_own_bit_for_bit() -> None:
    reference = DDPMScheduler(**SD)
    schedule = Schedule.from_config(reference.config)
    assert torch.equal(schedule.alpha, reference.alphas_cumprod**0.5)
    assert torch.equal(schedule.sigma, (1 - reference.alphas_cumprod) ** 0.5)


def test_defaults_of_an_empty_config_are_diffusers_own() -> None:
    schedule = Schedule.from_config({})
    assert torch.equal(schedule.alpha, DDPMScheduler().alphas_cumprod ** 0.5)


@pytest.mark.parametrize("scheduler", [DDPMScheduler, DDIMScheduler])
def test_add_noise(scheduler: Any) -> None:
    reference = scheduler(**SD)
    noised = add_noise(Schedule.from_config(reference.config), latents(0), latents(1), T)
    torch.testing.assert_close(noised, reference.add_noise(latents(0), latents(1), T), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_velocity_and_ddim_step(kind: str) -> None:
    reference = DDIMScheduler(
        **SD, clip_sample=False, set_alpha_to_one=False, prediction_type=kind, timestep_spacing="trailing"
    )
    reference.set_timesteps(50)
    assert reference.timesteps.flip(0).tolist() == grid(1000, 50).tolist()
    schedule = Schedule.from_config(reference.config)
    x, output = latents(0), latents(1)
    for t in (999, 499, 39, 19):
        step, s = (
            reference.step(output, t, x),
            max(t - 20, 0),
        )  # diffusers: timestep -1 has the alpha of timestep 0
        found = ddim(
            predictor(lambda x, t: output, schedule, kind),
            schedule,
            x,
            torch.full((4,), t),
            torch.full((4,), s),
        )
        # Epsilon divides by alpha, 0.068 at t = 999: x0 is 15 times as large there, and so is its rounding.
        torch.testing.assert_close(found, step.prev_sample, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_endpoint_is_what_the_lcm_scheduler_denoises_to(kind: str) -> None:
    reference = LCMScheduler(**SD, prediction_type=kind)
    reference.set_timesteps(50, original_inference_steps=50)
    schedule = Schedule.from_config(reference.config)
    x, output = latents(0), latents(1)
    for timestep in (999, 499, 39, 19):
        t = torch.full((4,), timestep)
        x0, eps = to_x0_eps(schedule, kind, output, x, t)
        found = LCM().endpoint(schedule, x, x0, eps, t, torch.zeros_like(t))
        reference._step_index = None
        denoised = reference.step(output, torch.tensor(timestep), x, generator=torch.Generator()).denoised
        torch.testing.assert_close(found, denoised, atol=1e-5, rtol=1e-6)


def test_boundary_scalings_are_those_of_the_lcm_scheduler() -> None:
    reference, method, one = LCMScheduler(**SD), LCM(), torch.ones(1, 1, 1, 1)
    schedule = Schedule.from_config(SD)
    for timestep in (0, 1, 19, 39, 999):
        t = torch.tensor([timestep])
        c_skip, c_out = reference.get_scalings_for_boundary_condition_discrete(timestep)
        assert method.endpoint(schedule, one, 0 * one, one, t, 0 * t).item() == pytest.approx(
            c_skip, rel=1e-6
        )
        assert method.endpoint(schedule, 0 * one, one, one, t, 0 * t).item() == pytest.approx(c_out, rel=1e-6)
