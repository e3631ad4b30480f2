"""Real training steps of a config, on random weights if the base's are not there."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcm_kit import bases
from lcm_kit.adapter.adapted_unet import TRAINED, AdaptedUNet
from lcm_kit.adapter.matching import FAKE
from lcm_kit.adapter.roles import Given, Objective, Roles
from lcm_kit.adapter.stages import stage_at
from lcm_kit.bases import compiling, memory
from lcm_kit.bases.condition import Condition
from lcm_kit.config.finetune import Finetune
from lcm_kit.config.schema import Distill, Training
from lcm_kit.core.flat import flattened
from lcm_kit.core.losses import LOSSES
from lcm_kit.core.matching import Draws
from lcm_kit.core.methods import DMD, Times
from lcm_kit.core.prediction import predictor
from lcm_kit.core.schedule import SD_BETAS, Schedule
from lcm_kit.core.step import diffusion_loss
from lcm_kit.data.split import two_teachers
from lcm_kit.lora.structure import empty_unet
from lcm_kit.plan import work
from lcm_kit.plan.base_profile import BaseProfile
from lcm_kit.plan.meter import Meter
from lcm_kit.plan.phases import FAKE_TURN, STUDENT_TURN
from lcm_kit.plan.style import Style, put_on
from lcm_kit.training import run_files, runtime
from lcm_kit.training.run_metrics import Metrics
from lcm_kit.training.stepping import Passes, Step
from lcm_kit.training.turns import Learner, Turns
from lcm_kit.training.updates import Guard

_MICRO_BATCHES = 2  # of a step with accumulation: the second has the gradients of the first


def random_unet(config: Any, dtype: torch.dtype) -> Any:
    """A UNet of this configuration with random weights, on the CPU, frozen; never twice in memory."""
    unet = empty_unet(config)
    for p in unet.parameters():
        p.data = p.data.to(dtype)
    unet.to_empty(device="cpu")
    with torch.no_grad():
        for name, p in unet.named_parameters():
            if p.ndim > 1:
                p.uniform_(-1, 1).mul_((3 / p[0].numel()) ** 0.5)
            else:
                p.fill_(float(name.endswith("weight")))
    return unet


@dataclass
class _Watched(Passes):
    """Passes whose time is taken, and of which a meter knows."""

    meter: Meter
    phase: str | None  # that they are, to the meter; None: their parts say so
    seconds: float = 0.0  # of all of them

    def __call__(self, step: int, losses_of: Callable[[slice], Tensor]) -> Step:
        if self.phase:
            self.meter.start(self.phase)
        start = _clock(self.accelerator)
        made = super().__call__(step, losses_of)
        self.seconds += _clock(self.accelerator) - start
        self.meter.start("optimizer step")
        return made


@dataclass(frozen=True)
class Trial:
    """The step of train/distill or train/finetune on random latents and conditions."""

    config: Training
    accelerator: Any
    adapted: AdaptedUNet
    unet: Any  # what is called; its blocks are compiled, where `memory.compile` asks
    ema: list[Tensor]
    optimizers: dict[str, Any]  # by name of what is trained
    latents: Tensor
    condition: Condition
    tables: Schedule
    kind: str  # of the UNet's output
    meter: Meter
    _learning: list[Turns | Learner] = field(default_factory=list)  # once the first step has made it

    # -- Distillation ----------------------------------------------------------------------------------------

    def _turns(self, config: Distill) -> Turns:
        """What is trained in a step, as the recipe has it."""
        device, dtype = self.accelerator.device, runtime.dtype(self.accelerator)
        matched = config.matching
        empty, n = self.condition[0].to(device, dtype), len(self.latents)
        roles = Roles(
            self.adapted, self.unet, self.ema, empty, self.tables.to(device), self.kind,
            Objective.of(config), dtype, padded=compiling.wants(config, device),
            part=self._unseen if matched else self._part,  # their turns are watched as wholes
        )  # fmt: skip
        turns = Turns.of(
            self.accelerator, roles, config, self.optimizers, self._metrics, share=n, done=0, window=[]
        )
        student = self._watched(turns.student, STUDENT_TURN if matched else None)
        return replace(turns, student=student, fake=turns.fake and self._watched(turns.fake, FAKE_TURN))

    def _given(self, config: Distill, part: slice) -> Given:
        device = self.accelerator.device
        x0 = self.latents[part].to(device)
        # a stage's first teacher, which is the dearest, on the last one's grid: times cost nothing
        n, n_grid = len(x0), stage_at(config, config.steps - 1).n_grid
        method = Objective.of(config).method
        times = method.times(self.tables, n_grid, n, torch.Generator().manual_seed(0))
        return Given(
            x0, torch.randn(x0.shape).to(device), Times(*times).to(device),
            torch.full((n,), config.guidance.max, device=device), self._condition(part),
            [two_teachers(config) and k % 2 == 1 for k in range(n)],
        )  # fmt: skip

    def _draws(self, method: DMD) -> list[Draws]:
        """Of each turn, all at the same place of the same trajectory: its passes are those of the mean."""
        place, n = work.place_on_trial(method), len(self.latents)
        shape = self.latents.shape[1:]

        def drawn() -> Draws:
            t = torch.full((n,), self.tables.steps // 2)
            start, renewed = torch.randn(n, *shape), torch.randn(n, place, *shape)
            draws = Draws(method.steps[-1], place, start, renewed, t, torch.randn(n, *shape))
            return draws.to(self.accelerator.device)

        return [drawn() for _ in range(method.fake_updates + 1)]

    # -- Fine-tuning -----------------------------------------------------------------------------------------

    def _learner(self) -> Learner:
        weights, optimizer = self.adapted.parameters(), self.optimizers[TRAINED]
        passes = Passes(
            self.accelerator, self.unet, weights, len(self.latents), self.config.batch_size,
            self.config.optimizer.grad_clip,
        )  # fmt: skip
        guard = Guard(self.accelerator, self.config, self._metrics, optimizer, weights, self.ema)
        return self._watched(Learner(TRAINED, self.adapted, passes, guard), None)

    def _pictures(self, config: Finetune, part: slice) -> Tensor:
        """Losses of the samples in `part`."""
        factors = (1.0, config.prior.weight) if work.pairs(config) else (1.0,)
        return sum((factor * self._denoising(part) for factor in factors), torch.zeros(()))

    def _denoising(self, part: slice) -> Tensor:
        device, condition = self.accelerator.device, self._condition(part)
        x0 = self.latents[part].to(device)
        empty = self.condition[0].to(device, runtime.dtype(self.accelerator))
        condition = condition.replaced(torch.zeros(len(x0), dtype=torch.bool), empty)
        schedule = self.tables.to(device)
        return diffusion_loss(
            kind=self.kind, loss=lambda a, b: LOSSES["l2"](a, b, 0.0), schedule=schedule,
            student=predictor(partial(self._as_student, condition=condition), schedule, self.kind),
            x0=x0, noise=torch.randn(x0.shape).to(device), t=torch.full((len(x0),), 500).to(device),
        )  # fmt: skip

    def _as_student(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        self._part("student")
        output: Tensor = self.unet(x.to(runtime.dtype(self.accelerator)), t, **condition.kwargs()).sample
        return output

    # -- Both ------------------------------------------------------------------------------------------------

    def _condition(self, part: slice) -> Condition:
        """Of the samples in `part`."""
        return self.condition[part].to(self.accelerator.device, runtime.dtype(self.accelerator))

    @property
    def _metrics(self) -> Metrics:
        return Metrics(self.accelerator, Path(self.config.output) / run_files.METRICS)

    def _part(self, name: str) -> AbstractContextManager[None]:
        self.meter.start(f"{name} pass")  # until the next begins, the student's until gradients are clipped
        return nullcontext()

    def _unseen(self, name: str) -> AbstractContextManager[None]:
        return nullcontext()

    def _watched(self, learner: Learner, phase: str | None) -> Learner:
        """The same, watched; random weights that give no number stop no trial."""
        guard = replace(learner.guard, config=replace(self.config, non_finite="skip"))
        return replace(
            learner, guard=guard, passes=_Watched(**vars(learner.passes), meter=self.meter, phase=phase)
        )

    def step(self) -> tuple[float, int]:
        """One optimizer step: its seconds with all of its micro-batches, and samples a forward."""
        config = self.config
        if not self._learning:
            made = self._turns(config) if isinstance(config, Distill) else self._learner()
            self._learning.append(made)
        learning, rate, ids = self._learning[0], config.optimizer.lr, ["random"] * len(self.latents)
        start = _clock(self.accelerator)
        if isinstance(learning, Turns):
            assert isinstance(config, Distill)
            method = config.matching
            given = partial(self._given, config)
            learning.step(0, rate, given, self._draws(method) if method else (), ids)
            learning.settle()
            learners = [each for each in (learning.fake, learning.student) if each]
        else:
            assert isinstance(config, Finetune)
            learning.turn(0, rate, partial(self._pictures, config), ids)
            learning.guard.settle()
            learners = [learning]
        seconds = _clock(self.accelerator) - start
        self.meter.start(None)
        watched = [each.passes for each in learners if isinstance(each.passes, _Watched)]
        left_out = config.batch_size * config.accumulation / len(self.latents) - 1
        seconds += left_out * sum(each.seconds for each in watched)
        for each in watched:
            each.seconds = 0.0
        return seconds, min(each.micro for each in watched)


def _clock(accelerator: Any) -> float:
    if accelerator.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def make(
    config: Training,
    accelerator: Any,
    found: BaseProfile,
    unet_config: Any,
    meter: Meter,
    teacher_lora: Style | None = None,
) -> Trial:
    """Load or make up the UNet, put the LoRAs on it, draw latents and conditions for a step."""
    device, dtype = accelerator.device, runtime.dtype(accelerator)
    tables, kind = Schedule.from_config(SD_BETAS), "v_prediction"
    meter.start("loading")
    if found.folder is None:
        unet = memory.place(random_unet(unet_config, dtype), config, device)
    else:
        base = bases.inspect_base(str(found.folder), variant=config.base.variant)
        unet = memory.load_unet(base, config, device, dtype)
        tables, kind = Schedule.from_config(base.scheduler_config), base.prediction_type
    meter.start(None)
    adapted = AdaptedUNet(unet)
    put_on(adapted, teacher_lora)
    adapted.add_lora(config.adapter)
    if config.matching:
        adapted.add_lora(config.adapter, name=FAKE, on_teacher=True)
    made = [
        memory.make_optimizer(adapted.parameters(name), config.optimizer, device) for name in adapted.trained
    ]
    unet, *made = runtime.prepare(accelerator, adapted, *made)
    # other objects, if they were sharded
    ema = flattened(adapted.parameters()) if config.second_set else []
    compiling.compile_blocks(unet, config)
    n = config.batch_size * min(config.accumulation, _MICRO_BATCHES)
    side = config.data.resolution // found.structure.factor
    pooled = torch.randn(n, found.pooled) if found.pooled else None
    time_ids = torch.full((n, 6), float(config.data.resolution)) if found.pooled else None
    condition = Condition(torch.randn(n, found.tokens, unet_config["cross_attention_dim"]), pooled, time_ids)
    latents = torch.randn(n, found.channels, side, side)
    return Trial(
        config, accelerator, adapted, unet, ema, dict(zip(adapted.trained, made, strict=True)), latents,
        condition, tables, kind, meter,
    )  # fmt: skip
