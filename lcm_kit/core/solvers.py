"""One step of the probability-flow ODE from timestep t to s <= t; finite also where alpha_t is 0."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lcm_kit.core.prediction import Predict
from lcm_kit.core.schedule import Schedule

Solver = Callable[[Predict, Schedule, Tensor, Tensor, Tensor], Tensor]
"""(predict, schedule, x_t [B, C, h, w], t int64 [B], s int64 [B]) -> x_s, float32; it is x_t where s = t."""

# log(alpha / sigma) is cut off where alpha is 0, at the value that diffusers' solvers put there.
_SMALLEST_ALPHA = 2.0**-12


def landed(schedule: Schedule, x0: Tensor, eps: Tensor, s: Tensor) -> Tensor:
    """Return x_s = alpha_s x0 + sigma_s eps, float32, where (x0, eps) stay the same until s int64 [B]."""
    alpha, sigma = schedule.at(s)
    return alpha * x0 + sigma * eps


def ddim(predict: Predict, schedule: Schedule, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """First order, one model call: x_s = alpha_s x0 + sigma_s eps (arXiv:2010.02502, eq. 12, no noise)."""
    return landed(schedule, *predict(x, t), s)


def heun(predict: Predict, schedule: Schedule, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Second order, two model calls: Heun's method in the angle phi of (alpha, sigma) = (cos phi, sin phi).

    There the ODE is dx/dphi = v, v = alpha eps - sigma x0 (arXiv:2202.00512, appendix D), which is regular at
    both ends, unlike in sigma / alpha. tan(h/2) in the place of h/2 makes the trapezoid exact for constant x0
    and eps, as DDIM is.
    """
    (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.at(t), schedule.at(s)
    x0, eps = predict(x, t)
    x0_s, eps_s = predict(landed(schedule, x0, eps, s), s)
    v_t, v_s = alpha_t * eps - sigma_t * x0, alpha_s * eps_s - sigma_s * x0_s
    h = torch.atan2(sigma_s, alpha_s) - torch.atan2(sigma_t, alpha_t)
    return x.float() + torch.tan(h / 2) * (v_t + v_s)


def dpmpp_2s(predict: Predict, schedule: Schedule, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Second order, two model calls: DPM-Solver++(2S), arXiv:2211.01095 algorithm 1.

    It is a midpoint rule in lambda = log(alpha / sigma). The intermediate time is the timestep whose lambda
    is nearest to the middle, strictly below t; r is its true place.
    """
    lam = schedule.alpha.clamp_min(_SMALLEST_ALPHA).log() - schedule.sigma.log()
    mid = _middle(lam, t, s)
    x0, eps = predict(x, t)
    x0_mid, _ = predict(landed(schedule, x0, eps, mid), mid)
    r = torch.where(t > s, (lam[mid] - lam[t]) / (lam[s] - lam[t]), 1.0).view(-1, 1, 1, 1)
    d = x0 + (x0_mid - x0) / (2 * r)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.at(t), schedule.at(s)
    # alpha_s (1 - e^-h) of the paper, written without lambda, so that it is exact where alpha_t is 0.
    return sigma_s / sigma_t * x.float() + (alpha_s - sigma_s * alpha_t / sigma_t) * d


def _middle(lam: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Return m int64 [B], s <= m < t (m = s where t = s), with lambda nearest to the mean of t's and s's."""
    falling = lam.neg()  # lambda falls with t; searchsorted wants it rising
    wanted = (falling[t] + falling[s]) / 2
    above = torch.searchsorted(falling, wanted).clamp(1, len(lam) - 1)
    nearest = torch.where(falling[above] - wanted < wanted - falling[above - 1], above, above - 1)
    return torch.maximum(torch.minimum(nearest, t - 1), s)


SOLVERS: dict[str, Solver] = {"ddim": ddim, "dpmpp_2s": dpmpp_2s, "heun": heun}
