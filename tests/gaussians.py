"""Worlds with a closed form: Gaussian data in two dimensions, as latents [B, 2, 1, 1].

For data N(mu, cov) the optimal denoiser mu + alpha cov (alpha^2 cov + sigma^2)^-1 (x_t - alpha mu) is linear,
so the probability-flow ODE has an exact solution; guidance between two Gaussians keeps it linear, and a fine
integration in float64 is as good as exact. Nothing here uses the library but its tables of alpha and sigma.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from lcm_kit.core.prediction import Predict
from lcm_kit.core.schedule import Schedule

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}


@dataclass(frozen=True)
class Gaussian:
    """mu and the covariance as a rotation by `turn` radians of diag(spread)."""

    mu: tuple[float, float]
    spread: tuple[float, float]
    turn: float

    @cache  # noqa: B019 - there are two of them
    def frame(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """(mu [2], eigenvectors [2, 2] in columns, eigenvalues [2])."""
        c, s = math.cos(self.turn), math.sin(self.turn)
        rows = torch.tensor([[c, -s], [s, c]], dtype=dtype)
        return torch.tensor(self.mu, dtype=dtype), rows, torch.tensor(self.spread, dtype=dtype)

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        noise = torch.randn(n, 2, generator=generator)
        mu, axes, spread = self.frame(noise.dtype)
        return (mu + (noise * spread.sqrt()) @ axes.T)[..., None, None]

    def x0_eps(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """E[x0 | x_t] and E[eps | x_t] for x_t [B, 2], alpha and sigma [B, 1] or [1]."""
        mu, axes, spread = self.frame(x.dtype)
        white = ((x - alpha * mu) @ axes) / (alpha**2 * spread + sigma**2)
        return mu + alpha * (white * spread) @ axes.T, sigma * white @ axes.T

    def v(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The optimal velocity alpha eps - sigma x0, [B, 2]."""
        x0, eps = self.x0_eps(x, alpha, sigma)
        return alpha * eps - sigma * x0

    def predict(self, schedule: Schedule) -> Predict:
        """The optimal Predict."""

        def predict(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            alpha, sigma = (table[t][:, None] for table in (schedule.alpha, schedule.sigma))
            x0, eps = self.x0_eps(x[..., 0, 0], alpha, sigma)
            return x0[..., None, None], eps[..., None, None]

        return predict

    def flow(self, schedule: Schedule, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """The exact solution at s of the probability-flow ODE from x at t: each axis keeps its quantile."""
        mu, axes, spread = self.frame(torch.float64)
        alpha, sigma = (table.double()[:, None] for table in (schedule.alpha, schedule.sigma))
        ratio = ((alpha[s] ** 2 * spread + sigma[s] ** 2) / (alpha[t] ** 2 * spread + sigma[t] ** 2)).sqrt()
        moved = alpha[s] * mu + (((x.double()[..., 0, 0] - alpha[t] * mu) @ axes) * ratio) @ axes.T
        return moved.float()[..., None, None]


BRAND = Gaussian(mu=(0.8, -0.4), spread=(1.0, 0.25), turn=0.5)  # the data, under its condition
ALL = Gaussian(mu=(-0.5, 0.3), spread=(1.2, 0.6), turn=-0.3)  # under the empty condition


def guided_v(x: Tensor, alpha: Tensor, sigma: Tensor, guidance_scale: float) -> Tensor:
    """diffusers' formula, uncond + guidance_scale (cond - uncond), on the two optimal velocities."""
    uncond = ALL.v(x, alpha, sigma)
    return uncond + guidance_scale * (BRAND.v(x, alpha, sigma) - uncond)


def guided_flow(
    schedule: Schedule, x: Tensor, t: Tensor, guidance_scale: float, s: Tensor | None = None, fine: int = 80
) -> Tensor:
    """The guided ODE dx/dphi = v, (cos, sin) phi = (alpha, sigma), from t to s, float64 Runge-Kutta."""
    phi_t, phi_s = (
        torch.atan2(schedule.sigma[time], schedule.alpha[time]).double()[:, None]
        for time in (t, torch.zeros_like(t) if s is None else s)
    )
    y, phi, h = x[..., 0, 0].double(), phi_t, (phi_s - phi_t) / fine

    def slope(y: Tensor, phi: Tensor) -> Tensor:
        return guided_v(y, phi.cos(), phi.sin(), guidance_scale)

    for _ in range(fine):
        k1 = slope(y, phi)
        k2 = slope(y + h / 2 * k1, phi + h / 2)
        k3 = slope(y + h / 2 * k2, phi + h / 2)
        k4 = slope(y + h * k3, phi + h)
        y, phi = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4), phi + h
    return y.float()[..., None, None]
