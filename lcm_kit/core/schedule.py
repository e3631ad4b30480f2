"""The noise schedule x_t = alpha_t x0 + sigma_t eps over integer timesteps, the solver's grid; float32."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lcm_kit.errors import UserError

# Of Stable Diffusion and SDXL, as diffusers writes it: where no base is at hand
SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@dataclass(frozen=True, eq=False)
class Schedule:
    """Variance preserving: alpha = sqrt(abar), sigma = sqrt(1 - abar), float32 [T] each, for t = 0 .. T-1."""

    alpha: Tensor
    sigma: Tensor

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Schedule:
        """Build what a diffusers scheduler config describes, in the arithmetic of diffusers' schedulers.

        Missing keys take diffusers' defaults. Raises UserError for a `beta_schedule` that is none of those
        known here and for betas outside of (0, 1].
        """
        betas = _betas(config)
        if betas.ndim != 1 or not bool(((betas > 0) & (betas <= 1)).all()):
            raise UserError(
                "the base's scheduler config gives betas outside of (0, 1]; they are variances of a step"
            )
        alpha_bar = torch.cumprod(1.0 - betas, 0)
        if config.get("rescale_betas_zero_snr", False):
            alpha_bar = _zero_terminal_snr(alpha_bar.sqrt()) ** 2
        return cls(alpha_bar.sqrt(), (1.0 - alpha_bar).sqrt())

    @property
    def steps(self) -> int:
        """T, the number of timesteps."""
        return len(self.alpha)

    @cached_property
    def zero_terminal_snr(self) -> bool:
        """True if a timestep is pure noise (alpha = 0), where an epsilon prediction says nothing of x0."""
        return bool((self.alpha == 0).any())

    @cached_property
    def log_noise(self) -> Tensor:
        """log(sigma / alpha), float64 [T] on the CPU wherever the tables are; infinite for pure noise."""
        return torch.log(self.sigma.cpu().double() / self.alpha.cpu().double())

    def to(self, device: torch.device | str) -> Schedule:
        """Return the schedule with its tables on `device`."""
        moved = Schedule(self.alpha.to(device), self.sigma.to(device))
        for known in ("zero_terminal_snr", "log_noise"):  # no step is to ask the device for them
            vars(moved)[known] = getattr(self, known)
        return moved

    def at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return (alpha_t, sigma_t) at t int64 [B], each [B, 1, 1, 1], to multiply latents [B, C, h, w]."""
        alpha, sigma = self._both[:, t].view(2, -1, 1, 1, 1)
        return alpha, sigma

    @cached_property
    def _both(self) -> Tensor:
        return torch.stack((self.alpha, self.sigma))


def _scaled_linear(start: float, end: float, steps: int) -> Tensor:
    return torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float32) ** 2


def _linear(start: float, end: float, steps: int) -> Tensor:
    return torch.linspace(start, end, steps, dtype=torch.float32)


def _squaredcos_cap_v2(start: float, end: float, steps: int) -> Tensor:
    """Cosine schedule, arXiv:2102.09672 eq. 17: it has no beta_start and beta_end."""
    # float64: the ratio of two cosines a thousandth apart loses half of float32's digits.
    i = torch.arange(steps + 1, dtype=torch.float64) / steps
    alpha_bar = torch.cos((i + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999).float()


BETA_SCHEDULES: dict[str, Callable[[float, float, int], Tensor]] = {
    "linear": _linear,
    "scaled_linear": _scaled_linear,
    "squaredcos_cap_v2": _squaredcos_cap_v2,
}


def _betas(config: Mapping[str, Any]) -> Tensor:
    trained = config.get("trained_betas")
    if trained is not None:
        return torch.tensor(trained, dtype=torch.float32)
    name = config.get("beta_schedule", "linear")
    if name not in BETA_SCHEDULES:
        known = ", ".join(sorted(BETA_SCHEDULES))
        raise UserError(f"the base's scheduler config has beta_schedule {name!r}; lcm-kit knows {known}")
    bounds = float(config.get("beta_start", 0.0001)), float(config.get("beta_end", 0.02))
    return BETA_SCHEDULES[name](*bounds, int(config.get("num_train_timesteps", 1000)))


def _zero_terminal_snr(alpha: Tensor) -> Tensor:
    """Shift and scale alpha [T] to end at 0 and keep its first value, arXiv:2305.08891 algorithm 1."""
    first, last = alpha[0], alpha[-1]
    return (alpha - last) * (first / (first - last))


def add_noise(schedule: Schedule, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Return x_t = alpha_t x0 + sigma_t noise, float32, for latents and noise [B, C, h, w] and t int64 [B].

    It is float32 also for half-precision latents: in bfloat16 sigma would be 4.8% off at t = 19.
    """
    alpha, sigma = schedule.at(t)
    return alpha * x0.float() + sigma * noise.float()


def grid(steps: int, n: int) -> Tensor:
    """Return the solver's n timesteps of `steps`, int64 [n], ascending: 19, 39, .., 999 for (1000, 50).

    The last one is always steps - 1, where sampling starts, also when n does not divide `steps`. t = 0, where
    the first interval lands, is not among them (unless n = steps). Raises UserError unless 1 <= n <= steps.
    """
    if not 1 <= n <= steps:
        raise UserError(
            f"a solver grid of {n} steps is impossible on {steps} timesteps; grid.steps may be 1 to {steps}"
        )
    return torch.arange(1, n + 1) * steps // n - 1


def trailing(steps: int, n: int) -> Tensor:
    """Return where the n steps of a sampler with trailing timesteps begin, int64 [n], ascending to steps - 1.

    As diffusers' schedulers round them, 332, 666, 999 for (1000, 3), where `grid` has whole parts of `steps`.
    Raises UserError unless 1 <= n <= steps.
    """
    if n < 1 or n > steps:
        raise UserError(f"{n} steps of a sampler are impossible on {steps} timesteps; give 1 to {steps}")
    length = steps - (steps - steps / n)  # with the rounding of a range of floats, which theirs is
    begin = steps - length * torch.arange(n - 1, -1, -1, dtype=torch.float64)
    return begin.round().long() - 1


def interval_weight(schedule: Schedule, t: Tensor, s: Tensor) -> Tensor:
    """Return 1 / (rho_t - rho_s), float32 [B], rho = sigma / alpha, for t > s int64 [B].

    Improved consistency training's weight 1 / (sigma_t - sigma_s) (arXiv:2310.14189, section 3.1): rho is the
    sigma of its x0 + sigma noise, which is our x_t over alpha_t. Raises UserError where alpha is 0: there rho
    is infinite, and the interval that sampling starts with would weigh nothing.
    """
    if schedule.zero_terminal_snr:
        raise UserError(
            "loss.weighting interval would give the first step of sampling no weight on a base with zero "
            "terminal SNR; set loss.weighting=none"
        )
    rho = schedule.sigma / schedule.alpha
    return 1.0 / (rho[t] - rho[s])


def grid_steps(step: int, total: int, start: int | None, end: int) -> int:
    """Return the number of grid steps at optimizer step `step` of `total`: it doubles from `start` to `end`.

    Each size has an equal part of the run, and the last one is `end` itself: (8, 50) gives 8, 16, 32, 50.
    With `start` None it is `end` throughout. The idea is the discretisation curriculum of arXiv:2310.14189,
    section 3.4.
    """
    if start is None:
        return end
    doublings = (-(-end // start) - 1).bit_length()  # ceil(log2(end / start)) in integers
    stage = min(step * (doublings + 1) // total, doublings)
    return min(start << stage, end)
