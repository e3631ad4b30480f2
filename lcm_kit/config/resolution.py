"""How large pictures are drawn, as configs say it: 512 is a square, [768, 512] a width and a height.

A square is the whole number of its side wherever it is kept or hashed, so `[512, 512]` and `512` are one.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import PlainValidator

LEAST, MOST = 8, 4096  # pixels of a side
STEP = 8  # pixels: a multiple of it


def _read(given: Any) -> int | tuple[int, int]:
    sides = list(given) if isinstance(given, list | tuple) else [given]
    whole = all(isinstance(side, int) and not isinstance(side, bool) for side in sides)
    if not whole or len(sides) != (2 if isinstance(given, list | tuple) else 1):
        raise ValueError(
            f"{given!r} is no size of pictures; give a whole number of pixels for squares, or [width, height]"
        )
    for side in sides:
        if not LEAST <= side <= MOST:
            raise ValueError(f"{side} pixels are out of range; give a number from {LEAST} to {MOST}")
        if side % STEP:
            raise ValueError(f"{side} is not a multiple of {STEP}; try {side // STEP * STEP}")
    return of_sides(sides[0], sides[-1])


def of_sides(width: int, height: int) -> int | tuple[int, int]:
    """The size of pictures of this width and height in pixels."""
    return width if width == height else (width, height)


Resolution = Annotated[int | tuple[int, int], PlainValidator(_read)]
"""Pixels of a side of squares, or (width, height); each a multiple of 8 from 8 to 4096."""


def width_height(resolution: int | tuple[int, int]) -> tuple[int, int]:
    """Its width and height in pixels."""
    return resolution if isinstance(resolution, tuple) else (resolution, resolution)


def height_width(resolution: int | tuple[int, int]) -> tuple[int, int]:
    """Its height and width in pixels: the order of tensors, and of what draws."""
    return width_height(resolution)[::-1]


def shown(resolution: int | tuple[int, int]) -> str:
    """`512 × 512`, with width first."""
    return " × ".join(map(str, width_height(resolution)))


def plain(resolution: int | tuple[int, int]) -> int | list[int]:
    """As JSON and YAML keep it: the side of a square, or [width, height]."""
    return list(resolution) if isinstance(resolution, tuple) else resolution


def read(kept: int | list[int]) -> int | tuple[int, int]:
    """What `plain` gave."""
    return kept if isinstance(kept, int) else of_sides(*kept)
