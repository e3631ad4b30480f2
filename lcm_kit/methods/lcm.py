"""Latent consistency models: every point of a trajectory maps to its start (arXiv:2310.04378, LoRA: 2311.05556)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lcm_kit.methods.base import Times
from lcm_kit.schedule import Schedule, grid


@dataclass(frozen=True)
class LCM:
    """sigma_data and timestep_scaling are those of diffusers' LCMScheduler, and must be, or its samples are off."""

    sigma_data: float = 0.5
    timestep_scaling: float = 10.0

    def times(self, schedule: Schedule, n_grid: int, batch: int, generator: torch.Generator) -> Times:
        """Draw t uniformly from the solver grid, int64 [batch]; s is the grid point before it (0 for the first), end is 0."""
        points = torch.cat([torch.zeros(1, dtype=torch.int64), grid(schedule.steps, n_grid)])
        index = torch.randint(n_grid, (batch,), generator=generator)
        return Times(t=points[index + 1], s=points[index], end=torch.zeros_like(index))

    def endpoint(
        self, schedule: Schedule, x: Tensor, x0: Tensor, eps: Tensor, t: Tensor, end: Tensor
    ) -> Tensor:
        """Return f(x, t) = c_skip x + c_out x0, float32 [B, C, h, w] (arXiv:2310.04378, eq. 9); f(x, 0) = x exactly.

        c_skip = d^2 / (u^2 + d^2) and c_out = u / sqrt(u^2 + d^2) with u = timestep_scaling * t and d = sigma_data.
        LCM always lands at t = 0, so neither eps nor `end` enters.
        """
        u = self.timestep_scaling * t.view(-1, 1, 1, 1).float()
        square = u**2 + self.sigma_data**2
        return self.sigma_data**2 / square * x.float() + u / square.sqrt() * x0.float()
