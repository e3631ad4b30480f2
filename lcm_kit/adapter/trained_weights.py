"""What can be trained on a UNet, a LoRA or its own weights, and weights that stand in others' places."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from lcm_kit.core.flat import alike
from lcm_kit.core.sharding import full_tensor, shard_like
from lcm_kit.errors import UserError


class Kind(Protocol):
    """What is trained: a LoRA, or the UNet's own weights."""

    def key(self, name: str) -> str | None:
        """The key under which the parameter of this name is saved; None: it is no part of this."""
        ...

    def off(self) -> AbstractContextManager[None]:
        """Within the block the base is as if this had never been trained, but for peft's flags."""
        ...


@dataclass(frozen=True)
class Lora:
    """A LoRA, which peft's flags turn on and off; its keys are peft's without the adapter's name."""

    name: str

    def key(self, name: str) -> str | None:
        """As `Kind.key`: of `to_q.lora_A.NAME.weight` `to_q.lora_A.weight`."""
        module, _, rest = name.rpartition(f".{self.name}.")
        return f"{module}.{rest}" if module.endswith((".lora_A", ".lora_B")) else None

    def off(self) -> AbstractContextManager[None]:
        """As `Kind.off`: the flags are all."""
        return nullcontext()


@dataclass(frozen=True)
class OwnWeights:
    """The UNet's own weights; a frozen copy of what they were takes their place where they are off."""

    parameters: Sequence[Parameter]
    base: Sequence[Tensor]

    def key(self, name: str) -> str | None:
        """As `Kind.key`: of the UNet's own the name before peft put a layer around it."""
        if ".lora_" in name or name.startswith("text_encoder"):
            return None
        return name.replace(".base_layer.", ".")

    @contextmanager
    def off(self) -> Iterator[None]:
        """As `Kind.off`; no backward that began outside must run inside, nor the reverse."""
        before = [p.requires_grad for p in self.parameters]
        with swapped(self.parameters, self.base):
            try:
                for p in self.parameters:
                    p.requires_grad_(False)
                yield
            finally:
                for p, trained in zip(self.parameters, before, strict=True):
                    p.requires_grad_(trained)


def cpu_copy(tensor: Tensor) -> Tensor:
    """A float32 copy on the CPU, whole where `tensor` is sharded over processes: all must call it then."""
    return full_tensor(tensor.detach()).float().cpu().clone().contiguous()


@torch.no_grad()
def fill(named: Mapping[str, Parameter], state: Mapping[str, Tensor]) -> None:
    """Copy `state` into the parameters `named`. Raises `UserError` unless keys and shapes are the same."""
    wrong = sorted(named.keys() ^ state.keys()) or [k for k, p in named.items() if p.shape != state[k].shape]
    if wrong:
        raise UserError(
            f"the weights do not fit this UNet: {len(wrong)} keys differ, such as {wrong[0]}; use the base "
            "and the rank that they were trained with"
        )
    for key, p in named.items():
        p.copy_(shard_like(state[key], p))


@contextmanager
def swapped(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> Iterator[None]:
    """Within the block `parameters` hold `values`; then, also after an exception, their own storage again.

    References are exchanged and nothing is copied: the parameters stay the same objects, and the versions
    that autograd counts on the live weights do not change. A backward through the live weights must not run
    inside the block.
    """
    live = [p.data for p in parameters]
    try:
        for p, value in zip(parameters, values, strict=True):
            p.data = value.data
        yield
    finally:
        for p, data in zip(parameters, live, strict=True):
            p.data = data


@torch.no_grad()
def update_ema(average: Sequence[Tensor], parameters: Sequence[Tensor], decay: float) -> None:
    """In place: average = decay * average + (1 - decay) * parameters; one kernel where each lie in one."""
    torch._foreach_lerp_(*alike(average, parameters), 1.0 - decay)
