"""Transformer blocks compiled once for all of their kind, within a limit of time, or not at all.

A UNet compiled as a whole had not made its tenth step after 170 s (SD1.5, one H100, docs/benchmarks.md). Its
transformer blocks are of four kinds (by width and number of tokens), and each is seen in three ways: by the
teacher (LoRA off), by the target (no gradient) and by the student. So SD1.5 has twelve pieces of code. torch
keeps them on disk, so that a run which is continued finds them there.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from lcm_kit import console
from lcm_kit.config import schema
from lcm_kit.config.evaluation import Speed
from lcm_kit.errors import UserError

SECONDS = 45.0  # that compiling may take in all; a piece that has begun is finished
LEAST_STEPS = 1000  # of a run that auto compiles for: fewer gain less than compiling costs
_GRAPHS = 64  # variants of one function that dynamo may keep; it falls back to no compiling after 8


def compile_blocks(
    unet: Any,
    config: schema.Training | Speed,
    say: Callable[[str], None] = console.say,
    *,
    backend: Any = "inductor",
) -> None:
    """Compile the repeated blocks of `unet` in place, where `config.memory.compile` asks for it.

    Call it after the adapters are on. A block is compiled when it is first called in a way that is new: with
    another shape, with or without gradient or LoRA. After `SECONDS` of that, and where the compiler fails,
    what is not compiled by then runs as it is, and `say` is told. "auto" compiles on a GPU that can, for runs
    of `LEAST_STEPS` or more. Raises `UserError` if it is asked for and there is no compiler.
    """
    device = next(unet.parameters()).device
    if not wants(config, device):
        return
    if backend == "inductor":
        require_compiler(device, "memory.compile")
    allow_graphs()
    blocks = [module for module in unet.modules() if type(module).__name__ in unet._repeated_blocks]
    limit = _Limit(say)
    for block in blocks:
        layer = next((module for module in block.modules() if hasattr(module, "_disable_adapters")), None)
        kind: Any = type(block)
        block.forward = partial(limit.forward, block, layer, _code(kind, backend))


def require_compiler(device: torch.device, key: str) -> None:
    """Raise `UserError` if what `key` asks for cannot be compiled for `device`."""
    if missing := _missing(device):
        raise UserError(f"{key} needs {missing}, or set it to false")


def allow_graphs() -> None:
    """Let dynamo keep as many variants of a function as adapters, guidance and shapes make."""
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(_GRAPHS, torch._dynamo.config.recompile_limit)


def wants(config: schema.Training | Speed, device: torch.device) -> bool:
    """Whether `config` asks for it on `device`."""
    if config.memory.compile == "auto":
        return device.type == "cuda" and config.steps >= LEAST_STEPS and _missing(device) is None
    return config.memory.compile


@cache
def _code(kind: Any, backend: Any) -> Any:
    """One compiled function for all blocks of a class, so that they share what was compiled."""
    return torch.compile(kind.forward, dynamic=False, backend=backend)


class _Limit:
    """Runs blocks compiled, until compiling has taken too long: then those that are compiled, no other."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say, self.seconds, self.stopped = say, 0.0, False
        self.known: set[Any] = set()

    def forward(self, block: Any, layer: Any, code: Any, *args: Any, **kwargs: Any) -> Any:
        """`block(*args, **kwargs)`, whose compiled forward is `code`; `layer`: one with its LoRAs' flags."""
        way = _way(block, layer, args, kwargs)
        if way in self.known:
            return code(block, *args, **kwargs)
        if self.stopped:
            return type(block).forward(block, *args, **kwargs)
        begun = time.perf_counter()
        try:
            made = code(block, *args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:
            why = " ".join(str(error).split("\n")[:2])  # the backend's name, and what it raised
            self._stop(f"memory.compile does not work here ({why})")
            return type(block).forward(block, *args, **kwargs)
        self.known.add(way)
        self.seconds += time.perf_counter() - begun
        if self.seconds > SECONDS:
            self._stop(f"compiling took {self.seconds:.0f} s for {len(self.known)} kinds of passes")
        return made

    def _stop(self, why: str) -> None:
        self.stopped = True
        self.say(f"{why}; going on with what is not compiled by now as it is, which changes no result")


def _way(block: Any, layer: Any, args: Any, kwargs: Any) -> tuple[Any, ...]:
    """What decides which code a call needs: gradient, shapes, and which LoRAs are on."""
    shapes = tuple(tuple(item.shape) for item in (*args, *kwargs.values()) if isinstance(item, Tensor))
    on = () if layer is None or layer._disable_adapters else tuple(layer._active_adapter)
    return type(block), torch.is_grad_enabled(), shapes, on


def _missing(device: torch.device) -> str | None:
    """What compiling for `device` needs and is not there, and how to get it."""
    named = os.environ.get("CXX" if device.type == "cpu" else "CC")
    if not any(map(shutil.which, [named] if named else ["g++", "gcc", "clang++", "clang"])):
        return "a C++ compiler, and there is none; install g++"
    from torch.utils._triton import has_triton

    if device.type == "cuda" and not has_triton():
        return "Triton for this GPU; install triton"
    return None
