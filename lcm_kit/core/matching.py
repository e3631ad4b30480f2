"""Distribution matching: pictures move until what a score says of them is what the guided teacher says.

The student draws its own pictures, in the steps of its sampler, and its x0 of one of these steps is the
sample. The gradient of the Kullback-Leibler divergence between the samples' distribution and the teacher's,
both diffused, is the difference of their scores (DMD, arXiv:2311.18828, eq. 3; DMD2, arXiv:2405.14867): the
real score is the guided teacher, the fake one a network that is trained on the samples beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from lcm_kit.core.prediction import Predict
from lcm_kit.core.schedule import Schedule, add_noise, grid, trailing
from lcm_kit.core.solvers import landed
from lcm_kit.core.step import Loss, diffusion_loss, weighed
from lcm_kit.core.transfer import sent

LCM_POINTS = 50  # that diffusers' LCMScheduler and TCDScheduler choose their timesteps among
DIFFUSED = 0.02, 0.98  # least and most noise that samples are diffused with, as shares of T (DMD)
_LEAST = 1e-6  # mean |x0 - real x0|, by which a gradient is divided


class Draws(NamedTuple):
    """The randomness of one turn, fake score's or student's: B samples, all at one step of the trajectory."""

    steps: int  # n, of the trajectory
    step: int  # k, of which the x0 is the sample: 0 is the first, from pure noise
    noise: Tensor  # that the trajectory starts from, [B, C, h, w]
    renewed: Tensor  # noise of its later steps, [B, k, C, h, w]; [B, 0, ...] where none is
    t: Tensor  # to which the sample is diffused, int64 [B]
    diffused: Tensor  # with this noise, [B, C, h, w]

    def to(self, device: torch.device | str) -> Draws:
        """The same on `device`."""
        tensors = (sent(value, device) for value in self[2:])
        return Draws(self.steps, self.step, *tensors)

    def of(self, part: slice) -> Draws:
        """Those of some of the samples."""
        return Draws(self.steps, self.step, *(value[part] for value in self[2:]))


def timesteps(schedule: Schedule, sampler: str, n: int) -> list[int]:
    """Where the `n` steps of `sampler` begin, falling from T - 1, as diffusers' scheduler of it has them.

    "ddim": trailing timesteps, n of all T. "lcm" and "tcd": n of the 50 that a consistency model knows.
    """
    if sampler == "ddim":
        return trailing(schedule.steps, n).flip(0).tolist()
    points = grid(schedule.steps, LCM_POINTS).flip(0).tolist()
    return [points[i * LCM_POINTS // n] for i in range(n)]


def walk(
    student: Predict, schedule: Schedule, points: Sequence[int], draws: Draws, *, renew: bool
) -> tuple[Tensor, Tensor]:
    """The student's own x at step k of its trajectory, [B, C, h, w], and that timestep, int64 [B].

    `points`: `timesteps`. `renew`: with new noise after each step, as the LCM sampler; else as DDIM. Without
    gradient: each step is taught alone, from what those before it give when somebody draws (DMD2, section
    4.5).
    """
    x, at = draws.noise.float(), partial(torch.full_like, draws.t)  # a fill, which no host waits for
    with torch.no_grad():
        for i in range(draws.step):
            t, s = at(points[i]), at(points[i + 1])
            x0, eps = student(x, t)
            x = add_noise(schedule, x0, draws.renewed[:, i], s) if renew else landed(schedule, x0, eps, s)
    return x, at(points[draws.step])


def matching_gradient(real: Predict, fake: Predict, schedule: Schedule, x0: Tensor, draws: Draws) -> Tensor:
    """The direction in which samples x0 [B, C, h, w] are to be moved against, float32 [B, C, h, w].

    The scores' difference at x_t = alpha_t x0 + sigma_t noise is alpha_t / sigma_t^2 times that of the two
    predictions of x0, fake - real. It is weighed by sigma_t^2 / alpha_t over mean |x0 - real|, an average
    over the sample's elements, so that all noise levels count alike (arXiv:2311.18828, eqs. 7 and 8).
    """
    with torch.no_grad():
        x_t = add_noise(schedule, x0, draws.diffused, draws.t)
        wanted, is_now = real(x_t, draws.t)[0], fake(x_t, draws.t)[0]
        size = (x0.float() - wanted).abs().flatten(1).mean(1).clamp_min(_LEAST).view(-1, 1, 1, 1)
        return (is_now - wanted) / size


def matching_loss(x0: Tensor, gradient: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the loss of each sample, float32 [B], whose gradient in x0 is `gradient` over its elements.

    Its value is half the mean square of `gradient`: how far the two distributions are apart, as the scores
    see it. `x0` is the student's, with its graph; `weights` as in `step.weighed`.
    """
    moved = (x0 - gradient).detach()
    return 0.5 * weighed(lambda a, b: ((a - b) ** 2).flatten(1).mean(1), weights)(x0, moved)


def fake_loss(fake: Predict, schedule: Schedule, x0: Tensor, draws: Draws, loss: Loss) -> Tensor:
    """Return the denoising loss of the fake score on the student's samples, float32 [B].

    In the units of v whatever the base predicts: an error in x0 weighs snr + 1, which neither vanishes nor
    explodes at either end.
    """
    return diffusion_loss(
        kind="v_prediction", loss=loss, schedule=schedule, student=fake, x0=x0.detach(),
        noise=draws.diffused, t=draws.t,
    )  # fmt: skip
