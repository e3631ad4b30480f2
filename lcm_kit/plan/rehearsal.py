"""A training step on torch's meta device: peft's, diffusers' and autograd's own code, without a number.

It gives FLOPs (a multiply-add counts as two) and the bytes that each pass holds at any batch size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lcm_kit import memory
from lcm_kit.adapter import add_lora, teacher
from lcm_kit.config.schema import Adapter, Distill
from lcm_kit.export.structure import empty_unet
from lcm_kit.plan.subject import Subject
from lcm_kit.plan.tracker import Held, Kernels, Ledger, a_prime, checkpoint, largest
from lcm_kit.schedule import Schedule
from lcm_kit.solvers import SOLVERS

_CHANNELS = 4  # of a latent


@dataclass(frozen=True)
class Weights:
    """Numbers of weights: of the base, of those that `memory.quantize` reaches, of the LoRA."""

    base: int
    quantizable: int
    rows: int  # outputs of the quantizable layers, each with a scale of its own in int8
    widest: int  # the largest quantizable layer
    largest: int  # the largest tensor of the base
    lora: tuple[int, ...]  # each tensor's


@dataclass(frozen=True)
class Pass:
    """One forward, or forward and backward, of the UNet."""

    flops: float  # of a sample
    moments: tuple[Held, ...]  # one of them is its peak


@dataclass(frozen=True)
class Rehearsal:
    """The passes of a step."""

    teacher: Pass  # both of guidance in one, its flops those of one of them
    target: Pass
    student: Pass  # forward and backward
    forward: float  # FLOPs of the student's forward alone


@dataclass
class Stage:
    """The UNet of a base with its LoRA on the meta device; rehearsals are kept."""

    subject: Subject
    adapter: Adapter
    _kept: dict[Any, Rehearsal] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Build, count, add the LoRA."""
        self.unet = empty_unet(self.subject.unet_config)
        self.bare = list(self.unet.parameters())
        held = [m.weight for n, m in self.unet.named_modules() if memory.quantizable(n, m)]
        with torch.device("meta"):
            self.lora = add_lora(self.unet, self.adapter)
        self.weights = Weights(
            sum(p.numel() for p in self.bare),
            sum(w.numel() for w in held),
            sum(len(w) for w in held),
            max((w.numel() for w in held), default=0),
            max(p.numel() for p in self.bare),
            tuple(p.numel() for p in self.lora),
        )

    def rehearse(self, resolution: int, dtype: torch.dtype, *, cuda: bool, checkpointing: bool) -> Rehearsal:
        """The passes at `resolution` pixels with the frozen weights in `dtype`."""
        cuda &= dtype != torch.float32  # without autocast there is no difference
        key = (resolution, dtype, cuda, checkpointing)
        if key not in self._kept:
            for p in self.bare:
                p.data = p.data.to(dtype)
            kernels = Kernels(dtype, cuda=cuda)
            if checkpointing:
                self.unet.enable_gradient_checkpointing(partial(checkpoint, kernels))
            else:
                self.unet.disable_gradient_checkpointing()
            self._kept[key] = self._rehearse(resolution // self.subject.structure.factor, dtype, kernels)
        return self._kept[key]

    def _rehearse(self, side: int, dtype: torch.dtype, kernels: Kernels) -> Rehearsal:
        n = a_prime([side, self.subject.tokens, self.adapter.rank, *(d for p in self.bare for d in p.shape)])
        with torch.no_grad():
            with teacher(self.unet):
                both, _ = self._pass(n, 2, side, dtype, kernels)
            target, _ = self._pass(n, 1, side, dtype, kernels)
        student, forward = self._pass(n, 1, side, dtype, kernels)
        return Rehearsal(both, target, student, forward)

    def _pass(
        self, n: int, times: int, side: int, dtype: torch.dtype, kernels: Kernels
    ) -> tuple[Pass, float]:
        """One pass of `times` * n samples, and the FLOPs of its forward alone, of one sample."""
        inputs = self._inputs(n * times, side, dtype)
        ledger = Ledger(n, frozenset(p.nbytes for p in self.lora))
        ledger.ignore([*self.unet.parameters(), inputs["sample"], inputs["encoder_hidden_states"]])
        with ledger:
            with kernels.again():
                output = self.unet(**inputs).sample.float()
            forward = ledger.flops
            if torch.is_grad_enabled():
                torch.autograd.backward(output.square().mean())
        for p in self.lora:
            p.grad = None
        return Pass(ledger.flops / n / times, largest(ledger.moments)), forward / n / times

    def _inputs(self, n: int, side: int, dtype: torch.dtype) -> dict[str, Any]:
        def empty(*shape: int) -> Tensor:
            return torch.empty(n, *shape, dtype=dtype, device="meta")

        width = self.subject.structure.width
        inputs: dict[str, Any] = {
            "sample": empty(_CHANNELS, side, side),
            "timestep": torch.zeros(n, dtype=torch.int64, device="meta"),
            "encoder_hidden_states": empty(self.subject.tokens, width),
        }
        if self.subject.pooled:
            inputs["added_cond_kwargs"] = {"text_embeds": empty(self.subject.pooled), "time_ids": empty(6)}
        return inputs


def teacher_calls(config: Distill) -> int:
    """How often the solver asks the teacher in one step: found by letting it."""
    calls = 0

    def predict(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal calls
        calls += 1
        return x, x

    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    schedule, t = Schedule.from_config(betas), torch.tensor([500])
    SOLVERS[config.solver](predict, schedule, torch.ones(1, 1, 1, 1), t, t - 20)
    return calls


def flops_of_step(config: Distill, rehearsal: Rehearsal) -> dict[str, float]:
    """FLOPs of one optimizer step on one process, by part."""
    samples = config.batch_size * config.accumulation
    return {
        "teacher": 2 * teacher_calls(config) * rehearsal.teacher.flops * samples,
        "target": rehearsal.target.flops * samples,
        "student forward": rehearsal.forward * samples,
        "student backward": (rehearsal.student.flops - rehearsal.forward) * samples,
    }
