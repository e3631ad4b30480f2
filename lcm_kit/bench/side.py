"""A side of the comparison: what a training step takes, its loss, and the optimizer step around it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lcm_kit.bases.condition import Condition
from lcm_kit.config.evaluation import Speed
from lcm_kit.core.flat import clip_grad_norm_
from lcm_kit.core.methods import Times

Part = Callable[[str], AbstractContextManager[None]]  # name of a part of the step -> what is open around it


def throughout(name: str) -> AbstractContextManager[None]:
    """A `Part` that opens nothing."""
    return nullcontext()


class Drawn(NamedTuple):
    """A step's randomness."""

    noise: Tensor  # [B, C, h, w]
    times: Times  # [B] each
    guidance: Tensor  # [B] guidance_scale


class Side(NamedTuple):
    """One of the two ways to train."""

    inputs: Callable[[int], tuple[Tensor, Any, Drawn]]  # step -> what the loss takes, on the device
    loss: Callable[..., Tensor]  # of these inputs, and a `Part` or none
    lora: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # of float16's gradients
    frozen: Callable[[], Iterable[Tensor]] = lambda: ()  # weights of the models, which are there anyway

    def step(self, at: int, part: Part = throughout) -> Tensor:
        """One optimizer step, its parts each inside `part(name)`; returns the loss."""
        with part("data"):
            inputs = self.inputs(at)
        loss = self.loss(*inputs, part)
        with part("backward"):
            self.scaler.scale(loss).backward()
        with part("optimizer"):
            self.scaler.unscale_(self.optimizer)
            clip_grad_norm_(self.lora, 1.0)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad()
        return loss.detach()


Build = Callable[[Speed, torch.device], Side]  # makes a side, ready to step


def scaler(device: torch.device, dtype: torch.dtype) -> torch.amp.GradScaler:
    """What keeps float16's gradients from vanishing; it does nothing in other precisions."""
    return torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)


def autocast(unet: Any, dtype: torch.dtype) -> Callable[..., Any]:
    """`unet`, called under autocast as accelerate does it where the weights are half."""

    def call(x: Tensor, t: Tensor, **conditions: Any) -> Any:
        with nullcontext() if dtype == torch.float32 else torch.autocast(x.device.type, dtype):
            return unet(x, t, **conditions)

    return call


def run(unet: Any, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
    """The UNet's raw output [B, C, h, w], of the precision of `condition`."""
    dtype = condition.embeds.dtype
    output: Tensor = autocast(unet, dtype)(x.to(dtype), t, **condition.kwargs()).sample
    return output
