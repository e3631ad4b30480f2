"""Pictures that show the same: resized, recompressed, brightened, cropped or mirrored copies.

Two steps. A perceptual hash (pHash: the lowest cosines of the grey picture, each above or below their median)
proposes pairs; a comparison in colour of the two pictures, laid over one another, decides. The hash alone
cannot: of pictures in one layout, as a brand's are, two that differ in colour only have the same hash.

Cropping moves everything, and with it the hash. So each picture is hashed whole and as windows of it that a
copy may have been cropped to; the cosines of a window are those of the whole, squeezed onto it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lcm_kit.data.hash_index import HashIndex, packed

Array = NDArray[np.float32]
Thumbnail = NDArray[np.uint8]  # [3, _SIDE, _SIDE]
Groups = NDArray[np.intp]  # of each place the number of its group
Window = tuple[float, float, float, float]  # left, top, right, bottom: 0 to 1 of the picture

_SIDE = 64  # pixels of a thumbnail
_HASHED = 8  # cosines a direction in the hash
_COMPARED = 24  # cosines a direction that are compared in colour
_FAR = 12  # bits: pairs no further apart are compared
_SAME = 0.97  # correlation from which two pictures are one
_MARGINS = (0.0, 0.05, 0.1)  # of a side that a copy may have been cropped by
_HOPELESS = 0.9  # correlation of the coarse comparison below which no fitting helps
_ROUNDS = 4  # moves of a window a step
_WAYS = (  # left, top, right, bottom: one side; all, as a shift; all, as a zoom
    (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (1, 0, 1, 0), (0, 1, 0, 1), (1, 1, -1, -1),
)  # fmt: skip
_STEPS = (0.025, 0.0125, 0.00625)  # in which a window is fitted
_WHOLE: Window = (0.0, 0.0, 1.0, 1.0)
_LUMINANCE = np.array([0.299, 0.587, 0.114], dtype=np.float32)


@dataclass(frozen=True)
class Copies:
    """Groups of places in the list that was given, each in ascending order."""

    alike: list[tuple[int, ...]]
    mirrored: list[tuple[int, ...]]


def thumbnail(image: Image.Image) -> Thumbnail:
    """The whole RGB picture, squeezed to a small square, [3, 64, 64]: 12 kB, for there may be many."""
    small = image.resize((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    return np.asarray(small).transpose(2, 0, 1)


def _real(picture: Thumbnail) -> Array:
    return picture.astype(np.float32)


@lru_cache(maxsize=4096)
def cosines(low: float, high: float, count: int) -> Array:
    """The first `count` cosines (DCT-II, orthonormal) over the stretch [low, high] of a side: [count, 64].

    On the whole side, 0 to 1, this is the usual matrix of the transform.
    """
    edges = np.linspace(0, 1, _SIDE + 1)
    inside = (np.minimum(edges[1:], high) - np.maximum(edges[:-1], low)).clip(0) * _SIDE
    place = ((edges[1:] + edges[:-1]) / 2 - low) / (high - low)
    waves = np.cos(np.pi * np.arange(count)[:, None] * place) * inside
    scale = np.sqrt(np.where(np.arange(count) == 0, 1, 2) / (_SIDE * (high - low)))
    return (waves * scale[:, None]).astype(np.float32)


def hashes(picture: Thumbnail, margins: tuple[float, ...] = (0.0,)) -> Array:
    """The perceptual hash, +1 and -1, of every window with these margins: [windows, 63], as in `_windows`.

    A bit says whether a cosine of the luminance is above their median; the constant is left out.
    """
    grey = np.tensordot(_LUMINANCE, _real(picture), axes=1)
    stretches = _stretches(margins)
    found = np.tensordot(stretches @ grey, stretches, axes=([2], [2]))  # [a, k, b, l]
    flat = found.transpose(0, 2, 1, 3).reshape(-1, _HASHED * _HASHED)[:, 1:]
    return np.where(flat > np.median(flat, axis=1, keepdims=True), 1, -1).astype(np.float32)


@lru_cache
def _stretches(margins: tuple[float, ...]) -> Array:
    """Cosines of every stretch of a side with these margins: [margins squared, 8, 64]."""
    return np.stack([cosines(low, 1 - high, _HASHED) for low, high in product(margins, repeat=2)])


def _windows(margins: Sequence[float]) -> list[Window]:
    pairs = list(product(margins, repeat=2))
    return [(left, top, 1 - right, 1 - bottom) for (top, bottom), (left, right) in product(pairs, pairs)]


def outline(picture: Thumbnail, window: Window = _WHOLE) -> Array:
    """What is compared of a window: its lowest cosines in colour, without common brightness, of length 1."""
    left, top, right, bottom = window
    found = cosines(top, bottom, _COMPARED) @ _real(picture) @ cosines(left, right, _COMPARED).T
    return _normal(np.asarray(found[None], dtype=np.float32))[0]


def _normal(found: Array) -> Array:
    """Cosines [windows, 3, rows, columns] as vectors [windows, n] whose products are correlations."""
    found[:, :, 0, 0] -= found[:, :, 0, 0].mean(axis=1, keepdims=True)
    flat = found.reshape(len(found), -1)
    return flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-6)


def coarse(picture: Thumbnail, margins: tuple[float, ...] = (0.0,)) -> Array:
    """`outline` by the cosines of the hash alone, of every window with these margins: [windows, 192]."""
    stretches = _stretches(margins)
    down = np.tensordot(stretches, _real(picture), axes=([2], [1]))  # [a, k, channel, x]
    found: Array = np.tensordot(down, stretches, axes=([3], [2]))  # [a, k, channel, b, l]
    return _normal(found.transpose(0, 3, 2, 1, 4).reshape(-1, 3, _HASHED, _HASHED))


def _fitted(copy: Array, picture: Thumbnail, window: Window) -> float:
    best = float(copy @ outline(picture, window))
    for step in _STEPS:
        for _ in range(_ROUNDS):
            tried = {moved: float(copy @ outline(picture, moved)) for moved in _around(window, step)}
            nearest = max(tried, key=lambda moved: tried[moved])
            if tried[nearest] <= best:
                break
            best, window = tried[nearest], nearest
    return best


def _around(window: Window, step: float) -> list[Window]:
    """Windows with a side moved, or shifted or zoomed as a whole, by `step`."""
    found = []
    for way, sign in product(_WAYS, (step, -step)):
        left, top, right, bottom = (
            min(max(round(side + sign * move, 5), 0.0), 1.0) for side, move in zip(window, way, strict=True)
        )
        found.append((left, top, right, bottom))
    return found


def near_duplicates(pictures: Sequence[Thumbnail]) -> Copies:
    """Which of the pictures show the same, as they are or mirrored. A pair that is alike is not mirrored.

    The index (`hash_index`) spares comparing all with all; of pictures that all have nearly the same hash it
    spares nothing. It and `coarse` take 1 kB a picture and direction.
    """
    count = len(pictures)
    proposals = _Proposals(pictures)
    alike, mirrored = np.arange(count), np.arange(count)  # the group that each is in, by any number
    turned: list[tuple[int, int, int]] = []  # once all that are alike are known
    for place in range(count):
        for copy, window in proposals.of(place, alike):
            if copy >= count:
                turned.append((place, copy, window))
            elif alike[place] != alike[copy] and proposals.same(place, copy, window):
                _join(alike, place, copy)
    for place, copy, window in turned:
        groups = (alike, mirrored)
        apart = all(group[place] != group[copy - count] for group in groups)
        if apart and proposals.same(place, copy, window):
            _join(mirrored, place, copy - count)
    return Copies(_several(alike), _several(mirrored))


class _Proposals:
    """Pairs that are worth fitting: a picture, a copy (as it is, or mirrored: `count` further), a window."""

    def __init__(self, pictures: Sequence[Thumbnail]) -> None:
        self._copies = [*pictures, *(picture[:, :, ::-1] for picture in pictures)]
        self._count = len(pictures)
        hashed = np.empty(len(self._copies), np.uint64)
        self._coarse = np.empty((len(self._copies), 3 * _HASHED * _HASHED), np.float32)
        for place, copy in enumerate(self._copies):
            hashed[place], self._coarse[place] = packed(hashes(copy))[0], coarse(copy)[0]
        self._index = HashIndex(hashed, _FAR)

    def of(self, place: int, known: Groups) -> list[tuple[int, int]]:
        """Copies whose hash is near that of a window, each with the window that fits best by few cosines.

        Without those that are in the picture's group already. One after the other: of threads, each call of
        numpy is too short for another to gain by it, and they take half as long again.
        """
        picture = self._copies[place]
        near = self._index.near_any(packed(hashes(picture, _MARGINS)))
        near = near[known[near % self._count] != known[place]]
        if not len(near):
            return []
        fits = coarse(picture, _MARGINS) @ self._coarse[near].T
        hopeful = np.flatnonzero(fits.max(axis=0) >= _HOPELESS)
        return list(zip(near[hopeful].tolist(), fits[:, hopeful].argmax(axis=0).tolist(), strict=True))

    def same(self, place: int, copy: int, window: int) -> bool:
        """Whether the copy shows what the picture does, in a window that is fitted in ever smaller steps."""
        fit = _fitted(outline(self._copies[copy]), self._copies[place], _windows(_MARGINS)[window])
        return fit >= _SAME


def _join(groups: Groups, one: int, other: int) -> None:
    groups[groups == groups[other]] = groups[one]


def _several(groups: Groups) -> list[tuple[int, ...]]:
    """The groups of more than one, each in ascending order."""
    order = np.argsort(groups, kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(groups[order])) + 1)
    return sorted(tuple(part.tolist()) for part in parts if len(part) > 1)
