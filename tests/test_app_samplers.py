"""What the card says of samplers: the apps' formulas, written out slowly, against diffusers' LCMScheduler.

ComfyUI's `lcm` sampler and A1111's take x0 from the model at each sigma and add noise of the next one. What
differs is which sigmas a schedule picks, and which timestep the model is then asked at.
"""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import LCMScheduler
from torch import Tensor

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
POINT = torch.tensor([0.7, -1.3, 0.2], dtype=torch.float64)  # the only picture of the world
NOISES = torch.randn(9, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def sigmas(scheduler: LCMScheduler) -> list[float]:
    """sigma / alpha at t = 0 .. 999."""
    return ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).double().sqrt().tolist()


class Distilled:
    """ComfyUI's mode `lcm` and A1111's LCMCompVisDenoiser: the 50 timesteps 19, 39, ..., 999."""

    def __init__(self, table: list[float]) -> None:
        self.timesteps = list(range(19, 1000, 20))
        self.sigmas = [table[t] for t in self.timesteps]

    def timestep(self, sigma: float) -> int:
        """The nearest in log sigma."""
        return min(
            zip(self.sigmas, self.timesteps, strict=True), key=lambda st: abs(math.log(st[0] / sigma))
        )[1]

    def sigma(self, timestep: float) -> float:
        """Interpolated in log sigma."""
        place = min(max((timestep - 19) / 20, 0.0), 49.0)
        low, high = math.floor(place), math.ceil(place)
        return math.exp(
            math.log(self.sigmas[low]) * (1 - place + low) + math.log(self.sigmas[high]) * (place - low)
        )


class Full(Distilled):
    """ComfyUI's ModelSamplingDiscrete in its other modes: all 1000."""

    def __init__(self, table: list[float]) -> None:
        self.timesteps, self.sigmas = list(range(1000)), table


def simple(model: Distilled, steps: int) -> list[float]:
    """`simple` of ComfyUI, *Simple* of Forge and of A1111 from 1.10 on: by place in the table, from above."""
    return [model.sigmas[-1 - int(k * len(model.sigmas) / steps)] for k in range(steps)]


def sgm_uniform(model: Distilled, steps: int) -> list[float]:
    """Evenly in timesteps from 999 down, without the end at 19."""
    return [model.sigma(999 - k * 980 / steps) for k in range(steps)]


def automatic(model: Distilled, steps: int) -> list[float]:
    """A1111's and Forge's *Automatic*: evenly from 999 to 19, with both."""
    return [model.sigma(999 - k * 980 / max(steps - 1, 1)) for k in range(steps)]


def alpha_sigma(table: list[float], t: int) -> tuple[float, float]:
    alpha = 1 / math.sqrt(1 + table[t] ** 2)
    return alpha, alpha * table[t]


def output(x: Tensor, t: int, table: list[float], kind: str) -> Tensor:
    """What the perfect model of the one point says at x = alpha x0 + sigma eps."""
    alpha, sigma = alpha_sigma(table, t)
    eps = (x - alpha * POINT) / sigma
    return eps if kind == "epsilon" else alpha * eps - sigma * POINT


def boundary(t: int) -> tuple[float, float]:
    scaled = 10.0 * t
    return 0.25 / (scaled**2 + 0.25), scaled / math.sqrt(scaled**2 + 0.25)


def draw(model: Distilled, schedule: list[float], table: list[float], kind: str, read_as: str) -> Tensor:
    """x0 after all steps; the model predicts `kind`, and the app takes its output for `read_as`."""
    x = NOISES[0] * schedule[0]
    for k, sigma in enumerate(schedule):
        t = model.timestep(sigma)
        found = output(x / math.sqrt(1 + sigma**2), t, table, kind)
        if read_as == "v_prediction":
            x0 = x / (1 + sigma**2) - found * sigma / math.sqrt(1 + sigma**2)
        else:
            skip, out = boundary(t)
            x0 = skip * x + out * (x - sigma * found)
        x = x0 + NOISES[k + 1] * schedule[k + 1] if k + 1 < len(schedule) else x0
    return x


def diffusers_draw(steps: int, kind: str, **config: object) -> Tensor:
    """The same with diffusers' scheduler and the same noise."""
    scheduler = LCMScheduler(**BETAS, prediction_type=kind, **config)  # type: ignore[arg-type]
    table = sigmas(scheduler)
    scheduler.set_timesteps(steps)
    x = NOISES[0]
    for k, t in enumerate(map(int, scheduler.timesteps)):
        alpha, sigma = alpha_sigma(table, t)
        found = output(x, t, table, kind)
        x0 = (x - sigma * found) / alpha if kind == "epsilon" else alpha * x - sigma * found
        skip, out = boundary(t)
        x0 = out * x0 + skip * x
        if k + 1 == steps:
            return x0
        alpha, sigma = alpha_sigma(table, int(scheduler.timesteps[k + 1]))
        x = alpha * x0 + sigma * NOISES[k + 1]
    raise AssertionError


@pytest.mark.parametrize("steps", range(1, 9))
def test_simple_is_diffusers_own_schedule(steps: int) -> None:
    """The timesteps to the number; *SGM Uniform* and *Automatic* are others, and *Automatic* ends at 19."""
    scheduler = LCMScheduler(**BETAS)  # type: ignore[arg-type]
    scheduler.set_timesteps(steps)
    wanted = scheduler.timesteps.tolist()
    model = Distilled(sigmas(scheduler))

    def asked(schedule: list[float]) -> list[int]:
        return [model.timestep(sigma) for sigma in schedule]

    assert asked(simple(model, steps)) == wanted
    if steps > 1:
        assert asked(automatic(model, steps))[-1] == 19 < 100 < wanted[-1]
    # 49 intervals of 20: only a divisor of 49 leaves *SGM Uniform* on the timesteps that were distilled
    same = sgm_uniform(model, steps) == pytest.approx(simple(model, steps), rel=1e-3)
    assert same == (49 % steps == 0)


@pytest.mark.parametrize("steps", [2, 4, 8])
def test_on_an_epsilon_base_simple_is_exact_and_sgm_uniform_is_not(steps: int) -> None:
    table = sigmas(LCMScheduler(**BETAS))  # type: ignore[arg-type]
    model, wanted = Distilled(table), diffusers_draw(steps, "epsilon")
    found = draw(model, simple(model, steps), table, "epsilon", "epsilon")
    assert float((found - wanted).abs().max()) < 1e-6
    off = draw(model, sgm_uniform(model, steps), table, "epsilon", "epsilon")
    assert 1e-3 < float((off - wanted).abs().max()) < 0.05  # asked at another t than its noise is of


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("steps", [2, 4, 8])
def test_a_v_base_wants_mode_v_prediction(steps: int, zero_snr: bool) -> None:
    """The mode `lcm`, and A1111's LCM sampler, take v for epsilon: garbage."""
    scheduler = LCMScheduler(**BETAS, rescale_betas_zero_snr=zero_snr)  # type: ignore[arg-type]
    table = sigmas(scheduler)
    if zero_snr:  # infinite; ComfyUI and Forge take alpha^2 = 4.9e-8 there
        table[-1] = math.sqrt(1 / 4.8973451890853435e-08 - 1)
    model = Full(table)
    found = draw(model, simple(model, steps), table, "v_prediction", "v_prediction")
    assert float((found - POINT).abs().max()) < 5e-4
    if not zero_snr:
        wanted = diffusers_draw(steps, "v_prediction")
        assert float((found - wanted).abs().max()) < 5e-4
    garbage = draw(Distilled(table), simple(Distilled(table), steps), table, "v_prediction", "epsilon")
    assert float((garbage - POINT).abs().max()) > 0.3
