from __future__ import annotations

import math

import pytest
import torch

from lcm_kit.core.schedule import Schedule, add_noise, grid, grid_steps, interval_weight
from lcm_kit.errors import UserError
from tests.gaussians import SD

SCHEDULE = Schedule.from_config(SD)


def test_tables_of_stable_diffusion() -> None:
    """abar_0 = 1 - 0.00085; the terminal signal of SD is 0.068265 (arXiv:2305.08891, table 1)."""
    assert SCHEDULE.steps == 1000
    assert SCHEDULE.alpha.dtype == SCHEDULE.sigma.dtype == torch.float32
    assert SCHEDULE.alpha[0].item() == pytest.approx((1 - 0.00085) ** 0.5, abs=1e-7)
    assert SCHEDULE.alpha[999].item() == pytest.approx(0.068265, abs=1e-5)
    torch.testing.assert_close(SCHEDULE.alpha**2 + SCHEDULE.sigma**2, torch.ones(1000), atol=2e-7, rtol=0)
    assert not SCHEDULE.zero_terminal_snr


def test_zero_terminal_snr_keeps_the_first_alpha_and_ends_at_noise() -> None:
    rescaled = Schedule.from_config(SD | {"rescale_betas_zero_snr": True})
    assert rescaled.zero_terminal_snr
    assert (rescaled.alpha[-1].item(), rescaled.sigma[-1].item()) == (0.0, 1.0)
    assert rescaled.alpha[0].item() == pytest.approx(SCHEDULE.alpha[0].item(), abs=1e-7)


def test_trained_betas_are_used_as_they_are() -> None:
    schedule = Schedule.from_config({"trained_betas": [0.1, 0.5]})
    torch.testing.assert_close(schedule.alpha, torch.tensor([0.9, 0.45]).sqrt())


def test_defaults_are_diffusers() -> None:
    """Betas rise evenly from 0.0001 to 0.02 over 1000 timesteps."""
    schedule = Schedule.from_config({})
    assert schedule.steps == 1000
    beta = 1 - (schedule.alpha[1:].double() / schedule.alpha[:-1].double()) ** 2
    assert schedule.sigma[0].item() == pytest.approx(0.01, rel=1e-3)
    assert beta[-1].item() == pytest.approx(0.02, rel=1e-3)
    assert beta[499].item() == pytest.approx(0.0001 + 0.0199 * 500 / 999, rel=1e-3)


def test_the_cosine_schedule_is_the_papers() -> None:
    """arXiv:2102.09672, eq. 17: abar is a squared cosine with the offset 0.008; betas end at 0.999."""
    schedule = Schedule.from_config({"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 100})

    def f(i: int) -> float:
        return math.cos((i / 100 + 0.008) / 1.008 * math.pi / 2) ** 2

    for i in (0, 1, 50, 98):
        assert schedule.alpha[i].item() ** 2 == pytest.approx(f(i + 1) / f(0), rel=1e-4, abs=1e-7)
    assert (schedule.alpha[99] / schedule.alpha[98]).item() ** 2 == pytest.approx(0.001, rel=1e-2)


def test_interval_weights() -> None:
    """abar = 0.5, 0.2, 0.1 gives rho = sigma / alpha = 1, 2, 3."""
    schedule = Schedule.from_config({"trained_betas": [0.5, 0.6, 0.5]})
    found = interval_weight(schedule, torch.tensor([1, 2, 2]), torch.tensor([0, 0, 1]))
    torch.testing.assert_close(found, torch.tensor([1.0, 0.5, 1.0]))
    with pytest.raises(
        UserError, match="no weight on a base with zero terminal SNR; set loss.weighting=none"
    ):
        interval_weight(
            Schedule.from_config(SD | {"rescale_betas_zero_snr": True}), found.long(), found.long()
        )


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"trained_betas": [[0.1, 0.2]]}, r"outside of \(0, 1\]"),
        ({"beta_schedule": "sigmoid"}, "'sigmoid'.*linear, scaled_linear, squaredcos_cap_v2"),
        ({"trained_betas": [0.1, 1.5]}, r"outside of \(0, 1\]"),
        ({"trained_betas": [0.0, 0.1]}, r"outside of \(0, 1\]"),
    ],
)
def test_impossible_schedules_are_refused(config: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Schedule.from_config(config)


def test_at_has_the_shape_that_multiplies_latents() -> None:
    alpha, sigma = SCHEDULE.at(torch.tensor([0, 19, 999]))
    assert alpha.shape == sigma.shape == (3, 1, 1, 1)
    assert alpha[1].item() == SCHEDULE.alpha[19].item()


def test_noising_by_value() -> None:
    """abar = 0.64 and 0.36: alpha and sigma are 0.8, 0.6 and 0.6, 0.8."""
    schedule = Schedule.from_config({"trained_betas": [0.36, 1 - 0.36 / 0.64]})
    x0, noise = torch.tensor([2.0, -1.0]).view(2, 1, 1, 1), torch.tensor([-3.0, 5.0]).view(2, 1, 1, 1)
    noised = add_noise(schedule, x0, noise, torch.tensor([0, 1]))
    torch.testing.assert_close(noised.flatten(), torch.tensor([1.6 - 1.8, -0.6 + 4.0]))


def test_noising_is_float32_for_half_precision_latents() -> None:
    """At t = 19 sigma is 4.8% off in the bfloat16 of public scripts; here it is the float32 table's."""
    noise = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16)
    noised = add_noise(SCHEDULE, torch.zeros_like(noise), noise, torch.tensor([19]))
    assert noised.dtype == torch.float32
    assert noised.item() == SCHEDULE.sigma[19].item()


def test_grid_of_the_lcm_paper() -> None:
    assert grid(1000, 50).tolist() == list(range(19, 1000, 20))


@pytest.mark.parametrize("n", [1, 2, 3, 8, 30, 333, 1000])
def test_every_grid_rises_and_ends_at_the_last_timestep(n: int) -> None:
    points = grid(1000, n)
    assert len(points) == n and points[-1] == 999 and points[0] >= 0
    assert (points.diff() > 0).all()


@pytest.mark.parametrize("n", [0, 1001])
def test_impossible_grids_are_refused(n: int) -> None:
    with pytest.raises(UserError, match=f"grid of {n} steps is impossible on 1000 timesteps"):
        grid(1000, n)


def test_grid_doubles_in_equal_parts_of_the_run() -> None:
    sizes = [grid_steps(step, 100, 8, 50) for step in range(100)]
    assert sizes == [8] * 25 + [16] * 25 + [32] * 25 + [50] * 25


@pytest.mark.parametrize(
    ("start", "end", "sizes"), [(None, 50, [50]), (50, 50, [50]), (4, 8, [4, 8]), (2, 7, [2, 4, 7])]
)
def test_grid_steps_end_at_the_full_grid(start: int | None, end: int, sizes: list[int]) -> None:
    assert sorted({grid_steps(step, 1000, start, end) for step in range(1000)}) == sizes
    assert grid_steps(999, 1000, start, end) == end
