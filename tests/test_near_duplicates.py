"""The index of near duplicates gives what comparing all with all gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps

from lcm_kit.data import hash_index
from lcm_kit.data import near_duplicates as near
from lcm_kit.data.hash_index import HashIndex, packed
from studies.near_duplicates import made

BRAND = sorted((Path(near.__file__).parents[1] / "assets" / "brand").glob("*.png"))


@pytest.mark.parametrize("count", [1, 40, 3000, 40_000])  # cut into 13 parts to 4
def test_an_index_finds_all_that_are_near_and_nothing_else(count: int) -> None:
    random = np.random.default_rng(count)
    hashes = random.integers(0, 2**63, count, dtype=np.uint64)
    queries = []
    for flips in (0, 1, 11, 12, 12, 12, 13, 13):  # bits from some of the hashes: 12 is near, 13 is not
        nearby = hashes[random.integers(count, size=3)].copy()
        for i in range(3):
            for bit in random.choice(63, flips, replace=False):
                nearby[i] ^= np.uint64(1) << np.uint64(bit)
        queries.append(nearby)
    index = HashIndex(hashes, 12)
    for wanted in queries:
        apart = np.array([[bin(int(a) ^ int(b)).count("1") for b in wanted] for a in hashes])
        assert index.near_any(wanted).tolist() == np.flatnonzero((apart <= 12).any(axis=1)).tolist()


def test_the_worst_spread_of_bits_is_still_found() -> None:
    """As many bits as may differ in a part, in every part but one, and there as many as are left."""
    for parts in range(3, 14):
        sizes, flips = hash_index._cut_into(parts, 12)
        assert sum(sizes) == 63 and sum(flips) + parts == 13
        for kept in range(parts):
            differ = [most + 1 for most in flips]
            differ[kept] -= 1
            starts = np.cumsum([0, *sizes])
            query = sum(((1 << n) - 1) << int(start) for n, start in zip(differ, starts, strict=False))
            index = object.__new__(HashIndex)
            hashes, index._far = np.zeros(1, np.uint64), 12
            index._hashes = hashes
            index._parts = [
                hash_index._Part.of(hashes, int(start), size, most)
                for start, size, most in zip(starts, sizes, flips, strict=False)
            ]
            assert index.near_any(np.array([query], np.uint64)).tolist() == [0]


def test_a_hash_is_packed_bit_by_bit() -> None:
    signs = np.where(np.random.default_rng(0).random((5, 63)) < 0.5, 1, -1).astype(np.float32)
    assert packed(signs).tolist() == [sum(1 << i for i in range(63) if row[i] > 0) for row in signs]


def test_groups_of_brand_pictures_are_those_of_comparing_all_with_all() -> None:
    """Copies, crops, mirror images, mirrored crops, and pictures in one layout whose hashes are near."""
    originals = [Image.open(path).convert("RGB") for path in BRAND[::6]]
    edits: list[Callable[[Image.Image], Image.Image]] = [
        lambda image: image.resize((64, 64), Image.Resampling.BICUBIC),
        lambda image: image.crop((8, 0, 120, 126)),
        ImageOps.mirror,
        lambda image: ImageOps.mirror(image.crop((0, 6, 118, 128))),
    ]
    pictures = [near.thumbnail(image) for image in originals]
    for i, image in enumerate(originals):
        pictures += [near.thumbnail(edit(image)) for edit in edits[: i % 5]]
    assert_as_slow(pictures)


def test_groups_of_random_pictures_are_those_of_comparing_all_with_all() -> None:
    pictures, pairs = made(150, seed=3)
    found = assert_as_slow(pictures)
    assert sum(map(len, (*found.alike, *found.mirrored))) >= len(pairs) > 10


def assert_as_slow(pictures: Sequence[near.Thumbnail]) -> near.Copies:
    found = near.near_duplicates(pictures)
    assert found == all_with_all(pictures)
    assert found.alike and found.mirrored
    return found


# --- the reference: every pair, one after the other ---


def all_with_all(pictures: Sequence[near.Thumbnail]) -> near.Copies:
    turned = [picture[:, :, ::-1] for picture in pictures]
    alike = groups(pictures, pictures, [{place} for place in range(len(pictures))])
    return near.Copies(several(alike), several(groups(pictures, turned, alike)))


def groups(
    pictures: Sequence[near.Thumbnail], copies: Sequence[near.Thumbnail], known: list[set[int]]
) -> list[set[int]]:
    found = [{place} for place in range(len(pictures))]
    hashed = np.concatenate([near.hashes(copy) for copy in copies])
    for i, picture in enumerate(pictures):
        apart = (63 - near.hashes(picture, (0.0, 0.05, 0.1)) @ hashed.T).min(axis=0) / 2
        for j in map(int, np.flatnonzero(apart <= 12)):
            if j not in known[i] | found[i] and likeness(copies[j], picture) >= 0.97:
                found[i] |= found[j]
                for k in found[i]:
                    found[k] = found[i]
    return found


def likeness(copy: near.Thumbnail, picture: near.Thumbnail) -> float:
    fits: NDArray[np.float32] = near.coarse(picture, (0.0, 0.05, 0.1)) @ near.coarse(copy)[0]
    if fits.max() < 0.9:
        return float(fits.max())
    return near._fitted(near.outline(copy), picture, near._windows((0.0, 0.05, 0.1))[int(fits.argmax())])


def several(found: Sequence[set[int]]) -> list[tuple[int, ...]]:
    return sorted({tuple(sorted(group)) for group in found if len(group) > 1})
