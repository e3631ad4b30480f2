"""The algorithm on one screen: a batch's loss from plugs that say how to step, where to land, how to compare.

`teacher`, `target` and `student` are Predict: conditions and guidance are bound inside them. `loss` is an
entry of `losses.LOSSES` with its constant bound: `partial(LOSSES["huber"], c=0.001)`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lcm_kit.methods.base import Method, Times
from lcm_kit.prediction import Predict, check, from_x0_eps
from lcm_kit.schedule import Schedule, add_noise
from lcm_kit.solvers import Solver

Loss = Callable[[Tensor, Tensor], Tensor]
"""(a [B, C, h, w], b [B, C, h, w]) -> float32 [B]."""


def consistency_loss(
    *,
    method: Method,
    solver: Solver,
    loss: Loss,
    schedule: Schedule,
    teacher: Predict,
    target: Predict,
    student: Predict,
    x0: Tensor,
    noise: Tensor,
    times: Times,
) -> Tensor:
    """Return the consistency distillation loss of each sample, float32 [B] (arXiv:2310.04378, algorithm 1).

    d(f_target(x_s, s), f_student(x_t, t)), x_s being the teacher's ODE step from x_t = alpha_t x0 + sigma_t
    noise. `x0`, `noise`: latents [B, C, h, w]. `target` is the student itself or the EMA of it, never the
    teacher, which would distil nothing. Only the student's call has a gradient; it comes last, so that the
    teacher's activations are gone.
    """
    t, s, end = times
    x_t = add_noise(schedule, x0, noise, t)
    with torch.no_grad():
        x_s = solver(teacher, schedule, x_t, t, s)
        aim = method.endpoint(schedule, x_s, *target(x_s, s), s, end)
    landed = method.endpoint(schedule, x_t, *student(x_t, t), t, end)
    return loss(landed, aim)


def diffusion_loss(
    *, kind: str, loss: Loss, schedule: Schedule, student: Predict, x0: Tensor, noise: Tensor, t: Tensor
) -> Tensor:
    """Return the denoising loss of each sample, float32 [B], in the units of the prediction type `kind`.

    d(output(x_t, t), wanted), x_t = alpha_t x0 + sigma_t noise: for "epsilon" with l2, eq. 14 of
    arXiv:2006.11239. `x0`, `noise`: latents [B, C, h, w]; t int64 [B]. Raises UserError as
    `prediction.to_x0_eps`.
    """
    x_t = add_noise(schedule, x0, noise, t)
    output = from_x0_eps(schedule, kind, *student(x_t, t), t)
    return loss(output, from_x0_eps(schedule, kind, x0, noise, t))


def min_snr_weight(schedule: Schedule, kind: str, gamma: float | None) -> Tensor:
    """Return the weight of the denoising loss at every timestep, float32 [T] (min-SNR, arXiv:2303.09556).

    An error in x0 counts min(snr, gamma), snr = alpha^2 / sigma^2; in the units of the raw output that is
    min(snr, gamma) / snr for "epsilon", / (snr + 1) for "v_prediction" and / 1 for "sample" (sections 3.2 and
    3.4). `gamma` None weighs nothing: ones. Raises UserError as `prediction.check`.
    """
    check(schedule, kind)
    if gamma is None:
        return torch.ones_like(schedule.alpha)
    snr = (schedule.alpha / schedule.sigma) ** 2
    unit = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}[kind]
    return snr.clamp(max=gamma) / unit
