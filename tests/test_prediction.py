from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lcm_kit.core.prediction import KINDS, from_x0_eps, predictor, to_x0_eps
from lcm_kit.core.schedule import Schedule, add_noise
from lcm_kit.errors import UserError
from tests.gaussians import SD

SCHEDULE = Schedule.from_config(SD)
ZERO_SNR = Schedule.from_config(SD | {"rescale_betas_zero_snr": True})
T = torch.tensor([0, 19, 499, 999])


def sample(schedule: Schedule = SCHEDULE) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(4, 3, 2, 2, generator=generator) for _ in range(2))
    return x0, noise, add_noise(schedule, x0, noise, T)


@pytest.mark.parametrize("kind", KINDS)
def test_output_and_back(kind: str) -> None:
    x0, noise, x = sample()
    output = from_x0_eps(SCHEDULE, kind, x0, noise, T)
    found_x0, found_eps = to_x0_eps(SCHEDULE, kind, output, x, T)
    torch.testing.assert_close(found_x0, x0, atol=1e-5, rtol=0)
    torch.testing.assert_close(found_eps, noise, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_x0_and_eps_always_make_up_x(kind: str) -> None:
    _, _, x = sample()
    x0, eps = to_x0_eps(SCHEDULE, kind, torch.randn_like(x), x, T)
    torch.testing.assert_close(add_noise(SCHEDULE, x0, eps, T), x, atol=1e-5, rtol=0)


def test_velocity_is_that_of_progressive_distillation() -> None:
    x0, noise, _ = sample()
    alpha, sigma = SCHEDULE.alpha[19], SCHEDULE.sigma[19]
    v = from_x0_eps(SCHEDULE, "v_prediction", x0, noise, T)
    torch.testing.assert_close(v[1], alpha * noise[1] - sigma * x0[1])


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_pure_noise_is_finite_and_exact(kind: str) -> None:
    x0, noise, x = sample(ZERO_SNR)
    output = from_x0_eps(ZERO_SNR, kind, x0, noise, T)
    found_x0, found_eps = to_x0_eps(ZERO_SNR, kind, output, x, T)
    torch.testing.assert_close(found_x0[3], x0[3], atol=0, rtol=0)
    torch.testing.assert_close(found_eps[3], x[3], atol=0, rtol=0)


def test_epsilon_on_pure_noise_is_refused_before_the_first_call() -> None:
    with pytest.raises(UserError, match="epsilon on a schedule with zero terminal SNR"):
        predictor(lambda x, t: x, ZERO_SNR, "epsilon")


def test_unknown_kinds_are_refused() -> None:
    with pytest.raises(UserError, match="'flow'; lcm-kit knows epsilon, v_prediction, sample"):
        predictor(lambda x, t: x, SCHEDULE, "flow")


@pytest.mark.parametrize("kind", KINDS)
def test_a_half_precision_model_speaks_float32(kind: str) -> None:
    _, _, x = sample()
    x0, eps = predictor(lambda x, t: x.bfloat16(), SCHEDULE, kind)(x, T)
    assert x0.dtype == eps.dtype == torch.float32
