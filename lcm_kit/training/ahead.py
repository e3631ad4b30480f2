"""What a step needs from the host, made while the GPU computes the step before."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


class Ahead(Generic[T]):
    """What `make(step)` gives, one step after the other: a batch and its randomness, sent to the device.

    `make` is a function of the step alone, so that nothing hangs on when it is called. On a GPU `prepare`
    calls it for the next step as soon as this one was given to the GPU, while the host would only wait. On a
    CPU, which has nothing to wait for, it is called when it is asked for. There is no thread: one would take
    the interpreter from the launches that the GPU waits for.
    """

    def __init__(self, make: Callable[[int], T], steps: int, device: torch.device) -> None:
        """For the steps below `steps`, on `device`."""
        self._make, self._steps, self._early = make, steps, device.type == "cuda"
        self._ready: tuple[int, T] | None = None

    def at(self, step: int) -> T:
        """What `step` needs."""
        ready, self._ready = self._ready, None
        return ready[1] if ready and ready[0] == step else self._make(step)

    def prepare(self, step: int) -> None:
        """Make what `step` needs, if it is early enough.

        An exception is none of the step that runs, which is to be logged and saved: `at` tries again and
        raises it in its place.
        """
        if self._early and step < self._steps:
            with suppress(Exception):
                self._ready = step, self._make(step)
