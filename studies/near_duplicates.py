"""How the search for near duplicates grows with the number of pictures.

    OMP_NUM_THREADS=1 python -m studies.near_duplicates [COUNT ...]

Thumbnails of random fields whose spectrum falls as that of photographs; one in ten is a copy of another:
brighter, cropped by 0 to 10% of a side, or mirrored. Of each count: seconds of the clock and of processors
(`lcm_kit.data.near_duplicates`: hashes, index, comparison), the growth since the count before as an exponent
(2: all with all), peak memory, what was found. The figures stand in docs/benchmarks.md.
"""

from __future__ import annotations

import math
import resource
import sys
import time

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lcm_kit.data.near_duplicates import Thumbnail, near_duplicates, thumbnail

_SIDE = 64
_SLOPE = 1.2  # amplitude falls by frequency to this power: about 1 in photographs
_COLOURS = np.array([[1, 0.4, 0.2], [1, 0, -0.3], [1, -0.4, 0.1]])  # mostly grey, as photographs are


def made(count: int, seed: int = 0) -> tuple[list[Thumbnail], list[tuple[int, int]]]:
    """Thumbnails, and which of them are (copy, picture): every tenth."""
    random = np.random.default_rng(seed)
    pictures: list[Thumbnail] = []
    copies = []
    for place in range(count):
        if place % 10 == 9:
            of = int(random.integers(place))
            pictures.append(_copy(pictures[of], random))
            copies.append((place, of))
        else:
            pictures.append(_field(random))
    return pictures, copies


def _field(random: np.random.Generator) -> Thumbnail:
    down, across = np.meshgrid(np.fft.fftfreq(_SIDE), np.fft.rfftfreq(_SIDE), indexing="ij")
    frequency = np.hypot(down, across)
    frequency[0, 0] = 1
    parts = random.normal(size=(2, 3, *frequency.shape)) / frequency**_SLOPE
    field = np.fft.irfft2(parts[0] + 1j * parts[1], s=(_SIDE, _SIDE))
    field /= field.std(axis=(1, 2), keepdims=True)
    picture: NDArray[np.float64] = np.tensordot(_COLOURS, field, axes=1) * 40 + 128
    return picture.clip(0, 255).astype(np.uint8)


def _copy(picture: Thumbnail, random: np.random.Generator) -> Thumbnail:
    image = Image.fromarray(np.ascontiguousarray(picture.transpose(1, 2, 0)))
    kind = random.integers(3)
    if kind == 0:
        return np.clip(picture * 1.1, 0, 255).astype(np.uint8)
    if kind == 1:
        left, top, right, bottom = random.integers(0, 7, size=4)
        return thumbnail(image.crop((left, top, _SIDE - right, _SIDE - bottom)))
    return picture[:, :, ::-1].copy()


def main() -> None:
    """Print a line for each count."""
    counts = [int(text) for text in sys.argv[1:]] or [1000, 10_000, 100_000]
    print("pictures  clock s  processor s  exponent  peak GiB  alike  mirrored  copies made")
    before: tuple[int, float] | None = None
    for count in counts:
        pictures, copies = made(count)
        clock, processor = time.perf_counter(), time.process_time()
        found = near_duplicates(pictures)
        clock, processor = time.perf_counter() - clock, time.process_time() - processor
        growth = math.log(processor / before[1]) / math.log(count / before[0]) if before else math.nan
        before = count, processor
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        alike, mirrored = (sum(map(len, groups)) for groups in (found.alike, found.mirrored))
        print(
            f"{count:8}  {clock:7.1f}  {processor:11.1f}  {growth:8.2f}  {peak:8.2f}  {alike:5}  "
            f"{mirrored:8}  {len(copies):11}",
            flush=True,
        )


if __name__ == "__main__":
    main()
