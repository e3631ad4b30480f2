from __future__ import annotations

import math

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from lcm_kit.core.guidance import guide
from lcm_kit.core.prediction import KINDS, from_x0_eps, predictor
from lcm_kit.core.schedule import Schedule, add_noise, grid
from lcm_kit.core.solvers import SOLVERS, Solver
from tests.gaussians import ALL, BRAND, SD

SCHEDULE = Schedule.from_config(SD)
ZERO_SNR = Schedule.from_config(SD | {"rescale_betas_zero_snr": True})
EVERY = pytest.mark.parametrize("solver", list(SOLVERS.values()), ids=list(SOLVERS))


def solve(solver: Solver, schedule: Schedule, x: Tensor, n: int) -> Tensor:
    points = [0, *grid(schedule.steps, n).tolist()]
    for t, s in zip(points[:0:-1], points[-2::-1], strict=True):
        x = solver(BRAND.predict(schedule), schedule, x, torch.full((len(x),), t), torch.full((len(x),), s))
    return x


def error(name: str, schedule: Schedule, n: int) -> float:
    """RMS distance to the exact endpoint after n steps from t = 999 to 0, on Gaussian data."""
    generator = torch.Generator().manual_seed(0)
    t = torch.full((256,), 999)
    x = add_noise(schedule, BRAND.draw(256, generator), torch.randn(256, 2, 1, 1, generator=generator), t)
    truth = BRAND.flow(schedule, x, t, torch.zeros_like(t))
    return (solve(SOLVERS[name], schedule, x, n) - truth).square().mean().sqrt().item()


@pytest.mark.parametrize("schedule", [SCHEDULE, ZERO_SNR], ids=["sd", "zero_snr"])
@pytest.mark.parametrize("name", ["heun", "dpmpp_2s"])
def test_second_order_beats_ddim_at_equal_model_calls(name: str, schedule: Schedule) -> None:
    for n in (8, 16, 50):
        assert error(name, schedule, n) < error("ddim", schedule, 2 * n)
    assert error(name, schedule, 50) < 0.2 * error("ddim", schedule, 50)


@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("dpmpp_2s", 2), ("heun", 2)])
def test_order_of_convergence(name: str, order: int) -> None:
    """Half the step, 2^order less error (with slack: in log SNR the last interval is much the longest)."""
    assert error(name, SCHEDULE, 50) / error(name, SCHEDULE, 100) > 2**order / 1.6


@pytest.mark.parametrize("r", [0.1, 0.5, 0.9])
def test_dpmpp_2s_is_the_papers_step_wherever_the_middle_is(r: float) -> None:
    """arXiv:2211.01095, algorithm 1, in lambda and float64; the one timestep in between is at the share r."""
    lam = torch.tensor([3.0, -2 + 5 * r, -2.0], dtype=torch.float64)
    exact = Schedule(torch.sigmoid(2 * lam).sqrt(), torch.sigmoid(-2 * lam).sqrt())
    t, middle, s, h = 2, 1, 0, 5.0

    def x0_at(x: Tensor, k: int) -> Tensor:
        return x**2 + 0.1 * k  # no flow's, so that each term shows

    def predict(x: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        x0 = x0_at(x, int(k[0]))
        alpha, sigma = exact.at(k)
        return x0, (x - alpha * x0) / sigma

    x = torch.tensor([0.75, -1.5], dtype=torch.float64).view(1, 2, 1, 1)
    first = x0_at(x, t)
    u = exact.sigma[middle] / exact.sigma[t] * x - exact.alpha[middle] * math.expm1(-r * h) * first
    d = (1 - 1 / (2 * r)) * first + x0_at(u, middle) / (2 * r)
    wanted = exact.sigma[s] / exact.sigma[t] * x - exact.alpha[s] * math.expm1(-h) * d
    found = SOLVERS["dpmpp_2s"](predict, exact, x, torch.tensor([t]), torch.tensor([s]))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("s", [0, 500, 979])
def test_where_dpmpp_2s_stops_on_its_way_from_pure_noise(s: int) -> None:
    """Its lambda is infinite there; diffusers puts that of abar = 2^-24 in its place."""
    abar = DPMSolverMultistepScheduler(**SD, rescale_betas_zero_snr=True).alphas_cumprod.double()
    lam = (abar / (1 - abar)).log() / 2
    asked = []

    def predict(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        asked.append(int(t[0]))
        return x, x

    SOLVERS["dpmpp_2s"](predict, ZERO_SNR, torch.ones(1, 1, 1, 1), torch.tensor([999]), torch.tensor([s]))
    middle = min(range(s, 999), key=lambda m: abs(float(lam[m] - (lam[999] + lam[s]) / 2)))
    assert asked == [999, middle]


@EVERY
def test_three_prediction_types_of_one_teacher_give_the_same_step(solver: Solver) -> None:
    """With guidance: it is applied to raw outputs, whatever they are."""
    t, s = torch.tensor([19, 259, 499, 999]), torch.tensor([0, 239, 374, 749])
    x = torch.randn(4, 2, 1, 1, generator=torch.Generator().manual_seed(0))

    def step(kind: str) -> Tensor:
        def raw(x: Tensor, t: Tensor) -> Tensor:
            cond, uncond = (
                from_x0_eps(SCHEDULE, kind, *world.predict(SCHEDULE)(x, t), t) for world in (BRAND, ALL)
            )
            return guide(uncond, cond, torch.tensor([1.0, 3.0, 5.0, 7.5]))

        return solver(predictor(raw, SCHEDULE, kind), SCHEDULE, x, t, s)

    first, *others = (step(kind) for kind in KINDS)
    for other in others:
        torch.testing.assert_close(other, first, atol=1e-5, rtol=1e-5)


@EVERY
def test_a_point_mass_is_solved_exactly(solver: Solver) -> None:
    """Constant x0 and eps, straight lines to one picture: every solver lands on alpha_s x0 + sigma_s eps."""
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(3, 2, 1, 1, generator=generator), torch.randn(3, 2, 1, 1, generator=generator)
    for schedule in (SCHEDULE, ZERO_SNR):
        t, s = torch.tensor([999, 999, 19]), torch.tensor([0, 500, 0])
        found = solver(lambda x, t: (x0, eps), schedule, add_noise(schedule, x0, eps, t), t, s)
        torch.testing.assert_close(found, add_noise(schedule, x0, eps, s), atol=2e-6, rtol=0)


@EVERY
def test_a_step_of_no_length_and_of_one_timestep(solver: Solver) -> None:
    x = torch.randn(4, 2, 1, 1, generator=torch.Generator().manual_seed(0))
    t, s = torch.tensor([0, 999, 1, 999]), torch.tensor([0, 999, 0, 998])
    found = solver(BRAND.predict(SCHEDULE), SCHEDULE, x, t, s)
    torch.testing.assert_close(found[:2], x[:2], atol=1e-6, rtol=0)
    torch.testing.assert_close(found[2:], BRAND.flow(SCHEDULE, x, t, s)[2:], atol=5e-3, rtol=0)


@EVERY
@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_pure_noise_is_finite(solver: Solver, kind: str) -> None:
    def raw(x: Tensor, t: Tensor) -> Tensor:
        return from_x0_eps(ZERO_SNR, kind, *BRAND.predict(ZERO_SNR)(x, t), t)

    x = torch.randn(3, 2, 1, 1, generator=torch.Generator().manual_seed(0))
    t, s = torch.full((3,), 999), torch.tensor([0, 500, 998])
    found = solver(predictor(raw, ZERO_SNR, kind), ZERO_SNR, x, t, s)
    assert found.dtype == torch.float32 and bool(found.isfinite().all())


@EVERY
def test_half_precision_latents_are_solved_in_float32(solver: Solver) -> None:
    x = torch.randn(1, 2, 1, 1).bfloat16()
    t, s = torch.tensor([999]), torch.tensor([979])
    predict = predictor(lambda x, t: x.float(), SCHEDULE, "v_prediction")
    assert torch.equal(solver(predict, SCHEDULE, x, t, s), solver(predict, SCHEDULE, x.float(), t, s))
