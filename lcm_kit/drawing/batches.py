"""How many pictures at once: as many as asked or as are sensible, and half as many where memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch

from lcm_kit import console
from lcm_kit.bases.out_of_memory import free, out_of_memory
from lcm_kit.errors import UserError

T = TypeVar("T")
R = TypeVar("R")
AUTO: Literal["auto"] = "auto"
AfterStep = Callable[[Sequence[int], int, int], None]
"""Called after each step of drawing: which pictures of a batch have taken how many of how many steps."""
_SIDE = 512  # pixels of the pictures that these are numbers of
_AT_ONCE = {"cpu": 4, "cuda": 32}  # a CPU gains little by more, and a process that takes too much is killed
_MOST = 32


def at_once(batch_size: int | Literal["auto"], height: int, width: int, device: str) -> int:
    """Pictures of so many pixels to begin with: what was asked, or with "auto" what the device serves well.

    With "auto" 32 of 512 x 512 on a GPU, 4 on a CPU, and by their pixels fewer or more, 1 to 32.
    """
    if batch_size != AUTO:
        return batch_size
    few = _AT_ONCE["cpu" if torch.device(device).type == "cpu" else "cuda"]
    return min(_MOST, max(1, few * _SIDE**2 // (height * width)))


@dataclass
class Batches:
    """Splits work into batches of `size`, which is halved for good, and that is said, if memory runs out."""

    size: int
    doing: str  # as "drawing a picture of 512 x 512 pixels": what the sentences name
    instead: str  # what to do where not even one fits

    @classmethod
    def of_pictures(cls, batch_size: int | Literal["auto"], height: int, width: int, device: str) -> Batches:
        """For pictures that are drawn, of so many pixels; `batch_size` as in `at_once`."""
        return cls(
            at_once(batch_size, height, width, device),
            f"drawing a picture of {width} x {height} pixels",
            "draw smaller ones, decode them in tiles (tiling), or stop what else uses this device's memory",
        )

    def run(self, items: Sequence[T], work: Callable[[int, Sequence[T]], R], first: int = 0) -> Iterator[R]:
        """What `work` makes of the items, batch after batch: it is given the place of a batch's first item,
        counted from `first`, and the batch.

        A batch whose memory runs out is begun again by halves, so `work` must leave nothing behind where it
        raises. Raises `UserError` if one item alone is too much.
        """
        at = 0
        while at < len(items):
            part = items[at : at + self.size]
            try:
                done = work(first + at, part)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                said = str(error).partition(". ")[0]
            else:
                yield done
                at += len(part)
                continue
            self._halve(len(part), said)  # out of the handler: the exception holds what the passes held

    def _halve(self, tried: int, said: str) -> None:
        free()
        if tried == 1:
            raise UserError(f"memory ran out while {self.doing}, one at a time ({said}); {self.instead}")
        self.size = tried // 2
        console.say(
            f"memory ran out with {tried} at once while {self.doing}; going on with {self.size}", err=True
        )
