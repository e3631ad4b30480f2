"""When a run is over nothing holds its UNet any more: the next stage needs the memory.

Hooks, layers that know each other and, under autocast, accelerate's bound methods tie a UNet into rings,
which only Python's collector finds, some time later; until then 4.9 GiB of SDXL stay beside what is loaded
next.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from lcm_kit.bases.out_of_memory import free

P = ParamSpec("P")
T = TypeVar("T")


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
