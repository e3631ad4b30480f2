"""A training step on torch's meta device: peft's, diffusers' and autograd's own code, without a number.

It gives FLOPs (a multiply-add counts as two) and the bytes that each pass holds at any batch size.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lcm_kit.adapter.adapted_unet import AdaptedUNet
from lcm_kit.bases import memory
from lcm_kit.config.schema import Adapter
from lcm_kit.lora.structure import empty_unet
from lcm_kit.plan.base_profile import BaseProfile
from lcm_kit.plan.style import Style, put_on
from lcm_kit.plan.text import Captions
from lcm_kit.plan.tracker import Held, Kernels, Ledger, a_prime, checkpoint, largest


@dataclass(frozen=True)
class Weights:
    """Numbers of weights: of the base, of those that `memory.quantize` reaches, of the LoRA."""

    base: int
    quantizable: int
    rows: int  # outputs of the quantizable layers, each with a scale of its own in int8
    widest: int  # the largest quantizable layer
    largest: int  # the largest tensor of the base
    lora: tuple[int, ...]  # each tensor's; with that of the text encoders, if they are trained
    style: int = 0  # of the teacher's LoRA


@dataclass(frozen=True)
class Pass:
    """One forward, or forward and backward, of the UNet."""

    flops: float  # of a sample
    moments: tuple[Held, ...]  # one of them is its peak

    def highest(self, batch: int, *, gradients: bool = False) -> Held:
        """The moment that holds most with `batch` samples."""
        return max(self.moments, key=lambda moment: moment.at(batch, gradients=gradients))


@dataclass(frozen=True)
class DryRun:
    """The passes of a step, the student's with the text encoders if they are trained.

    The target's is the student's forward without a graph: never the highest.
    """

    teacher: Pass  # of one sample: guidance asks for two
    student: Pass  # forward and backward; with prior preservation two forwards, and one backward through both
    forward: float  # FLOPs of the student's forwards alone; of the target's


@dataclass(frozen=True)
class Pictures:
    """A VAE: its passes to latents and back, without gradient."""

    weights: int  # their number
    encode: Pass
    decode: Pass


@dataclass
class MetaModel:
    """The UNet of a base with its LoRA, and the teacher's, on the meta device; rehearsals are kept."""

    subject: BaseProfile
    adapter: Adapter
    style: Style | None = None
    text_rank: int | None = None  # of the text encoders' LoRA; None: captions are encoded beforehand
    _kept: dict[Any, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Build, count, add the LoRAs."""
        self.adapted = AdaptedUNet(empty_unet(self.subject.unet_config))
        self.unet = self.adapted.unet
        self.bare = list(self.unet.parameters())
        held = [m.weight for n, m in self.unet.named_modules() if memory.quantizable(n, m)]
        with torch.device("meta"), warnings.catch_warnings():
            # there are two adapters, as there should
            warnings.filterwarnings("ignore", "Already found a `peft_config`")
            put_on(self.adapted, self.style)
            style = sum(p.numel() for n, p in self.unet.named_parameters() if ".lora_" in n)
            self.lora = self.adapted.add_lora(self.adapter)
        self.text = Captions.build(self.subject, self.text_rank) if self.text_rank else None
        self.lora += self.text.lora if self.text else []
        self.weights = Weights(
            sum(p.numel() for p in self.bare),
            sum(w.numel() for w in held),
            sum(len(w) for w in held),
            max((w.numel() for w in held), default=0),
            max(p.numel() for p in self.bare),
            tuple(p.numel() for p in self.lora),
            style,
        )

    def rehearse(
        self, resolution: int, dtype: torch.dtype, *, cuda: bool, checkpointing: bool, pair: bool = False
    ) -> DryRun:
        """The passes at `resolution` pixels with the frozen weights in `dtype`.

        `pair`: a sample of the base's own beside each one, as prior preservation has it.
        """
        kernels = self._kernels(dtype, cuda)
        key = (resolution, dtype, kernels.cuda, checkpointing, pair)
        if key not in self._kept:
            if checkpointing:
                self.unet.enable_gradient_checkpointing(partial(checkpoint, kernels))
            else:
                self.unet.disable_gradient_checkpointing()
            self._kept[key] = self._pass(
                resolution, dtype, kernels, 2 if pair else 1, checkpointing=checkpointing
            )
        return DryRun(self.drawing(resolution, dtype, cuda=cuda), *self._kept[key])

    def drawing(self, resolution: int, dtype: torch.dtype, *, cuda: bool = False, lora: bool = False) -> Pass:
        """A forward without gradient: the teacher's, or with `lora` that of the UNet with what is trained."""
        kernels = self._kernels(dtype, cuda)
        key = (resolution, dtype, kernels.cuda, lora)
        if key not in self._kept:
            with torch.no_grad(), nullcontext() if lora else self.adapted.teacher():
                self._kept[key] = self._pass(resolution, dtype, kernels)[0]
        return self._kept[key]

    def _kernels(self, dtype: torch.dtype, cuda: bool) -> Kernels:
        """Without autocast it makes no difference where it runs."""
        return Kernels(dtype, cuda=cuda and dtype != torch.float32)

    def pictures(self, resolution: int, dtype: torch.dtype) -> Pictures:
        """The VAE's passes at `resolution` pixels, its weights and numbers in `dtype`."""
        if (resolution, dtype) not in self._kept:
            self._kept[resolution, dtype] = rehearse_vae(self.subject.vae_config, resolution, dtype)
        return self._kept[resolution, dtype]

    def _pass(
        self,
        resolution: int,
        dtype: torch.dtype,
        kernels: Kernels,
        forwards: int = 1,
        *,
        checkpointing: bool = False,
    ) -> tuple[Pass, float]:
        """One pass of n samples, and the FLOPs of its forwards alone, of one sample."""
        side = resolution // self.subject.structure.factor
        for p in self.bare:
            p.data = p.data.to(dtype)
        ranks = [self.adapter.rank, *(self.style.ranks.values() if self.style else ())]
        n = a_prime([side, self.subject.tokens, *ranks, *(d for p in self.bare for d in p.shape)])
        inputs = self._inputs(n, side, dtype)
        ledger = Ledger(n, frozenset(p.nbytes for p in self.lora))
        ledger.ignore([*self.unet.parameters(), inputs["sample"], inputs["encoder_hidden_states"]])
        if self.text:
            ledger.ignore(self.text.parameters())
        with ledger:
            outputs = []
            for _ in range(forwards):
                if self.text and torch.is_grad_enabled():
                    encoded = self.text.encode(n, checkpointing=checkpointing)
                    inputs["encoder_hidden_states"] = encoded.embeds.to(dtype)
                    if encoded.pooled is not None:
                        inputs["added_cond_kwargs"]["text_embeds"] = encoded.pooled.to(dtype)
                    del encoded
                with kernels.again():
                    outputs.append(self.unet(**inputs).sample.float())
            forward = ledger.flops
            if torch.is_grad_enabled():
                loss = torch.stack([output.square().mean() for output in outputs]).sum()
                del outputs
                torch.autograd.backward(loss)
        for p in self.lora:
            p.grad = None
        return Pass(ledger.flops / n, largest(ledger.moments)), forward / n

    def _inputs(self, n: int, side: int, dtype: torch.dtype) -> dict[str, Any]:
        def empty(*shape: int) -> Tensor:
            return torch.empty(n, *shape, dtype=dtype, device="meta")

        width = self.subject.structure.width
        inputs: dict[str, Any] = {
            "sample": empty(self.subject.channels, side, side),
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
