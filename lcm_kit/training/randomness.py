"""The randomness of a training step, each sample's from its own (seed, step, slot): nothing to store."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from lcm_kit.adapter.stages import stage_at
from lcm_kit.config.schema import Distill
from lcm_kit.core.guidance import sample_guidance
from lcm_kit.core.matching import DIFFUSED, Draws
from lcm_kit.core.methods import Method, Times
from lcm_kit.core.schedule import Schedule
from lcm_kit.core.transfer import sent
from lcm_kit.data.batches import Batch, draw, generator_at

_NO_SLOT = -1  # of what all samples of a turn have in common


class StepRandomness(NamedTuple):
    """The randomness of one step for the samples of this process, each from its own (seed, step, slot)."""

    noise: Tensor  # [B, C, h, w]
    times: Times  # [B] each
    guidance: Tensor  # [B] guidance_scale
    dropped: Tensor  # bool [B], on the host: trained on without its caption
    intervals: int  # of this step's solver grid
    turns: tuple[Draws, ...]  # where distributions are matched: the fake score's, then the student's

    def to(self, device: torch.device) -> StepRandomness:
        """The same with all but `dropped` on `device`."""
        there = sent(self.noise, device), self.times.to(device), sent(self.guidance, device)
        turns = tuple(each.to(device) for each in self.turns)
        return StepRandomness(*there, self.dropped, self.intervals, turns)


def step_randomness(
    config: Distill, method: Method, schedule: Schedule, batch: Batch, step: int
) -> StepRandomness:
    """Draw noise, an interval of this step's solver grid and a guidance scale for every sample of `batch`,
    and whether its caption is left out.

    With `teacher.reuse` n all but guidance are those of the first of n steps.
    """
    first = step - step % config.teacher.reuse
    n_grid = stage_at(config, first).n_grid
    of = partial(draw, config.seed, first, batch.slots)
    noise = of("noise", lambda g: torch.randn(batch.latents.shape[1:], generator=g))
    times = of("times", lambda g: torch.cat(method.times(schedule, n_grid, 1, g)))
    dropped = of("dropout", lambda g: torch.rand((), generator=g)) < config.caption_dropout
    of = partial(draw, config.seed, step, batch.slots)
    guidance = of("guidance", lambda g: sample_guidance(1, config.guidance.min, config.guidance.max, g))
    turns = turns_of(config, schedule, batch.latents.shape[1:], step, batch.slots)
    return StepRandomness(noise, Times(*times.unbind(1)), guidance.flatten(), dropped, n_grid, turns)


def turns_of(
    config: Distill, schedule: Schedule, shape: Sequence[int], step: int, slots: range
) -> tuple[Draws, ...]:
    """The randomness of each of a step's turns, the adapter's last; none without a fake score.

    `shape`: of a latent. The trajectory's number of steps and the place in it are the same for all samples
    and processes: they are drawn from (seed, step, turn), all else from the sample's own slot too.
    """
    method = config.matching
    if method is None:
        return ()
    low, high = (round(share * schedule.steps) for share in DIFFUSED)

    def of_turn(turn: int) -> Draws:
        # the fake score's last turn is of the very pictures that the student then learns by
        path = min(turn, method.fake_updates - 1)
        common = generator_at(config.seed, step, _NO_SLOT, f"trajectory {path}")
        steps = method.steps[int(torch.randint(len(method.steps), (1,), generator=common))]
        place = int(torch.randint(steps, (1,), generator=common))
        renewed = place if method.sampler == "lcm" else 0
        of = partial(draw, config.seed, step, slots)
        start = of(f"start {path}", lambda g: torch.randn(1 + renewed, *shape, generator=g))
        t = of(f"diffused to {turn}", lambda g: torch.randint(low, high + 1, (1,), generator=g))
        noise = of(f"diffused {turn}", lambda g: torch.randn(*shape, generator=g))
        return Draws(steps, place, start[:, 0], start[:, 1:], t[:, 0], noise)

    return tuple(map(of_turn, range(method.fake_updates + 1)))
