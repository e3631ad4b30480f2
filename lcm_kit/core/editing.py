"""Editing without training: a model that jumps to x0 draws what is not known, and what is known is put back.

Consistency models, arXiv:2303.01469, algorithm 4, in latents: from noise on what is known, jump to x0, put
the known part back, add noise to the next timestep, and again. What is known is a `Known`: latents outside a
mask, a linear measurement of the pixels (`Grey`, `Pooled`), or nothing. Methods whose steps land on the way
instead (TCD, DDIM's steps of PCM, progressive and DMD students) carry the noise that belongs to the corrected
x0 on, so that x stays where it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from lcm_kit.core.matching import LCM_POINTS, timesteps
from lcm_kit.core.methods import LCM
from lcm_kit.core.prediction import Predict
from lcm_kit.core.schedule import Schedule, add_noise, grid
from lcm_kit.core.solvers import landed
from lcm_kit.errors import UserError

_LUMA = 0.299, 0.587, 0.114  # of red, green and blue in grey (ITU-R BT.601), as 8-bit pictures have it
_EXACT = 1e-9  # that a product of decimals may be off


@dataclass(frozen=True)
class Walk:
    """The timesteps at which a student is asked, and how it goes from one to the next."""

    points: tuple[int, ...]  # falling
    # how much of the noise each step renews: None all, from x0 itself, as LCM; else TCD's gamma, 0 as DDIM
    gamma: float | None

    @classmethod
    def of(cls, schedule: Schedule, sampler: str, steps: int, strength: float, gamma: float = 0.0) -> Walk:
        """Of "lcm", "tcd" or "ddim" in `steps` steps that begin at about `strength` (1: the most noise).

        A consistency model knows 50 timesteps: the `steps` are spread over those below the strength, as
        diffusers' schedulers spread them. DDIM's are trailing timesteps, which its students were trained on:
        of them those below the strength are taken, which are fewer than `steps`. Raises `UserError` where too
        few are left.
        """
        if not 0 < strength <= 1:
            raise UserError(f"strength {strength} is impossible; give a number above 0 and at most 1")
        if sampler == "ddim":
            left = round(steps * strength)
            if left < 1:
                raise UserError(
                    f"strength {strength:g} leaves none of ddim's {steps} steps; give {1 / steps:g} or more"
                )
            return cls(tuple(timesteps(schedule, "ddim", steps)[-left:]), 0.0)
        left = int(LCM_POINTS * strength + _EXACT)
        if left < steps:
            raise UserError(
                f"strength {strength:g} leaves {left} of the {LCM_POINTS} timesteps that a consistency model "
                f"knows, and steps are {steps}; give a strength of {steps / LCM_POINTS:g} or more, or fewer "
                "steps"
            )
        below = grid(schedule.steps, LCM_POINTS)[:left].flip(0).tolist()
        points = tuple(below[i * left // steps] for i in range(steps))
        return cls(points, None if sampler == "lcm" else gamma)

    def begins(self, schedule: Schedule) -> float:
        """The strength that it really begins at."""
        return (self.points[0] + 1) / schedule.steps


class Known(Protocol):
    """What is known of the picture that is drawn."""

    def put_back(self, x0: Tensor) -> Tensor:
        """Latents x0 [B, C, h, w] with what is known in its place, float32."""
        ...


@dataclass(frozen=True)
class Nothing:
    """All may change: the start alone tells what is to be drawn."""

    def put_back(self, x0: Tensor) -> Tensor:
        """`x0` itself."""
        return x0


@dataclass(frozen=True, eq=False)
class Outside:
    """Latents [1 or B, C, h, w] that stay where `new`, bool and of a shape that broadcasts, is false."""

    latents: Tensor
    new: Tensor

    def put_back(self, x0: Tensor) -> Tensor:
        """`x0` where it is new, the known latents elsewhere, exactly."""
        return torch.where(self.new, x0, self.latents)


class Measure(Protocol):
    """A linear measurement of pixels: of each unit (a pixel, a block) one mean, by weights that sum to 1."""

    def of(self, pixels: Tensor) -> Tensor:
        """What is measured of pixels [B, 3, H, W]."""
        ...

    def spread(self, value: Tensor) -> Tensor:
        """Pixels whose every unit is its value, so that `of` gives `value` again."""
        ...

    def least(self, pixels: Tensor) -> Tensor:
        """The least within each unit, at each of its pixels; it broadcasts over [B, 3, H, W]."""
        ...


@dataclass(frozen=True)
class Grey:
    """The grey of each pixel, [B, 1, H, W]."""

    def of(self, pixels: Tensor) -> Tensor:
        """0.299 red + 0.587 green + 0.114 blue."""
        return (pixels * pixels.new_tensor(_LUMA).view(3, 1, 1)).sum(1, keepdim=True)

    def spread(self, value: Tensor) -> Tensor:
        """The same in red, green and blue."""
        return value.expand(-1, 3, -1, -1)

    def least(self, pixels: Tensor) -> Tensor:
        """Of the three channels."""
        return pixels.amin(1, keepdim=True)


@dataclass(frozen=True)
class Pooled:
    """The mean of each block of `side` x `side` pixels, by channel, [B, 3, H / side, W / side]."""

    side: int

    def of(self, pixels: Tensor) -> Tensor:
        """Average pooling."""
        return functional.avg_pool2d(pixels, self.side)

    def spread(self, value: Tensor) -> Tensor:
        """The mean at each pixel of the block."""
        return value.repeat_interleave(self.side, -2).repeat_interleave(self.side, -1)

    def least(self, pixels: Tensor) -> Tensor:
        """Of the block, by channel."""
        return self.spread(-functional.max_pool2d(-pixels, self.side))


def agreeing(measure: Measure, value: Tensor, pixels: Tensor) -> Tensor:
    """Pixels [B, 3, H, W] moved so that their measurement is `value`: each unit as a whole."""
    return pixels + measure.spread(value - measure.of(pixels))


def agreeing_in_range(measure: Measure, value: Tensor, pixels: Tensor) -> Tensor:
    """`agreeing`, within [-1, 1]: where a unit goes beyond, it is drawn towards its value as far as needed.

    That leaves its measurement what it is, which clipping would not. `value` is within [-1, 1].
    """
    plain = measure.spread(value.clamp(-1, 1))
    beyond = agreeing(measure, value, pixels) - plain
    room = torch.where(beyond > 0, 1 - plain, 1 + plain)
    share = torch.where(beyond.abs() > room, room / beyond.abs().clamp_min(1e-12), torch.ones_like(room))
    return (plain + measure.least(share) * beyond).clamp(-1, 1)


@dataclass(frozen=True, eq=False)
class Measured:
    """The measurement `value` of the pixels, which latents reach through a VAE.

    `decode` and `encode` are latents [B, C, h, w] to pixels [B, 3, H, W] and back. A VAE's round trip is no
    identity, so of it the difference is taken that the correction makes: latents whose pixels agree stay.
    """

    measure: Measure
    value: Tensor
    decode: Callable[[Tensor], Tensor]
    encode: Callable[[Tensor], Tensor]

    def put_back(self, x0: Tensor) -> Tensor:
        """x0 moved to where its pixels have the measurement, as near as the VAE comes."""
        pixels = self.decode(x0)
        corrected = agreeing_in_range(self.measure, self.value, pixels)
        return x0 + self.encode(corrected) - self.encode(pixels)


def edited(
    predict: Predict,
    schedule: Schedule,
    walk: Walk,
    start: Tensor | None,
    noise: Callable[[], Tensor],
    known: Known,
    after_step: Callable[[int], None] = lambda _: None,
) -> Tensor:
    """Draw latents x0, float32 [B, C, h, w], in `len(walk.points)` calls of `predict`.

    `start`: latents [B, C, h, w] that the first noise is laid on; None: the noise alone, as pictures are
    drawn from. `noise` gives the next noise [B, C, h, w] of each picture; it is asked once to begin with and,
    where the walk renews noise, once for each step but the last. `after_step` is told how many are done. The
    tables of `schedule` lie where the latents do.
    """
    first = noise()
    count, device = len(first), first.device

    def at(t: int) -> Tensor:
        return torch.full((count,), t, dtype=torch.int64, device=device)

    now = at(walk.points[0])
    x = first.float() if start is None else add_noise(schedule, start, first, now)
    for place, t in enumerate(walk.points):
        now = at(t)
        x0, eps = predict(x, now)
        if walk.gamma is None:
            x0 = LCM().endpoint(schedule, x, x0, eps, now, at(0))
        x0 = known.put_back(x0)
        if place + 1 < len(walk.points):
            x = _onward(schedule, walk.gamma, x, x0, now, at(walk.points[place + 1]), noise)
        after_step(place + 1)
    return x0


def _onward(
    schedule: Schedule,
    gamma: float | None,
    x: Tensor,
    x0: Tensor,
    t: Tensor,
    s: Tensor,
    noise: Callable[[], Tensor],
) -> Tensor:
    """x at s < t, from x at t and the corrected x0: with new noise (LCM), or with that which is in x.

    For 0 < gamma <= 1 the step lands at (1 - gamma) s, and what is missing to s is new (arXiv:2402.19159,
    algorithm 4).
    """
    if gamma is None:
        return add_noise(schedule, x0, noise(), s)
    alpha, sigma = schedule.at(t)
    eps = (x - alpha * x0) / sigma
    if gamma == 0:
        return landed(schedule, x0, eps, s)
    below = ((1 - gamma) * s).floor().long()
    ratio = schedule.at(s)[0] / schedule.at(below)[0]
    renewed = (1 - ratio**2).clamp_min(0).sqrt()
    return ratio * landed(schedule, x0, eps, below) + renewed * noise().float()
