"""Teacher, target and student, the three parts that one UNet plays in a step, and the loss between them.

The recipe trains with it, `lcm-kit plan` rehearses with it and `lcm-kit bench` times it, so that there is one
assembly of a step. `step.consistency_loss` is the algorithm; here is who is asked for what, and how.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from lcm_kit.adapter.adapted_unet import TRAINED, AdaptedUNet
from lcm_kit.adapter.stages import stage_at
from lcm_kit.adapter.trained_weights import swapped, update_ema
from lcm_kit.bases.condition import Condition
from lcm_kit.config.methods import imported
from lcm_kit.config.schema import Distill
from lcm_kit.core.guidance import guide
from lcm_kit.core.losses import LOSSES, adapted_c
from lcm_kit.core.methods import Method, Progressive, Stage, Times
from lcm_kit.core.prediction import Model, Predict, predictor
from lcm_kit.core.schedule import SD_BETAS, Schedule, interval_weight
from lcm_kit.core.solvers import SOLVERS, Solver
from lcm_kit.core.step import Loss, consistency_loss, scaled, weighed
from lcm_kit.core.timesteps import lognormal, reweighed, shifted
from lcm_kit.core.transfer import sent

Part = Callable[[str], AbstractContextManager[Any]]  # name of a part of a step -> what is open around it
Rows = slice | Tensor  # of a batch: all, or an index int64 on its device
PARTS = ("teacher", "target", "student")


@dataclass(frozen=True)
class Objective:
    """What of a config decides the loss: how to step, where to land, how to compare."""

    method: Method
    solver: Solver
    distance: Loss
    teacher_weight: float = 1.0
    by_interval: bool = False  # weighted by 1 / (difference of sigma / alpha between t and s)
    guided: bool = True  # whether the teacher's answer is; else it is asked with the caption alone
    on_grid: Callable[[int], Loss] | None = None  # the distance on a grid of so many intervals, if it adapts

    @property
    def progressive(self) -> Progressive | None:
        """The method where its teacher is the target too, and changes from stage to stage."""
        return self.method if isinstance(self.method, Progressive) else None

    @classmethod
    def of(cls, config: Distill) -> Objective:
        """What `config` asks for."""
        distance, c, last = LOSSES[config.loss.name], config.loss.c, config.grid.steps
        return cls(
            drawing(config), SOLVERS[config.solver], lambda a, b: distance(a, b, c), config.teacher.weight,
            config.loss.weighting == "interval", config.guidance.max > 1,
            (lambda n: lambda a, b: distance(a, b, adapted_c(c, n, last))) if config.loss.adaptive else None,
        )  # fmt: skip

    @property
    def rows(self) -> dict[str, int]:
        """Of the UNet's batch for a sample, by part: guidance takes two."""
        return {"teacher": 2 if self.guided else 1, "target": 1, "student": 1}

    def distance_on(self, intervals: int | None) -> Loss:
        """The distance on a grid of so many intervals; None: on the last one."""
        return self.distance if self.on_grid is None or intervals is None else self.on_grid(intervals)


def drawing(config: Distill) -> Method:
    """The method of `config`, which draws its intervals as `grid.sampling` says."""
    method, g = imported(config.method), config.grid
    if g.sampling == "lognormal":
        return reweighed(method, partial(lognormal, mean=g.log_mean, std=g.log_std))
    if g.sampling == "shifted":
        return reweighed(method, partial(shifted, shift=g.shift))
    return method


@dataclass(frozen=True)
class Given:
    """A batch's samples and randomness, on the device: B samples."""

    x0: Tensor  # latents [B, C, h, w]
    noise: Tensor  # as x0
    times: Times  # [B] each
    guidance: Tensor  # the teacher's guidance_scale [B]; 1 where the objective is not `guided`
    condition: Condition  # of B captions
    bases: Sequence[bool] = ()  # for each sample whether the base alone teaches it; none: its style does too
    # which samples these are, where the teacher is asked for the same ones again: (group, first of the part)
    again: tuple[int, int] | None = None
    intervals: int | None = None  # of the grid that the times are of; None: of the last one
    weights: Tensor | None = None  # how much each cell of the latents counts, [B, 1, h, w]; None: all alike


@dataclass(eq=False)
class Roles:
    """One UNet as teacher (nothing that is trained), target (the trained weights' average) and student.

    In progressive distillation teacher and target are one: in the first stage the base under guidance, then
    the student as the stage before left it, whose weights lie where else their average does.

    `call` is the UNet or what is called in its place (compiled, under autocast); `dtype` that of its inputs.
    `empty`: the condition of no caption, [1, ...]. `both`: both teachers, the styled and the base alone, are
    asked in every step, which processes that share weights must do alike. `padded`: where there are two they
    are asked for few numbers of rows, since each has compiled code of its own. `part`: what is open around a
    pass. `name`: which of the things that are trained on the UNet is the student; it is in use around the
    loss and its backward (`AdaptedUNet.using`), as the only one always is. To be made after weights are
    sharded.
    """

    adapted: AdaptedUNet
    call: Any
    # the average, or what a stage's teacher is, as `AdaptedUNet.parameters`; none: the target is the student
    ema: Sequence[Tensor]
    empty: Condition
    schedule: Schedule
    kind: str  # of the UNet's output
    objective: Objective
    dtype: torch.dtype
    both: bool = False
    padded: bool = False
    part: Part = field(default=lambda name: nullcontext())
    name: str = TRAINED
    stage: int = 0  # number of the one that the step is in
    _answers: dict[tuple[int, int], Tensor] = field(default_factory=dict)  # the teacher's, of one group

    def begin(self, step: int, stage: Stage) -> None:
        """To be called before optimizer step `step` (from 0), of `stage`: the student of now may teach it.

        It asks for no step before but their weights, so that a run goes on from any state.
        """
        self.stage = stage.number
        if stage.number and step == stage.first:
            update_ema(self.ema, self._trained, 0.0)

    def losses(self, given: Given) -> Tensor:
        """The consistency loss of each sample, float32 [B]; only the student's pass has a gradient.

        Raises `ValueError` where something else than `name` is in use.
        """
        if self.adapted.in_use != self.name:
            raise ValueError(f"{self.adapted.in_use!r} is in use on the UNet, not {self.name!r}")
        o = self.objective
        teacher, distance = self.teacher(given), weighed(o.distance_on(given.intervals), given.weights)
        target = self.predict(partial(self._as_target, given.condition))
        if o.progressive:
            teacher = target = target if self.stage else teacher
            distance = scaled(distance, o.progressive.unit(self.schedule, given.times))
        found = consistency_loss(
            method=o.method, solver=o.solver, loss=distance, schedule=self.schedule, teacher=teacher,
            target=target, student=self.student(given), x0=given.x0, noise=given.noise, times=given.times,
            teacher_weight=o.teacher_weight,
        )  # fmt: skip
        if o.by_interval:
            found = found * interval_weight(self.schedule, given.times.t, given.times.s)
        return found

    def teacher(self, given: Given) -> Predict:
        """The guided teacher of the samples `given`."""
        return self.predict(partial(self._as_teacher, given))

    def student(self, given: Given) -> Predict:
        """The UNet with what is in use on it."""
        return self.predict(partial(self.output, "student", given.condition))

    def predict(self, model: Model) -> Predict:
        """What (x0, eps) the raw output of `model` stands for."""
        return predictor(model, self.schedule, self.kind)

    def output(self, part: str, condition: Condition, x: Tensor, t: Tensor) -> Tensor:
        """The raw output of the UNet as it is, in a pass of the name `part`."""
        with self.part(part):
            return self._output(x, t, condition)

    def _as_teacher(self, given: Given, x: Tensor, t: Tensor) -> Tensor:
        """Its raw output under guidance, if any; a sample each of the base alone where `bases` says so.

        Guidance is linear in what the teacher says, so that an answer serves another guidance as well
        (`Given.again`).
        """
        with self.part("teacher"):
            answer = self._answers.get(given.again) if given.again else None
            if answer is None or len(answer) != len(x):
                answer = self._unguided(given, x, t)
            if given.again:
                if any(group != given.again[0] for group, _ in self._answers):
                    self._answers.clear()
                self._answers[given.again] = answer
            if not self.objective.guided:
                return answer[:, 0].float()  # as `guide` to 1 has it
            return guide(answer[:, 0], answer[:, 1], given.guidance)

    def _unguided(self, given: Given, x: Tensor, t: Tensor) -> Tensor:
        """[B, 2, C, h, w]: its raw output without a caption, and with it; [B, 1, ...] the latter alone."""
        asked = self.objective.rows["teacher"]

        def ask(rows: Rows, styled: bool) -> Tensor:
            named, x_t, times = given.condition[rows], x[rows], t[rows]
            n = len(x_t)
            if asked == 2:
                named = Condition.cat([self.empty.expand(n).sized_as(named), named])
            with self.adapted.teacher(styled=styled):
                output = self._output(x_t.repeat(asked, 1, 1, 1), times.repeat(asked), named)
            return output.unflatten(0, (asked, n)).transpose(0, 1)

        bases = given.bases or [False] * len(x)
        return route_by_teacher(ask, bases, x.device, always=self.both, padded=self.padded)

    def _as_target(self, condition: Condition, x: Tensor, t: Tensor) -> Tensor:
        with self.part("target"), swapped(self._trained, self.ema) if self.ema else nullcontext():
            return self._output(x, t, condition)

    @cached_property
    def _trained(self) -> list[Parameter]:
        return self.adapted.parameters(self.name)

    def _output(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        output: Tensor = self.call(x.to(self.dtype), t, **condition.kwargs()).sample
        return output


def route_by_teacher(
    ask: Callable[[Rows, bool], Tensor],
    bases: Sequence[bool],
    device: torch.device | str = "cpu",
    *,
    always: bool = False,
    padded: bool = False,
) -> Tensor:
    """The rows that `ask(rows, styled)` gives, [n, ...] for n rows, from each row's own teacher, in order.

    `bases`: for each row whether the base alone teaches it. A teacher that has no row is not asked, unless
    `always`: where the weights are sharded all processes must call the model equally often. One that has all
    is asked for `slice(None)`. Otherwise the index is made here, on the host, and goes to `device` in one
    copy that nobody waits for. `padded`: a row is asked for again, and that answer dropped, until there are a
    quarter of the batch, a half, three quarters or all of it: of the 2B numbers of rows that two teachers of
    a batch B can have at most eight are left, for a quarter more rows.
    """
    n = len(bases)
    rows = {styled: [i for i, base in enumerate(bases) if base != styled] for styled in (True, False)}
    alone = [styled for styled in rows if len(rows[styled]) == n]
    if alone and not always:
        return ask(slice(None), alone[0])
    asked = {styled: _rows(own, n, padded) for styled, own in rows.items()}
    first = {True: 0, False: len(asked[True])}
    place = {i: first[styled] + k for styled, own in rows.items() for k, i in enumerate(own)}
    told = sent(torch.tensor([*asked[True], *asked[False], *map(place.__getitem__, range(n))]), device)
    *each, order = told.split([*map(len, asked.values()), n])
    made = [ask(index, styled) for styled, index in zip(asked, each, strict=True)]
    return torch.cat(made).index_select(0, order)


def _rows(own: list[int], n: int, padded: bool) -> list[int]:
    """What a teacher of the rows `own` of n is asked for: at least one row, and some again where `padded`."""
    size = max(len(own), 1)
    if padded:
        size = next(some for quarter in (1, 2, 3, 4) if (some := -(-quarter * n // 4)) >= size)
    return [*own, *[own[0] if own else 0] * (size - len(own))]


def passes(config: Distill) -> dict[str, float]:
    """How often a step's consistency loss asks each part for a sample, in the mean over the run, guidance
    being two: never where there is none (`matching.passes` has what else a step asks for).
    """
    if config.matching and not config.matching.consistency:
        return dict.fromkeys(PARTS, 0)
    if not config.stages:
        return dict(_passes(config, stage_at(config, config.steps - 1)))
    counted = {stage: _passes(config, stage) for stage in config.stages}
    return {
        name: sum(stage.steps * each[name] for stage, each in counted.items()) / config.steps
        for name in PARTS
    }


def _passes(config: Distill, stage: Stage) -> dict[str, int]:
    """How often a step of `stage` asks each part: found by letting it."""
    counted = dict.fromkeys(PARTS, 0)
    objective = Objective.of(config)
    schedule = Schedule.from_config(SD_BETAS)
    x, grid = torch.ones(1, 1, 1, 1), stage.n_grid

    def counting(name: str) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        def predict(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            counted[name] += objective.rows[name]
            return x, x

        return predict

    teacher, target, student = map(counting, PARTS)
    if objective.progressive:
        teacher = target = target if stage.number else teacher
    consistency_loss(
        method=objective.method, solver=objective.solver, loss=objective.distance, schedule=schedule,
        teacher=teacher, target=target, student=student, x0=x, noise=x,
        times=objective.method.times(schedule, grid, 1, torch.Generator().manual_seed(0)),
        teacher_weight=objective.teacher_weight,
    )  # fmt: skip
    return counted
