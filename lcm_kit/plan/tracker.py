"""Counts the bytes that a computation holds, on torch's meta device: real code, nothing computed.

What is counted is what an allocator is asked for: every storage from the operator that makes it to its last
reference, autograd's among them. Kernels' own workspaces are not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


@dataclass(frozen=True)
class Held:
    """Bytes at one moment: a sample's share of what grows with the batch, what does not, and gradients."""

    sample: float
    fixed: float = 0.0
    gradients: float = 0.0

    def at(self, batch: int, *, gradients: bool = True) -> float:
        """Bytes with `batch` samples a forward."""
        return self.sample * batch + self.fixed + self.gradients * gradients


def largest(moments: Iterable[Held]) -> tuple[Held, ...]:
    """Those moments that no other one exceeds in every respect: the peak at any batch is one of them."""
    ordered = sorted(set(moments), key=lambda m: (m.sample, m.fixed + m.gradients, m.fixed), reverse=True)
    kept: list[Held] = []
    for moment in ordered:
        if not any(
            k.fixed >= moment.fixed and k.fixed + k.gradients >= moment.fixed + moment.gradients for k in kept
        ):
            kept.append(moment)
    return tuple(kept)


@dataclass
class Ledger(TorchDispatchMode):
    """Within the block every new storage is booked: by sample if its bytes have the factor `batch`.

    `batch` is a prime that divides no width, so that whatever it divides is a sample's; `gradients` are the
    sizes in bytes of the trained weights.
    """

    batch: int
    gradients: frozenset[int] = frozenset()
    moments: list[Held] = field(default_factory=list)
    flops: int = 0  # a multiply-add counts as two
    _live: dict[int, tuple[int, Any]] = field(default_factory=dict)
    _sums: list[int] = field(default_factory=lambda: [0, 0, 0])

    def __post_init__(self) -> None:
        """What a dispatch mode needs."""
        super().__init__()

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Leave out what is counted elsewhere: weights, inputs."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._live[storage._cdata] = (-1, storage)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operator, book what it made."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        # not by FlopCounterMode: what it hangs on modules keeps recomputed activations alive
        if count := flop_registry.get(func._overloadpacket):
            self.flops += count(*args, **kwargs, out_val=out)
        for item in out if isinstance(out, tuple | list) else (out,):
            if isinstance(item, Tensor):
                self._book(item)
        return out

    def _book(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._live or not size:
            return
        kind = self._kind(size)
        self._live[key] = (kind, weakref.ref(storage, lambda _: self._free(key, size)))
        self._sums[kind] += size
        self.moments.append(self.held())

    def held(self) -> Held:
        """What is there now."""
        return Held(self._sums[0] / self.batch, self._sums[1], self._sums[2])

    def _kind(self, size: int) -> int:
        """0: a sample's, 1: fixed, 2: a gradient."""
        if size % self.batch == 0:
            return 0
        return 2 if size in self.gradients else 1

    def _free(self, key: int, size: int) -> None:
        kind, _ = self._live.pop(key)
        self._sums[kind] -= size


def a_prime(numbers: Iterable[int]) -> int:
    """A prime that divides none of `numbers`."""
    held = {n for n in numbers if n}
    return next(p for p in (13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59) if all(n % p for n in held))


class Kernels(TorchFunctionMode):
    """Within the block attention never holds its matrix, as torch's fused kernels do not.

    (`scaled_dot_product_attention` of the meta device does.)
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Put the fused attention in its place."""
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def checkpoint(block: Any, *args: Any) -> Any:
    """Checkpointing of `block` as diffusers does it; the backward repeats it under `Kernels` again."""
    from torch.utils.checkpoint import checkpoint as recompute

    def run(*inputs: Any) -> Any:
        with Kernels():
            return block(*inputs)

    return recompute(run, *args, use_reentrant=False)


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    fused: Callable[..., Any] = torch.ops.aten._scaled_dot_product_efficient_attention
    return fused(query, key, value, None, torch.is_grad_enabled())[0]
