"""The algorithm on one screen: a batch's loss from plugs that say how to step, where to land, how to compare.

`teacher`, `target` and `student` are Predict: conditions and guidance are bound inside them. `loss` is an
entry of `losses.LOSSES` with its constant bound: `partial(LOSSES["huber"], c=0.001)`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lcm_kit.core.methods.base import Method, Times
from lcm_kit.core.prediction import Predict, check, from_x0_eps
from lcm_kit.core.schedule import Schedule, add_noise
from lcm_kit.core.solvers import Solver

Loss = Callable[[Tensor, Tensor], Tensor]
"""(a [B, C, h, w], b [B, C, h, w]) -> float32 [B]."""


def scaled(loss: Loss, unit: Tensor) -> Loss:
    """`loss` between what it is given times `unit`, [B, 1, 1, 1] or [B, 1, h, w]."""
    return lambda a, b: loss(unit * a, unit * b)


def weighed(loss: Loss, weights: Tensor | None) -> Loss:
    """`loss` where each cell of the latents counts as `weights` [B, 1, h, w] says; None: all alike.

    A cell's difference is scaled by the root of its weight, so that its square weighs that much whatever
    distance is made of it: at 1 nothing changes, and at 0 the cell has no part in it and no gradient. The
    mean is over all cells still: what half of a sample is masked out weighs half.
    """
    return loss if weights is None else scaled(loss, weights.sqrt())


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
    teacher_weight: float = 1.0,
) -> Tensor:
    """Return the consistency loss of each sample, float32 [B]: distillation, training, or both by weight.

    d(f_target(x_s, s), f_student(x_t, t)) from x_t = alpha_t x0 + sigma_t noise. In distillation x_s is the
    teacher's ODE step (arXiv:2310.04378, algorithm 1). In consistency training it is the same x0 with the
    same noise, alpha_s x0 + sigma_s noise (arXiv:2303.01469, algorithm 3; fine-tuning in arXiv:2310.04378,
    section 4.4), whose mean given x_t is the DDIM step of the data's own denoiser. `teacher_weight` w gives
    w of the first and 1 - w of the second; what weighs 0 is not computed.

    `x0`, `noise`: latents [B, C, h, w]. `target` is the student itself or the EMA of it, never the teacher,
    which would distil nothing; but in progressive distillation it is the teacher, whose second step goes
    from s to `end` (arXiv:2202.00512, algorithm 2). Only the student's call has a gradient; it comes last,
    so that the teacher's activations are gone.
    """
    t, s, end = times
    x_t = add_noise(schedule, x0, noise, t)
    aims = []
    with torch.no_grad():
        if teacher_weight > 0:
            x_s = solver(teacher, schedule, x_t, t, s)
            aims.append((teacher_weight, method.endpoint(schedule, x_s, *target(x_s, s), s, end)))
        if teacher_weight < 1:
            x_s = add_noise(schedule, x0, noise, s)
            aims.append((1 - teacher_weight, method.endpoint(schedule, x_s, *target(x_s, s), s, end)))
    landed = method.endpoint(schedule, x_t, *student(x_t, t), t, end)
    if teacher_weight == 1:  # three kernels less than a sum of one
        return loss(landed, aims[0][1])
    return torch.stack([weight * loss(landed, aim) for weight, aim in aims]).sum(0)


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


def snr_weight(schedule: Schedule, kind: str, gamma: float | None, floor: float = 0.0) -> Tensor:
    """Return the weight of the denoising loss at every timestep, float32 [T].

    An error in x0 counts min(snr, gamma), snr = alpha^2 / sigma^2 (min-SNR, arXiv:2303.09556), and at least
    `floor` (truncated SNR, arXiv:2202.00512, section 4, where it is 1). In the units of the raw output that
    is divided by snr for "epsilon", by snr + 1 for "v_prediction" and by 1 for "sample". `gamma` None: all
    weigh 1 in those units, and an error in x0 at least `floor`. Raises UserError as `prediction.check`.
    """
    check(schedule, kind)
    snr = (schedule.alpha / schedule.sigma) ** 2
    unit = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}[kind]
    weight = torch.ones_like(snr) if gamma is None else snr.clamp(max=gamma) / unit
    return weight.maximum(floor / unit)
