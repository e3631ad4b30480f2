"""The parts that one UNet plays where distributions are matched, and the two losses between them.

With the adapter on the UNet is the student, with the fake score's LoRA on the fake score, with neither and
under guidance the real one: one UNet in memory. `core.matching` is the algorithm; here is who is asked.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lcm_kit.adapter import roles as consistency
from lcm_kit.adapter.roles import Given, Objective, Roles
from lcm_kit.config.schema import Distill
from lcm_kit.core.losses import LOSSES
from lcm_kit.core.matching import Draws, fake_loss, matching_gradient, matching_loss, walk
from lcm_kit.core.methods import DMD
from lcm_kit.core.prediction import Predict
from lcm_kit.core.step import weighed

Arrived = tuple[Tensor, Tensor]  # x [B, C, h, w] and t int64 [B] of `walk`
FAKE = "fake"  # the name of the fake score among what is trained


@dataclass(frozen=True)
class Matching:
    """Distribution matching with the UNet of `roles`, on which a LoRA is trained under `FAKE` too."""

    roles: Roles
    method: DMD

    def arrived(self, given: Given, draws: Draws) -> Arrived:
        """x and t where the student's own trajectories are at the step that is taught, without graph.

        It serves all turns of the same trajectories until the student is updated.
        """
        schedule, student = self.roles.schedule, self.roles.student(given)
        points = self.method.points(schedule, draws.steps)
        with self.roles.adapted.using(self.roles.name):
            return walk(student, schedule, points, draws, renew=self.method.sampler == "lcm")

    def losses(self, given: Given, draws: Draws, arrived: Arrived) -> Tensor:
        """The student's loss of each sample, float32 [B], with gradient in the adapter, which is in use.

        `given`: conditions, guidance, and what the consistency loss is of, if there is one.
        """
        roles = self.roles
        x0 = roles.student(given)(*arrived)[0]

        def fake(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            with roles.adapted.using(FAKE):
                return self._fake(given)(x, t)

        moved = matching_gradient(roles.teacher(given), fake, roles.schedule, x0.detach(), draws)
        found = matching_loss(x0, moved, given.weights)
        if self.method.consistency:
            found = found + self.method.consistency * roles.losses(given)
        return found

    def fake_losses(self, given: Given, draws: Draws, arrived: Arrived) -> Tensor:
        """The fake score's loss of each sample, float32 [B], with gradient in its LoRA, which is in use.

        The samples are the student's as it is now, drawn without gradient.
        """
        with torch.no_grad(), self.roles.adapted.using(self.roles.name):
            x0 = self.roles.student(given)(*arrived)[0]
        square = weighed(lambda a, b: LOSSES["l2"](a, b, 0.0), given.weights)
        return fake_loss(self._fake(given), self.roles.schedule, x0, draws, square)

    def _fake(self, given: Given) -> Predict:
        return self.roles.predict(partial(self.roles.output, "fake", given.condition))


def place_in_the_mean(method: DMD) -> float:
    """How many steps of its trajectory come before the one that a turn teaches, in the mean.

    Each of `method.steps` is drawn as often, and in it each step.
    """
    return sum((n - 1) / 2 for n in method.steps) / len(method.steps)


def passes(config: Distill, method: DMD) -> dict[str, float]:
    """How often a step asks each part for a sample, in the mean over the trajectories, guidance being two.

    As `roles.passes`, its consistency loss with it, where "student" is what has a gradient. "trajectory": the
    student without, in the fake score's turns; "fake score": its answers to the student's turn; "fake
    score, trained": forward and backward.
    """
    found, place, updates = consistency.passes(config), place_in_the_mean(method), method.fake_updates
    return {
        "teacher": found["teacher"] + Objective.of(config).rows["teacher"],
        "target": found["target"],
        "student": found["student"] + 1,
        "trajectory": updates * (place + 1),  # and the sample; the student's turn is where the last one is
        "fake score": 1,
        "fake score, trained": updates,
    }
