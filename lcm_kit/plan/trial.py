"""Real training steps of a config, on random weights if the base's are not there."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lcm_kit import bases
from lcm_kit.adapter.adapted_unet import AdaptedUNet
from lcm_kit.adapter.roles import Given, Objective, Roles
from lcm_kit.adapter.stages import stage_at
from lcm_kit.adapter.trained_weights import update_ema
from lcm_kit.bases import compiling, memory
from lcm_kit.bases.condition import Condition
from lcm_kit.config.finetune import Finetune
from lcm_kit.config.schema import Distill, Training
from lcm_kit.core.flat import flattened
from lcm_kit.core.losses import LOSSES
from lcm_kit.core.methods import Times
from lcm_kit.core.prediction import predictor
from lcm_kit.core.schedule import SD_BETAS, Schedule
from lcm_kit.core.step import diffusion_loss
from lcm_kit.data.split import two_teachers
from lcm_kit.lora.structure import empty_unet
from lcm_kit.plan import work
from lcm_kit.plan.base_profile import BaseProfile
from lcm_kit.plan.meter import Meter
from lcm_kit.plan.style import Style, put_on
from lcm_kit.training import runtime, stepping

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


@dataclass(frozen=True)
class Trial:
    """The step of train/distill or train/finetune on random latents and conditions."""

    config: Training
    accelerator: Any
    adapted: AdaptedUNet
    unet: Any  # what is called; its blocks are compiled, where `memory.compile` asks
    lora: list[nn.Parameter]
    ema: list[Tensor]
    optimizer: Any
    latents: Tensor
    condition: Condition
    tables: Schedule
    kind: str  # of the UNet's output
    meter: Meter

    def losses(self, part: slice) -> Tensor:
        """Losses of the samples in `part`."""
        if isinstance(self.config, Distill):
            return self._consistency(self.config, part)
        assert isinstance(self.config, Finetune)
        pictures = (1.0, self.config.prior.weight) if work.pairs(self.config) else (1.0,)
        return sum((factor * self._denoising(part) for factor in pictures), torch.zeros(()))

    def _call(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self.unet(x.to(runtime.dtype(self.accelerator)), t, **condition.kwargs()).sample

    def _conditions(self, part: slice) -> tuple[Condition, Condition]:
        """Those of the samples in `part`, and the empty one for as many."""
        device, dtype = self.accelerator.device, runtime.dtype(self.accelerator)
        condition = self.condition[part].to(device, dtype)
        return condition, self.condition[0].to(device, dtype).expand(len(condition)).sized_as(condition)

    def _as_student(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        self._part("student")
        return self._call(x, t, condition)

    def _denoising(self, part: slice) -> Tensor:
        x0 = self.latents[part].to(self.accelerator.device)
        condition, empty = self._conditions(part)
        condition = condition.replaced(torch.zeros(len(x0), dtype=torch.bool), empty[0])
        schedule = self.tables.to(x0.device)
        return diffusion_loss(
            kind=self.kind, loss=lambda a, b: LOSSES["l2"](a, b, 0.0), schedule=schedule,
            student=predictor(partial(self._as_student, condition=condition), schedule, self.kind),
            x0=x0, noise=torch.randn(x0.shape).to(x0.device), t=torch.full((len(x0),), 500).to(x0.device),
        )  # fmt: skip

    def _consistency(self, config: Distill, part: slice) -> Tensor:
        condition, empty = self._conditions(part)
        x0 = self.latents[part].to(self.accelerator.device)
        objective, n = Objective.of(config), len(x0)
        roles = Roles(
            self.adapted, self.unet, self.ema, empty[0], self.tables.to(x0.device), self.kind, objective,
            runtime.dtype(self.accelerator), part=self._part,
            padded=compiling.wants(config, x0.device),
        )  # fmt: skip
        # a stage's first teacher, which is the dearest, on the last one's grid: times cost nothing
        n_grid = stage_at(config, config.steps - 1).n_grid
        times = objective.method.times(self.tables, n_grid, n, torch.Generator().manual_seed(0))
        return roles.losses(Given(
            x0, torch.randn(x0.shape).to(x0.device), Times(*times).to(x0.device),
            torch.full((n,), config.guidance.max), condition,
            [two_teachers(config) and k % 2 == 1 for k in range(n)],
        ))  # fmt: skip

    def _part(self, name: str) -> AbstractContextManager[None]:
        self.meter.start(f"{name} pass")  # until the next begins, the student's until gradients are clipped
        return nullcontext()

    def step(self) -> tuple[float, int]:
        """One optimizer step: its seconds with all of its micro-batches, and samples a forward."""
        config = self.config
        passes = stepping.Passes(
            self.accelerator, self.unet, self.lora, len(self.latents), config.batch_size,
            config.optimizer.grad_clip,
        )  # fmt: skip
        start = self._clock()
        passes(1, self.losses)
        middle = self._clock()
        self.meter.start("optimizer step")
        self.optimizer.step()
        if self.ema and config.ema:
            update_ema(self.ema, self.lora, config.ema)
        self.optimizer.zero_grad()
        left_out = config.batch_size * config.accumulation / len(self.latents)
        seconds = (middle - start) * left_out + self._clock() - middle
        self.meter.start(None)
        return seconds, passes.micro

    def _clock(self) -> float:
        if self.accelerator.device.type == "cuda":
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
    made = memory.make_optimizer(adapted.add_lora(config.adapter), config.optimizer, device)
    unet, optimizer = runtime.prepare(accelerator, adapted, made)
    lora = adapted.parameters()  # other objects, if they were sharded
    ema = flattened(lora) if config.second_set else []
    compiling.compile_blocks(unet, config)
    n = config.batch_size * min(config.accumulation, _MICRO_BATCHES)
    side = config.data.resolution // found.structure.factor
    pooled = torch.randn(n, found.pooled) if found.pooled else None
    time_ids = torch.full((n, 6), float(config.data.resolution)) if found.pooled else None
    condition = Condition(torch.randn(n, found.tokens, unet_config["cross_attention_dim"]), pooled, time_ids)
    latents = torch.randn(n, found.channels, side, side)
    return Trial(
        config, accelerator, adapted, unet, lora, ema, optimizer, latents, condition, tables, kind, meter
    )  # fmt: skip
