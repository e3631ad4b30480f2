"""A training step on torch's meta device: peft's, diffusers' and autograd's own code, without a number.

It gives FLOPs (a multiply-add counts as two) and the bytes that each pass holds at any batch size.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from lcm_kit.adapter.adapted_unet import AdaptedUNet
from lcm_kit.adapter.matching import FAKE
from lcm_kit.bases import memory
from lcm_kit.config.resolution import Resolution, height_width
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
    # forward and backward; or two forwards and one backward through both, as `MetaModel.rehearse`
    student: Pass
    forward: float  # FLOPs of the student's forwards alone; of the target's
    graph: Held  # what the first of them leaves for the backward


@dataclass(frozen=True)
class Pictures:
    """A VAE: its passes to latents and back, without gradient."""

    weights: int  # their number
    encode: Pass
    decode: Pass


@dataclass(frozen=True)
class Built:
    """A UNet on the meta device, its frozen weights in one dtype, and the parameters of its LoRA."""

    adapted: AdaptedUNet
    bare: list[Tensor]
    lora: list[Parameter]
    style: int  # numbers of the teacher's LoRA


@dataclass
class MetaModel:
    """The UNet of a base with its LoRA, and the teacher's, on the meta device; rehearsals are kept."""

    subject: BaseProfile
    adapter: Adapter
    style: Style | None = None
    text_rank: int | None = None  # of the text encoders' LoRA; None: captions are encoded beforehand
    fake: bool = False  # whether a fake score's LoRA is trained beside it
    _kept: dict[Any, Any] = field(default_factory=dict)
    _built: dict[torch.dtype, Built] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Build the text encoders, if they are trained."""
        self.text = Captions.build(self.subject, self.text_rank) if self.text_rank else None

    @cached_property
    def weights(self) -> Weights:
        """The numbers of weights, which are the same in every dtype."""
        built = next(iter(self._built.values()), None) or self.built(torch.float32)
        bare = built.bare
        held = [
            _base_of(m).weight
            for n, m in built.adapted.unet.named_modules()
            if ".base_layer" not in n and ".lora_" not in n and memory.quantizable(n, _base_of(m))
        ]
        return Weights(
            sum(p.numel() for p in bare),
            sum(w.numel() for w in held),
            sum(len(w) for w in held),
            max((w.numel() for w in held), default=0),
            max(p.numel() for p in bare),
            tuple(p.numel() for p in [*built.lora, *(self.text.lora if self.text else [])]),
            built.style,
        )

    def built(self, dtype: torch.dtype) -> Built:
        """The UNet in `dtype` as it trains, made once."""
        if dtype not in self._built:
            self._built[dtype] = self._build(dtype)
        return self._built[dtype]

    def _build(self, dtype: torch.dtype) -> Built:
        adapted = AdaptedUNet(empty_unet(self.subject.unet_config))
        bare = list(adapted.unet.parameters())
        for p in bare:
            p.data = p.data.to(dtype)
        with torch.device("meta"):
            put_on(adapted, self.style)
            style = sum(p.numel() for n, p in adapted.unet.named_parameters() if ".lora_" in n)
            lora = adapted.add_lora(self.adapter)
            if self.fake:
                adapted.add_lora(self.adapter, name=FAKE, on_teacher=True)
            adapted.make_fast()
        return Built(adapted, bare, lora, style)

    def rehearse(
        self,
        resolution: Resolution,
        dtype: torch.dtype,
        *,
        checkpointing: bool,
        pair: bool = False,
        fake: bool = False,
    ) -> DryRun:
        """The passes at `resolution` pixels with the frozen weights in `dtype`.

        `pair`: two forwards and one backward through both, as prior preservation has it, and distribution
        matching with a consistency loss. `fake`: the fake score in the student's place.
        """
        fake = fake and self._fake_differs
        key = (resolution, dtype, checkpointing, pair, fake)
        if key not in self._kept:
            unet = self.built(dtype).adapted.unet
            if checkpointing:
                unet.enable_gradient_checkpointing(checkpoint)
            else:
                unet.disable_gradient_checkpointing()
            with self.built(dtype).adapted.using(FAKE) if fake else nullcontext():
                forwards = 2 if pair else 1
                self._kept[key] = self._pass(resolution, dtype, forwards, checkpointing=checkpointing)
        return DryRun(self.drawing(resolution, dtype), *self._kept[key])

    @property
    def _fake_differs(self) -> bool:
        """Whether the fake score's passes differ from the student's: it has the teacher's style always."""
        return self.style is not None and not self.style.in_student

    def drawing(
        self, resolution: Resolution, dtype: torch.dtype, *, lora: bool = False, fake: bool = False
    ) -> Pass:
        """A forward without gradient: the teacher's, or with `lora` that of the UNet with what is trained,
        which is the student, or `fake`.
        """
        fake = fake and self._fake_differs
        key = (resolution, dtype, lora, fake)
        if key not in self._kept:
            adapted = self.built(dtype).adapted
            on = adapted.using(FAKE) if fake else nullcontext()
            with torch.no_grad(), on if lora else adapted.teacher():
                self._kept[key] = self._pass(resolution, dtype)[0]
        return self._kept[key]

    def pictures(self, resolution: Resolution, dtype: torch.dtype) -> Pictures:
        """The VAE's passes at `resolution` pixels, its weights and numbers in `dtype`."""
        if (resolution, dtype) not in self._kept:
            self._kept[resolution, dtype] = rehearse_vae(self.subject.vae_config, resolution, dtype)
        return self._kept[resolution, dtype]

    def _pass(
        self, resolution: Resolution, dtype: torch.dtype, forwards: int = 1, *, checkpointing: bool = False
    ) -> tuple[Pass, float, Held]:
        """One pass of n samples, FLOPs of its forwards alone, of one sample, and what the first leaves."""
        sides, built = self.subject.sides(resolution), self.built(dtype)
        unet, gradients = built.adapted.unet, built.adapted.gradient_bytes()
        ranks = [self.adapter.rank, *(self.style.ranks.values() if self.style else ())]
        dims = [d for p in built.bare for d in p.shape]
        n = a_prime([*sides, self.subject.tokens, *ranks, *dims, *gradients])
        inputs = self._inputs(n, sides, dtype)
        gradients |= {p.nbytes for p in (self.text.lora if self.text else ())}
        ledger = Ledger(n, frozenset(gradients))
        ledger.ignore([*unet.parameters(), inputs["sample"], inputs["encoder_hidden_states"]])
        if self.text:
            ledger.ignore(self.text.parameters())
        with ledger:
            outputs: list[Tensor] = []
            left: Held | None = None
            for _ in range(forwards):
                if self.text and torch.is_grad_enabled():
                    encoded = self.text.encode(n, checkpointing=checkpointing)
                    inputs["encoder_hidden_states"] = encoded.embeds.to(dtype)
                    if encoded.pooled is not None:
                        inputs["added_cond_kwargs"]["text_embeds"] = encoded.pooled.to(dtype)
                    del encoded
                with Kernels():
                    outputs.append(unet(**inputs).sample.float())
                left = left or ledger.held()
            forward = ledger.flops
            if torch.is_grad_enabled():
                loss = torch.stack([output.square().mean() for output in outputs]).sum()
                del outputs
                torch.autograd.backward(loss)
        for p in [*built.lora, *(self.text.lora if self.text else ())]:
            p.grad = None
        assert left is not None
        return Pass(ledger.flops / n, largest(ledger.moments)), forward / n, left

    def _inputs(self, n: int, sides: tuple[int, int], dtype: torch.dtype) -> dict[str, Any]:
        def empty(*shape: int) -> Tensor:
            return torch.empty(n, *shape, dtype=dtype, device="meta")

        width = self.subject.structure.width
        inputs: dict[str, Any] = {
            "sample": empty(self.subject.channels, *sides),
            "timestep": torch.zeros(n, dtype=torch.int64, device="meta"),
            "encoder_hidden_states": empty(self.subject.tokens, width),
        }
        if self.subject.pooled:
            inputs["added_cond_kwargs"] = {"text_embeds": empty(self.subject.pooled), "time_ids": empty(6)}
        return inputs


def _base_of(module: Any) -> Any:
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


@torch.no_grad()
def rehearse_vae(config: Mapping[str, Any], resolution: Resolution, dtype: torch.dtype) -> Pictures:
    """The VAE of this configuration on the meta device, with pictures of this size."""
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        vae = AutoencoderKL.from_config(dict(config)).eval()
    weights = list(vae.parameters())
    for p in weights:
        p.data = p.data.to(dtype)
    n = a_prime([*height_width(resolution), *(d for p in weights for d in p.shape)])
    pixels = torch.empty(n, 3, *height_width(resolution), dtype=dtype, device="meta")
    latents = vae.encode(pixels).latent_dist.mean
    passes = []
    for run in (lambda: vae.encode(pixels), lambda: vae.decode(latents)):
        ledger = Ledger(n)
        ledger.ignore([*weights, pixels, latents])
        with ledger, Kernels():
            run()
        passes.append(Pass(ledger.flops / n, largest(ledger.moments)))
    return Pictures(sum(p.numel() for p in weights), *passes)
