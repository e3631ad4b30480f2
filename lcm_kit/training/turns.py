"""What is trained in a step, one after the other: the adapter, and before it what it is taught by, if it is.

A consistency method trains the adapter alone. Where distributions are matched the fake score has its turns
first, so that it knows the student as it is (two time scales, arXiv:2405.14867, section 4.2).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from lcm_kit.adapter.adapted_unet import AdaptedUNet
from lcm_kit.adapter.matching import FAKE, Arrived, Matching
from lcm_kit.adapter.roles import Given, Roles
from lcm_kit.bases.memory import set_rates
from lcm_kit.config import schema
from lcm_kit.core.matching import Draws
from lcm_kit.training.run_metrics import Metrics
from lcm_kit.training.stepping import Passes
from lcm_kit.training.updates import Guard


@dataclass(frozen=True)
class Learner:
    """One thing that is trained on the UNet: its gradients, their update, its average."""

    name: str
    adapted: AdaptedUNet
    passes: Passes
    guard: Guard
    rate: float | None = None  # its own learning rate, the same to the end; None: the run's

    def turn(self, number: int, rate: float, losses: Callable[[slice], Tensor], ids: Sequence[str]) -> None:
        """Its part of step `number` (from 1), as `Passes` and `Guard.update`; `rate`: the run's there."""
        set_rates(self.guard.optimizer, rate if self.rate is None else self.rate)
        with self.adapted.using(self.name):
            made = self.passes(number, losses)
        self.guard.update(number, made, ids)
        self.guard.optimizer.zero_grad()


@dataclass(frozen=True)
class Turns:
    """What `roles` and, where distributions are matched, a fake score learn in a step."""

    roles: Roles
    student: Learner
    matching: Matching | None = None  # with what follows, where distributions are matched
    fake: Learner | None = None

    @classmethod
    def of(
        cls,
        accelerator: Accelerator,
        roles: Roles,
        config: schema.Distill,
        optimizers: Mapping[str, Any],
        metrics: Metrics,
        share: int,
        done: int,
        window: list[float],
    ) -> Turns:
        """For `share` samples a step on this process, after `done` steps, whose losses since the last line
        are `window`. `optimizers`: by name of what is trained.
        """
        method, adapted = config.matching, roles.adapted

        def learner(name: str, rate: float | None = None, **of: Any) -> Learner:
            weights, optimizer = adapted.parameters(name), optimizers[name]
            micro, clip = min(config.batch_size, share), config.optimizer.grad_clip
            passes = Passes(accelerator, roles.call, weights, share, micro, clip)
            guard = Guard(accelerator, config, metrics, optimizer, weights, updates=done, **of)
            return Learner(name, adapted, passes, guard, rate)

        student = learner(roles.name, ema=roles.ema if config.ema else (), window=window)
        if method is None:
            return cls(roles, student)
        rate = config.optimizer.lr * method.fake_lr
        return cls(roles, student, Matching(roles, method), learner(FAKE, rate))

    def step(
        self,
        number: int,
        rate: float,
        given: Callable[[slice], Given],
        draws: Sequence[Draws],
        ids: Sequence[str],
    ) -> None:
        """All turns of step `number` (from 1), whose samples `given` has by part.

        `draws`: `randomness.turns_of`.
        """
        fake, matching = self.fake, self.matching
        if fake is None or matching is None:
            self.student.turn(number, rate, lambda part: self.roles.losses(given(part)), ids)
            return
        arrived: dict[tuple[int, int], Arrived] = {}  # by part of the samples

        def of(losses: Callable[[Given, Draws, Arrived], Tensor], drawn: Draws, part: slice) -> Tensor:
            own, mine, key = given(part), drawn.of(part), (part.start, part.stop)
            if key not in arrived:
                arrived[key] = matching.arrived(own, mine)
            return losses(own, mine, arrived[key])

        for each in draws[:-1]:
            arrived.clear()
            fake.turn(number, rate, partial(of, matching.fake_losses, each), ids)
        # of the very trajectories that the fake score has just learned by
        self.student.turn(number, rate, partial(of, matching.losses, draws[-1]), ids)

    def settle(self) -> None:
        """Wait until the last updates are known, as `Guard.settle`."""
        for each in (self.student, self.fake):
            if each:
                each.guard.settle()

    def figures(self) -> dict[str, float]:
        """Of the last step, besides the student's own: the fake score's loss."""
        if self.fake is None:
            return {}
        self.fake.guard.window.clear()  # no mean is told: it would hang on where a run was stopped
        return {"fake_loss": self.fake.guard.last.loss}
