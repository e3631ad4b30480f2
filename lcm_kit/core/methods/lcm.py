"""Latent consistency models (arXiv:2310.04378, LoRA 2311.05556): a trajectory's points map to its start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Gt, Le

from lcm_kit.core.methods.base import Method, Times, intervals

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lcm_kit.core.schedule import Schedule


@dataclass(frozen=True)
class LCM(Method):
    """The constants are those of diffusers' LCMScheduler; with others its samples would be off."""

    title: ClassVar[str] = "latent consistency distillation (LCM)"
    samplers: ClassVar[tuple[str, ...]] = ("lcm", "tcd")
    steps: ClassVar[tuple[int, ...]] = (1, 2, 4, 8)
    tags: ClassVar[tuple[str, ...]] = ("lcm", "lcm-lora")

    name: Literal["lcm"] = "lcm"
    sigma_data: Annotated[float, Gt(0), Le(1e9)] = 0.5
    timestep_scaling: Annotated[float, Gt(0), Le(1e9)] = 10.0

    def times(self, schedule: Schedule, n_grid: int, batch: int, generator: torch.Generator) -> Times:
        """Draw t uniformly from the solver grid; s is the grid point before (0 for the first), end is 0."""
        import torch

        points, index = intervals(schedule, n_grid, batch, generator)
        return Times(t=points[index + 1], s=points[index], end=torch.zeros_like(index))

    def endpoint(
        self, schedule: Schedule, x: Tensor, x0: Tensor, eps: Tensor, t: Tensor, end: Tensor
    ) -> Tensor:
        """Return f(x, t) = c_skip x + c_out x0, float32 [B, C, h, w]; f(x, 0) = x exactly.

        arXiv:2310.04378, eq. 9, with the scalings of its public implementation: c_skip = d^2 / (u^2 + d^2)
        and c_out = u / sqrt(u^2 + d^2) with u = timestep_scaling * t and d = sigma_data. LCM always lands at
        t = 0, so neither eps nor `end` enters.
        """
        u = self.timestep_scaling * t.view(-1, 1, 1, 1).float()
        square = u**2 + self.sigma_data**2
        return self.sigma_data**2 / square * x.float() + u / square.sqrt() * x0.float()
