"""A training step on torch's meta device: peft's, diffusers' and autograd's own code, without a number.

It gives FLOPs (a multiply-add counts as two) and the bytes that each pass holds at any batch size.
"""

from __future__ import annotations

from collections.abc import Mapping
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

    def highest(self, batch: int, *, gradients: bool = False) -> Held:
        """The moment that holds most with `batch` samples."""
        return max(self.moments, key=lambda moment: moment.at(batch, gradients=gradients))


@dataclass(frozen=True)
class Rehearsal:
    """The passes of a step. The target's is the student's forward without a graph: never the highest."""

    teacher: Pass  # both of guidance in one, its flops those of one of them
    student: Pass  # forward and backward
    forward: float  # FLOPs of the student's forward alone, and of the target's


@dataclass(frozen=True)
class Pictures:
    """A VAE: its passes to latents and back, without gradient."""

    weights: int  # their number
    encode: Pass
    decode: Pass


@dataclass
class Stage:
    """The UNet of a base with its LoRA on the meta device; rehearsals are kept."""

    subject: Subject
    adapter: Adapter
    _kept: dict[Any, Any] = field(default_factory=dict)

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
        key = (resolution, dtype, cuda)
        if (key, checkpointing) not in self._kept:
            for p in self.bare:
                p.data = p.data.to(dtype)
            kernels, side = Kernels(dtype, cuda=cuda), resolution // self.subject.structure.factor
            if key not in self._kept:
                with torch.no_grad(), teacher(self.unet):
                    self._kept[key], _ = self._pass(2, side, dtype, kernels)
            if checkpointing:
                self.unet.enable_gradient_checkpointing(partial(checkpoint, kernels))
            else:
                self.unet.disable_gradient_checkpointing()
            self._kept[key, checkpointing] = self._pass(1, side, dtype, kernels)
        return Rehearsal(self._kept[key], *self._kept[key, checkpointing])

    def pictures(self, resolution: int, dtype: torch.dtype) -> Pictures:
        """The VAE's passes at `resolution` pixels, its weights and numbers in `dtype`."""
        if (resolution, dtype) not in self._kept:
            self._kept[resolution, dtype] = rehearse_vae(self.subject.vae_config, resolution, dtype)
        return self._kept[resolution, dtype]

    def _pass(self, times: int, side: int, dtype: torch.dtype, kernels: Kernels) -> tuple[Pass, float]:
        """One pass of `times` * n samples, and the FLOPs of its forward alone, of one sample."""
        n = a_prime([side, self.subject.tokens, self.adapter.rank, *(d for p in self.bare for d in p.shape)])
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


@torch.no_grad()
def rehearse_vae(config: Mapping[str, Any], resolution: int, dtype: torch.dtype) -> Pictures:
    """The VAE of this configuration on the meta device, with pictures of `resolution` pixels."""
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        vae = AutoencoderKL.from_config(dict(config)).eval()
    weights = list(vae.parameters())
    for p in weights:
        p.data = p.data.to(dtype)
    n = a_prime([resolution, *(d for p in weights for d in p.shape)])
    pixels = torch.empty(n, 3, resolution, resolution, dtype=dtype, device="meta")
    latents = vae.encode(pixels).latent_dist.mean
    passes = []
    for run in (lambda: vae.encode(pixels), lambda: vae.decode(latents)):
        ledger = Ledger(n)
        ledger.ignore([*weights, pixels, latents])
        with ledger, Kernels():
            run()
        passes.append(Pass(ledger.flops / n, largest(ledger.moments)))
    return Pictures(sum(p.numel() for p in weights), *passes)


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
        "target": rehearsal.forward * samples,
        "student forward": rehearsal.forward * samples,
        "student backward": (rehearsal.student.flops - rehearsal.forward) * samples,
    }
