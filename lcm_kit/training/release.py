"""When a run is over nothing holds its UNet any more: the next stage needs the memory.

Hooks, layers that know each other and, under autocast, accelerate's bound methods tie a UNet into rings,
which only Python's collector finds, some time later; until then 4.9 GiB of SDXL stay beside what is loaded
next.
"""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def free() -> None:
    """Give back what nothing refers to, to the GPU too: rings of Python's objects, CUDA's cached blocks."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def released(main: Callable[P, T]) -> Callable[P, T]:
    """A decorator of a recipe's `main`: it begins without what an earlier run left, and leaves nothing.

    Where it raises its models go with the exception, whose traceback holds them: the next run, stage or call
    begins by freeing them.
    """

    @functools.wraps(main)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        free()
        found = main(*args, **kwargs)
        free()
        return found

    return run
