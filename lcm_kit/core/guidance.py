"""Classifier-free guidance in one convention: diffusers' `guidance_scale`, where 1 means none."""

from __future__ import annotations

import torch
from torch import Tensor

from lcm_kit.core.transfer import sent


def paper_w(guidance_scale: float | Tensor) -> float | Tensor:
    """Return the w of the LCM paper (arXiv:2310.04378, eq. 14), 0 for no guidance: guidance_scale - 1."""
    return guidance_scale - 1


def guide(uncond: Tensor, cond: Tensor, guidance_scale: float | Tensor) -> Tensor:
    """Return the guided raw model output cond + w (cond - uncond), float32 [B, C, h, w].

    w = guidance_scale - 1, and `guidance_scale` is one number or a Tensor [B]; at 1 the result is `cond`
    exactly. Raw outputs of every prediction type are affine in x0 at a given x_t, so that guiding them guides
    x0 and eps alike.
    """
    if isinstance(guidance_scale, Tensor):
        guidance_scale = sent(guidance_scale, cond.device).float().view(-1, 1, 1, 1)
    return cond.float() + paper_w(guidance_scale) * (cond.float() - uncond.float())


def sample_guidance(n: int, lo: float, hi: float, generator: torch.Generator) -> Tensor:
    """Draw n guidance scales uniformly from [lo, hi), float32 [n] on the CPU, as the LCM paper draws w."""
    return lo + (hi - lo) * torch.rand(n, generator=generator)
