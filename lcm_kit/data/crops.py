"""Where a picture is cropped: in its middle, around its subject, or at a place of its own."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lcm_kit.data.buckets import Cut, cut
from lcm_kit.data.transforms import to_rgb
from lcm_kit.io.files import sha256_bytes

_SIDE = 96  # pixels of the longer side that a subject is looked for in
_EDGE = 0.5  # weight of the differences between neighbours beside those from the ground


def placed(crop: str, how: Cut, image: Image.Image, mask: Image.Image | None, content: str) -> Cut:
    """`how` with the crop where `crop` says: "", or `subject`, or `random K`, the K-th of a picture.

    `image`: upright, of any size and mode; `mask`: what counts in it, if that is known; `content`: its hash,
    which a random place is a function of.
    """
    if not crop:
        return how
    if crop.startswith("random"):
        left, top = (int(sha256_bytes(f"{content}/{crop}/{side}".encode())[:8], 16) / 16**8 for side in "xy")
        return cut(how.size, how.target, (left, top))
    return cut(how.size, how.target, _subject(how, _standing_out(image) if mask is None else _small(mask)))


def _small(mask: Image.Image) -> NDArray[np.float32]:
    return np.asarray(_reduced(mask), dtype=np.float32)


def _reduced(image: Image.Image) -> Image.Image:
    scale = min(1.0, _SIDE / max(image.size))
    size = tuple(max(1, round(side * scale)) for side in image.size)
    return image.resize((size[0], size[1]), Image.Resampling.BOX)


def _standing_out(image: Image.Image) -> NDArray[np.float32]:
    """How much each part of a picture differs from its ground, the middle colour of its border: [h, w].

    And how much from its neighbours, so that a subject is found on a ground of several colours.
    """
    factor = max(1, min(image.size) // _SIDE)
    small = image.reduce(factor) if factor > 1 and image.mode in ("RGB", "L") else image
    pixels = np.asarray(_reduced(to_rgb(small)), dtype=np.float32)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    from_ground = np.abs(pixels - np.median(border, axis=0)).sum(axis=2)
    edges = np.zeros_like(from_ground)
    edges[:, 1:] += np.abs(np.diff(pixels, axis=1)).sum(axis=2)
    edges[1:] += np.abs(np.diff(pixels, axis=0)).sum(axis=2)
    found: NDArray[np.float32] = from_ground + _EDGE * edges
    return found


def _subject(how: Cut, energy: NDArray[np.float32]) -> tuple[float, float]:
    """The place of the crop that has most of `energy` [h, w]; of several, the one nearest to the middle."""
    return (
        _best(energy.sum(axis=0), how.target[0] / how.resized[0]),
        _best(energy.sum(axis=1), how.target[1] / how.resized[1]),
    )


def _best(profile: NDArray[Any], share: float) -> float:
    """Where along a side a window of `share` of it holds most of `profile`: 0, its beginning, to 1."""
    places = np.linspace(0, 1, 65)
    spare = (1 - share) * len(profile)
    if spare < 1e-6 or profile.sum() <= 0:
        return 0.5
    total = np.concatenate([[0.0], np.cumsum(profile, dtype=np.float64)])
    begins = places * spare
    held = np.interp(begins + share * len(profile), np.arange(len(total)), total)
    held -= np.interp(begins, np.arange(len(total)), total)
    best = np.flatnonzero(held >= held.max() * (1 - 1e-6))
    runs = np.split(best, np.flatnonzero(np.diff(best) > 1) + 1)
    # the middle of all windows that hold as much: a small subject lies in the middle of the crop
    return min((float(places[run].mean()) for run in runs), key=lambda place: abs(place - 0.5))
