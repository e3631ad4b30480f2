"""DDIM with trailing timesteps and TCD as apps have them: formulas, written out slowly, against diffusers.

The world is a Gaussian, whose perfect model is known and does not predict the same x0 at every step: what is
drawn then tells one schedule from another. Apps count in x / alpha and sigma / alpha.
"""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDIMScheduler, TCDScheduler
from torch import Tensor

from lcm_kit import sample
from lcm_kit.export.in_apps import ancestral_eta

BASE = {
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
}  # fmt: skip
# As the published SD1.5 has it, whose own scheduler is PNDM
SD15 = {**BASE, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, "skip_prk_steps": True}
MEAN, STD = 0.4, 0.6  # of the world
BAR = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)
TABLE = ((1 - BAR) / BAR).sqrt().tolist()  # sigma / alpha at t = 0 .. 999
NOISES = torch.randn(9, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def eps(x: Tensor, t: int) -> Tensor:
    """What the perfect model says at x = alpha x0 + sigma z, which it is told to be at t."""
    alpha, var = BAR[t].sqrt(), 1 - BAR[t]
    x0 = MEAN + STD**2 * alpha / (STD**2 * alpha**2 + var) * (x - alpha * MEAN)
    return (x - alpha * x0) / var.sqrt()


def nearest(sigma: float) -> int:
    """The timestep that an app asks its model at: the nearest in log sigma."""
    return min(range(1000), key=lambda t: abs(math.log(TABLE[t] / sigma)))


def denoised(x: Tensor, sigma: float) -> Tensor:
    return x - sigma * eps(x / math.sqrt(1 + sigma**2), nearest(sigma))


def simple(steps: int, timesteps: int = 1000) -> list[int]:
    """`simple`, *Simple*: by place in the table of 1000, or of the 50 that ComfyUI-TCD keeps."""
    table = list(range(1000 // timesteps - 1, 1000, 1000 // timesteps))
    return [table[-1 - int(k * len(table) / steps)] for k in range(steps)]


def sgm_uniform(steps: int) -> list[float]:
    """`sgm_uniform`, *SGM Uniform*: evenly from 999 towards 0, between timesteps too."""
    return [999 - k * 999 / steps for k in range(steps)]


def sigma_at(t: float) -> float:
    """Interpolated in log sigma."""
    low, part = int(t), t - int(t)
    return math.exp(math.log(TABLE[low]) * (1 - part) + math.log(TABLE[min(low + 1, 999)]) * part)


def euler(sigmas: list[float], eta: float = 0.0) -> Tensor:
    """`euler` and, with an eta, `euler_ancestral`, *Euler a*; ComfyUI's first noise."""
    x = NOISES[0] * math.sqrt(1 + sigmas[0] ** 2)
    for k, (now, after) in enumerate(zip(sigmas, [*sigmas[1:], 0.0], strict=True)):
        up = min(after, eta * math.sqrt(after**2 * (now**2 - after**2) / now**2))
        down = math.sqrt(after**2 - up**2)
        x0 = denoised(x, now)
        x = x + (x - x0) / now * (down - now) + NOISES[k + 1] * up
    return x


def diffusers_ddim(steps: int, config: dict[str, object] | None = None) -> Tensor:
    """As the kit draws, or from another configuration, as InvokeAI does."""
    made = sample.scheduler("ddim", BASE) if config is None else DDIMScheduler.from_config(config)
    made.set_timesteps(steps)
    x = NOISES[0]
    for t in map(int, made.timesteps):
        x = made.step(eps(x, t), t, x).prev_sample
    return x


def diffusers_tcd(steps: int, gamma: float) -> Tensor:
    """TCDScheduler's steps with the noise of this file."""
    made = sample.scheduler(f"tcd:{gamma:g}", BASE)
    made.set_timesteps(steps)
    times, x = [*map(int, made.timesteps), 0], NOISES[0]
    assert isinstance(made, TCDScheduler)
    for k, (t, after) in enumerate(zip(times, times[1:], strict=False)):
        s = math.floor((1 - gamma) * after)
        landed = made.step(eps(x, t), t, x, eta=gamma, generator=torch.Generator()).pred_noised_sample
        ratio = BAR[after] / BAR[s]
        x = ratio.sqrt() * landed + (1 - ratio).sqrt() * NOISES[k + 1]
    return x


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


# -- DDIM with trailing timesteps ----------------------------------------------------------------------------


@pytest.mark.parametrize("steps", range(1, 9))
def test_euler_with_simple_is_ddim_with_trailing_timesteps(steps: int) -> None:
    """ComfyUI, A1111 and Forge. To the number where steps divide 1000, to within one timestep elsewhere."""
    made = sample.scheduler("ddim", BASE)
    made.set_timesteps(steps)
    wanted, asked = made.timesteps.tolist(), simple(steps)
    off = max(abs(a - b) for a, b in zip(asked, wanted, strict=True))
    assert off == 0 if 1000 % steps == 0 else off <= 1
    found = apart(euler([TABLE[t] for t in asked]), diffusers_ddim(steps))
    # With 6 and 7 steps diffusers' last lands at t = 0, where sigma is 0.029, and not at clean data
    assert found < 2e-5 if 1000 % steps == 0 else found < (5e-3 if steps == 3 else 0.06)


@pytest.mark.parametrize("steps", [2, 4, 8, 20, 50])
def test_dpmpp_2m_with_simple_is_dpm_solver_with_trailing_timesteps(steps: int) -> None:
    """As a picture's text names it: two steps' x0 drawn out to the middle of the next, but for the last."""
    made = sample.scheduler("dpmpp_2m", BASE)
    made.set_timesteps(steps)
    wanted = NOISES[0]
    for t in map(int, made.timesteps):
        wanted = made.step(eps(wanted, t), t, wanted).prev_sample
    sigmas = [TABLE[t] for t in simple(steps)]
    x, before, last = NOISES[0] * math.sqrt(1 + sigmas[0] ** 2), None, 0.0
    for now, after in zip(sigmas, [*sigmas[1:], 0.0], strict=True):
        x0 = denoised(x, now)
        length = math.log(now / after) if after else math.inf
        ahead = x0 if before is None or not after else x0 + (x0 - before) * length / (2 * last)
        x = after / now * x + (1 - after / now) * ahead
        before, last = x0, length
    assert apart(x, wanted) < 2e-5 and apart(NOISES[0], wanted) > 0.1


@pytest.mark.parametrize("steps", [2, 4, 8])
def test_sgm_uniform_is_near_and_ddim_of_a1111_and_forge_is_not(steps: int) -> None:
    wanted = diffusers_ddim(steps)
    near = apart(euler([sigma_at(t) for t in sgm_uniform(steps)]), wanted)
    assert 1e-4 < near < 0.02
    # *DDIM* counts 1, 1 + 1000 / n, ..., begins at the last of them with pure noise and stops at t = 1
    times = list(range(1, 1001, 1000 // steps))[::-1]
    assert times[0] == 1001 - 1000 // steps
    x, calls = NOISES[0], 0
    for t, after in zip(times, times[1:], strict=False):
        said, calls = eps(x, t), calls + 1
        x0 = (x - (1 - BAR[t]).sqrt() * said) / BAR[t].sqrt()
        x = BAR[after].sqrt() * x0 + (1 - BAR[after]).sqrt() * said
    assert calls == steps - 1
    assert apart(x, wanted) > 20 * near


def test_first_noise_of_a1111_is_as_good() -> None:
    """It is sigma z, where ComfyUI's is sqrt(1 + sigma^2) z: at the last timestep 0.2% apart."""
    assert TABLE[999] / math.sqrt(1 + TABLE[999] ** 2) == pytest.approx(0.9977, abs=1e-4)


@pytest.mark.parametrize("steps", [2, 4, 8])
def test_invokeais_ddim_must_be_told_trailing_timesteps(steps: int) -> None:
    """It takes spacing from the base, which has none: then the first call is below the last timestep."""
    wanted = diffusers_ddim(steps)
    plain = DDIMScheduler.from_config(SD15)
    plain.set_timesteps(steps)
    assert int(plain.timesteps[0]) == 1001 - 1000 // steps
    told = {**SD15, "timestep_spacing": "trailing"}
    assert apart(diffusers_ddim(steps, {**told, "set_alpha_to_one": True}), wanted) == 0
    # The published base ends at t = 0, where sigma is 0.029, and not at clean data
    assert apart(diffusers_ddim(steps, told), wanted) < 0.1
    assert apart(diffusers_ddim(steps, SD15), diffusers_ddim(steps, told)) > 0.03


# -- TCD -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_the_custom_nodes_are_diffusers_tcd(steps: int, gamma: float) -> None:
    """JettHu/ComfyUI-TCD, `sample_tcd`: 50 sigmas, `simple`, the step in x / alpha."""
    times = [*simple(steps, 50), 0]
    made = sample.scheduler("tcd", BASE)
    made.set_timesteps(steps)
    assert times[:-1] == made.timesteps.tolist()
    x = NOISES[0] * math.sqrt(1 + TABLE[times[0]] ** 2)
    for k, t in enumerate(times[:-1]):
        last = k + 1 == steps
        after = 0.0 if last else TABLE[times[k + 1]]
        s = 0 if last else math.floor((1 - gamma) * times[k + 1])
        x0 = denoised(x, TABLE[t])
        landed = BAR[s].sqrt() * x0 + (1 - BAR[s]).sqrt() * (x - x0) / TABLE[t]
        if gamma > 0 and not last:
            x = landed / BAR[s].sqrt() + NOISES[k + 1] * (after**2 + 1 - 1 / BAR[s]).clamp_min(0).sqrt()
        else:
            x = landed * math.sqrt(after**2 + 1)
    assert apart(x, diffusers_tcd(steps, gamma)) < 2e-5


@pytest.mark.parametrize(("steps", "eta"), [(1, 0.0), (2, 0.8), (3, 0.8), (4, 0.85), (8, 0.95), (16, 1.0)])
def test_euler_a_renews_about_as_much_noise_as_tcd(steps: int, eta: float) -> None:
    """At gamma 0.3. Which gamma a step of Euler a is equal to is found on the table, not by the formula."""
    assert ancestral_eta(0.3, steps) == pytest.approx(eta)
    times = simple(steps)

    def gammas(eta: float) -> list[float]:
        found = []
        for t, after in zip(times, times[1:], strict=False):
            now, to = TABLE[t], TABLE[after]
            up = min(to, eta * math.sqrt(to**2 * (now**2 - to**2) / now**2))
            down = math.sqrt(to**2 - up**2)
            found.append(1 - next(s for s in range(1000) if TABLE[s] >= down) / after)
        return found

    if steps in (2, 3, 4):
        assert all(0.15 < gamma < 0.45 for gamma in gammas(eta))
        assert sum(gammas(eta)) / (steps - 1) == pytest.approx(0.3, abs=0.03)
        assert sum(gammas(1.0)) / (steps - 1) > 0.45  # *Euler a* as it is
    if steps == 16:
        assert sum(gammas(1.0)) / (steps - 1) < 0.3  # at its most it renews less in so small steps
    assert ancestral_eta(0.0, steps) == 0.0 and ancestral_eta(1.0, 4) == 1.0


@pytest.mark.parametrize("steps", [2, 4, 8])
def test_euler_a_draws_what_tcd_draws_on_the_whole(steps: int) -> None:
    """The same noises, of 64 pictures; *Euler* is TCD without new noise, over timesteps near its own."""
    sigmas, wanted = [TABLE[t] for t in simple(steps)], diffusers_tcd(steps, 0.3)
    found = euler(sigmas, ancestral_eta(0.3, steps))
    assert apart(found, wanted) < 0.2 and apart(found, wanted) < 0.3 * apart(euler(sigmas), wanted)
    assert apart(euler(sigmas), diffusers_tcd(steps, 0.0)) < 0.1  # TCD ends at t = 0, Euler at clean data


def test_simple_is_within_twenty_timesteps_of_tcds() -> None:
    for steps in range(1, 51):
        pairs = zip(simple(steps), simple(steps, 50), strict=True)
        assert max(abs(a - b) for a, b in pairs) <= 20
