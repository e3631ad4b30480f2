"""Aspect-ratio buckets: the shapes that pictures are cut to, about equal in area, and how each is cut.

A picture is never stretched: it is scaled so that it just covers its shape, and what lies outside is cut off.
Sizes are (width, height) in pixels, as Pillow has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log
from typing import NamedTuple, Protocol

from lcm_kit.bases.condition import Framing
from lcm_kit.config.schema import Data
from lcm_kit.errors import UserError
from lcm_kit.families import Family

Size = tuple[int, int]
_USUAL = 256  # pixels: bases of smaller pictures halve them less often
_AREA = 0.1  # share of the square's area by which a bucket's may differ


class Cut(NamedTuple):
    """How a picture is brought to its shape: scaled to `resized`, then cropped."""

    size: Size  # of the upright picture as it came
    resized: Size  # covers `target`
    corner: tuple[int, int]  # left, top of the crop within `resized`
    target: Size

    @property
    def scale(self) -> float:
        """Times as long as in the picture: above 1 it is scaled up."""
        return max(new / old for new, old in zip(self.resized, self.size, strict=True))

    @property
    def lost(self) -> float:
        """Share of the picture that is cut away."""
        return 1 - self.target[0] * self.target[1] / (self.resized[0] * self.resized[1])

    def framing(self, mirrored: bool = False) -> Framing:
        """What SDXL is told of it. The corner is that of the picture as it is seen: mirrored first."""
        (width, height), (left, top) = self.size, self.corner
        if mirrored:
            left = self.resized[0] - self.target[0] - left
        return Framing((height, width), (top, left), self.target[::-1])


def cut(size: Size, target: Size, at: tuple[float, float] = (0.5, 0.5)) -> Cut:
    """How a picture of `size` covers `target`; `at`: the place of the crop, 0 (left, top) to 1.

    One side becomes that of the target; the other is rounded to whole pixels, and by no more is a picture
    ever stretched.
    """
    by = max(range(2), key=lambda side: target[side] / size[side])
    width, height = (
        max(new, round(old * target[by] / size[by])) for old, new in zip(size, target, strict=True)
    )
    left, top = int((width - target[0]) * at[0]), int((height - target[1]) * at[1])
    return Cut(size, (width, height), (left, top), target)


def buckets(resolution: int, multiple: int, longest: float) -> list[Size]:
    """Every (width, height) of multiples whose area is within 10% of the square's: one for each width.

    In order of width; none is more than `longest` times as long as wide, and the square is among them.
    """
    found, area = {(resolution, resolution)}, resolution**2
    for short in range(multiple, resolution, multiple):
        long = round(area / short / multiple) * multiple
        if _fits((short, long), longest) and abs(short * long / area - 1) <= _AREA:
            found |= {(short, long), (long, short)}
    return sorted(found)


def _fits(shape: Size, longest: float) -> bool:
    return max(shape) <= longest * min(shape)


def nearest(size: Size, shapes: Sequence[Size]) -> Size:
    """The shape whose ratio of the sides is nearest to that of `size`, by their logarithms.

    Of two that are equally near, the one that keeps more of the picture.
    """
    ratio = log(size[0] / size[1])

    def far(shape: Size) -> tuple[float, float]:
        return round(abs(log(shape[0] / shape[1]) - ratio), 9), cut(size, shape).lost

    return min(shapes, key=far)


class Shaped(Protocol):
    """What shapes depend on of a base: `BaseInfo` has it, and what a plan knows of one."""

    @property
    def family(self) -> Family:
        """Knows the shapes that its bases were trained on."""

    @property
    def multiple(self) -> int:
        """Pixels that both sides are best a multiple of."""

    @property
    def factor(self) -> int:
        """Pixels along one side of a latent."""


@dataclass(frozen=True)
class Shaper:
    """Says which shape a picture is cut to."""

    shapes: tuple[Size, ...]
    multiple: int  # of the sides of a small picture's own shape
    longest: float  # times as long as wide that this is at most
    small: str  # `data.shapes.small`

    @classmethod
    def of(cls, base: Shaped, data: Data) -> Shaper:
        """What `data.shapes` asks for on this base. Raises `UserError` for a multiple that it cannot have."""
        asked = data.shapes
        own = base.family.shapes.get(data.resolution, ()) if asked.multiple is None else ()
        found = cls._asked(data, base.multiple, [each for each in own if _fits(each, asked.longest)])
        if found.multiple % base.factor:
            raise UserError(
                f"data.shapes.multiple {found.multiple} is not a multiple of {base.factor}, as the base's "
                "VAE needs"
            )
        return found

    @classmethod
    def usual(cls, data: Data) -> Shaper:
        """What `data.shapes` asks for where the base is not known: multiples of 64, of small ones 16."""
        return cls._asked(data, 64 if data.resolution >= _USUAL else 16)

    @classmethod
    def _asked(cls, data: Data, multiple: int, own: Sequence[Size] = ()) -> Shaper:
        asked, side = data.shapes, data.resolution
        multiple = asked.multiple or min(multiple, side)
        if asked.kind == "square":
            return cls(((side, side),), multiple, 1.0, asked.small)
        found = sorted(own) or buckets(side, multiple, asked.longest)
        return cls(tuple(found), multiple, asked.longest, asked.small)

    @property
    def largest(self) -> Size:
        """The shape of the most pixels, of several the one nearest to a square."""
        return max(self.shapes, key=lambda shape: (shape[0] * shape[1], min(shape)))

    def target(self, size: Size) -> Size:
        """The shape of a picture of `size`. Raises `UserError` with the reason if it is left out as small."""
        target, short = nearest(size, self.shapes), min(size)
        if self.small == "upscale" or all(own >= side for own, side in zip(size, target, strict=True)):
            return target
        few = f"{size[0]} x {size[1]} pixels are fewer than the {target[0]} x {target[1]} that are trained at"
        if self.small == "drop":
            raise UserError(f"{few}, and data.shapes.small is drop")
        width, height = (
            int(min(side, self.longest * short)) // self.multiple * self.multiple for side in size
        )
        if not width or not height:
            raise UserError(f"{few}, and no {self.multiple} on each side; bring a larger one")
        return width, height
