"""When a run is over, well or not, nothing holds its UNet any more: the next stage needs the memory.

In half precision accelerate puts a bound method of the UNet on the UNet itself. Such a ring is found by
Python's collector alone, some time later; until then 4.9 GiB of SDXL stay beside what the next stage loads.
"""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")

_OWN_METHODS = ("forward", "_original_forward")  # that accelerate puts on a model
_prepared: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()


def prepared(model: Any) -> Any:
    """`model`, which accelerate has prepared for a run that is `released`."""
    _prepared.add(model)
    return model


def released(main: Callable[P, T]) -> Callable[P, T]:
    """A decorator of a recipe's `main`: when it returns its models are gone, and CUDA's memory with them.

    When it raises they go with the exception, whose traceback holds them: no collector is needed.
    """

    @functools.wraps(main)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return main(*args, **kwargs)
        finally:
            for model in list(_prepared):
                for name in _OWN_METHODS:
                    vars(model).pop(name, None)
            _prepared.clear()
            free()

    return run


def free() -> None:
    """Give back what nothing refers to, to the GPU too: rings of Python's objects, CUDA's cached blocks."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
