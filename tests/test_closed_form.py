"""A small network distilled by the real step.py, against the true consistency function of Gaussian data."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from lcm_kit.core.guidance import guide
from lcm_kit.core.losses import LOSSES
from lcm_kit.core.methods import LCM, Method
from lcm_kit.core.prediction import Predict, predictor
from lcm_kit.core.schedule import Schedule, add_noise, grid_steps, interval_weight
from lcm_kit.core.solvers import SOLVERS
from lcm_kit.core.step import Loss, consistency_loss
from tests.gaussians import ALL, BRAND, SD, Gaussian, guided_flow

SCHEDULE = Schedule.from_config(SD)
STEPS, BATCH = 600, 128
BOUND = 0.08  # RMS in units of the data, whose own spread is 0.8
L2 = partial(LOSSES["l2"], c=0.0)
CHECKED = (249, 499, 749, 999)


class Correction(nn.Module):
    """What the LoRA is to a UNet: a small network added to the frozen teacher's output, zero at the start."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(4, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2)
        )
        nn.init.zeros_(self.body[-1].weight)
        nn.init.zeros_(self.body[-1].bias)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        times = torch.stack([SCHEDULE.alpha[t], SCHEDULE.sigma[t]], 1)
        return self.body(torch.cat([x[..., 0, 0], times], 1))[..., None, None]


def velocity(world: Gaussian, x: Tensor, t: Tensor) -> Tensor:
    alpha, sigma = SCHEDULE.alpha[t][:, None], SCHEDULE.sigma[t][:, None]
    return world.v(x[..., 0, 0], alpha, sigma)[..., None, None]


def distil(
    guidance_scale: float,
    solver: str,
    *,
    method: Method | None = None,
    wrong_target: bool = False,
    teacher_weight: float = 1.0,
    distance: Loss = L2,
    weighted: bool = False,
    steps: int = STEPS,
) -> Predict:
    """Train a student as `train/distill.py` does; `wrong_target` takes the target from the teacher.

    `weighted`: by `interval_weight`, and with gradients clipped to norm 1, as the recipe does.
    """
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    network, method = Correction(), method or LCM()
    scales = torch.full((BATCH,), guidance_scale)
    student = predictor(lambda x, t: velocity(BRAND, x, t) + network(x, t), SCHEDULE, "v_prediction")
    teacher = predictor(
        lambda x, t: guide(velocity(ALL, x, t), velocity(BRAND, x, t), scales), SCHEDULE, "v_prediction"
    )
    optimizer = torch.optim.Adam(network.parameters(), lr=4e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        times = method.times(SCHEDULE, grid_steps(step, steps, 8, 32), BATCH, generator)
        losses = consistency_loss(
            method=method,
            solver=SOLVERS[solver],
            loss=distance,
            schedule=SCHEDULE,
            teacher=teacher,
            target=teacher if wrong_target else student,
            student=student,
            x0=BRAND.draw(BATCH, generator),
            noise=torch.randn(BATCH, 2, 1, 1, generator=generator),
            times=times,
            teacher_weight=teacher_weight,
        )
        if weighted:
            losses = losses * interval_weight(SCHEDULE, times.t, times.s)
        optimizer.zero_grad()
        losses.mean().backward()
        if weighted:
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        decay.step()
    return student


@torch.no_grad()
def errors(student: Predict, guidance_scale: float) -> list[float]:
    """RMS distance from the student's consistency function to the true one, at each of CHECKED."""
    generator, found = torch.Generator().manual_seed(1), []
    for timestep in CHECKED:
        t = torch.full((1024,), timestep)
        noise = torch.randn(1024, 2, 1, 1, generator=generator)
        x = add_noise(SCHEDULE, BRAND.draw(1024, generator), noise, t)
        landed = LCM().endpoint(SCHEDULE, x, *student(x, t), t, torch.zeros_like(t))
        found.append((landed - guided_flow(SCHEDULE, x, t, guidance_scale)).square().mean().sqrt().item())
    return found


def test_the_truth_agrees_with_the_exact_solution() -> None:
    x, t = torch.randn(64, 2, 1, 1, generator=torch.Generator().manual_seed(2)), torch.full((64,), 999)
    exact = BRAND.flow(SCHEDULE, x, t, torch.zeros_like(t))
    torch.testing.assert_close(guided_flow(SCHEDULE, x, t, 1.0), exact, atol=1e-5, rtol=0)


CASES = pytest.mark.parametrize(("guidance_scale", "solver"), [(1.0, "heun"), (2.0, "ddim")])


@CASES
def test_distillation_finds_the_true_consistency_function(guidance_scale: float, solver: str) -> None:
    found = errors(distil(guidance_scale, solver), guidance_scale)
    assert max(found) < BOUND, dict(zip(CHECKED, found, strict=True))


@CASES
def test_a_target_taken_from_the_teacher_is_found_out(guidance_scale: float, solver: str) -> None:
    """It teaches E[x0 | x_s], not the endpoint: the right target's bound is missed everywhere, and by far."""
    found = errors(distil(guidance_scale, solver, wrong_target=True), guidance_scale)
    assert min(found) > BOUND and max(found) > 5 * BOUND, dict(zip(CHECKED, found, strict=True))
