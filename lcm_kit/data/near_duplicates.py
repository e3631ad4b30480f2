"""Pictures that show the same: resized, recompressed, brightened, cropped or mirrored copies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Thumbnail = NDArray[np.float32]  # [3, _SIDE, _SIDE], 0 to 255
_SIDE = 64


@dataclass(frozen=True)
class Copies:
    """Groups of places in the list that was given, each in ascending order."""

    alike: list[list[int]]
    mirrored: list[list[int]]


def thumbnail(image: Image.Image) -> Thumbnail:
    """The whole RGB picture, squeezed to a small square, float32 [3, 64, 64]."""
    small = image.resize((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    return np.asarray(small, dtype=np.float32).transpose(2, 0, 1)


def near_duplicates(pictures: Sequence[Thumbnail]) -> Copies:
    """Groups of pictures that show the same."""
    return Copies([], [])
