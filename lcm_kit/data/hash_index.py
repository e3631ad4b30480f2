"""Which of many 63-bit hashes are within some bits of a few: exactly, without comparing with all of them.

The bits are cut into parts. Two hashes that differ in no more than `far` bits differ in few bits of some
part: if in every part c they differed in more than `flips[c]` bits, they would differ in the sum of all
`flips[c] + 1`, which is `far + 1`. So for each part the hashes lie in buckets by the part's bits, and a
search looks into the buckets that are at most `flips[c]` bits away: none that is near can be elsewhere. More
hashes are cut into fewer parts: fewer lie in each bucket, but there are more buckets to look into.
(Multi-index hashing: Norouzi, Punjani, Fleet, "Fast search in Hamming space with multi-index hashing".)
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, combinations
from math import comb

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]
Places = NDArray[np.int32]

BITS = 63
_LARGEST = 21  # bits of a part: its table of buckets has 2^21 entries


def packed(signs: NDArray[np.float32]) -> Hashes:
    """Hashes as +1 and -1, [..., 63], in a number each: [...]."""
    bits = np.zeros((*signs.shape[:-1], 64), dtype=np.uint8)
    bits[..., :BITS] = signs > 0
    return np.packbits(bits, axis=-1, bitorder="little").view("<u8")[..., 0].astype(np.uint64)


@dataclass(frozen=True)
class _Part:
    """Some of the bits, and the hashes in the order of these."""

    start: int  # first of the bits
    size: int  # how many
    ways: Places  # what a part's bits are changed with, each at most as many bits as may differ in it
    places: Places  # of the hashes, by bucket
    hashes: Hashes  # in that order
    begins: Places  # where in it each bucket begins, and where the last one ends
    counts: Places  # how many are in each bucket

    @staticmethod
    def of(hashes: Hashes, start: int, size: int, flips: int) -> _Part:
        bits = _cut(hashes, start, size)
        order = np.argsort(bits, kind="stable").astype(np.int32)
        begins = np.searchsorted(bits[order], np.arange(2**size + 1)).astype(np.int32)
        ways = [
            sum(1 << bit for bit in some) for k in range(flips + 1) for some in combinations(range(size), k)
        ]
        counts = np.diff(begins)
        return _Part(start, size, np.array(ways, np.int32), order, hashes[order], begins, counts)


def _cut(hashes: Hashes, start: int, size: int) -> Places:
    return ((hashes >> np.uint64(start)) & np.uint64(2**size - 1)).astype(np.int32)


class HashIndex:
    """The hashes [n], to be asked which of them are near others: 12 bytes a hash and part."""

    def __init__(self, hashes: Hashes, far: int) -> None:
        """`far`: bits up to which two hashes are near, below 63."""
        self._hashes, self._far = hashes, far
        sizes, flips = _cheapest(len(hashes), far)
        starts = accumulate(sizes, initial=0)
        self._parts = [
            _Part.of(hashes, start, size, most)
            for start, size, most in zip(starts, sizes, flips, strict=False)
        ]

    def near_any(self, wanted: Hashes) -> Places:
        """Places of the hashes that are at most `far` bits from one of `wanted` [k], ascending."""
        likely = np.sort(np.concatenate([self._likely(part, wanted) for part in self._parts]))
        likely = likely[np.diff(likely, prepend=-1) > 0]
        apart = np.bitwise_count(self._hashes.take(likely) ^ wanted[:, None])
        found: Places = likely[apart.min(axis=0) <= self._far]
        return found

    def _likely(self, part: _Part, wanted: Hashes) -> Places:
        """Places in the buckets that `wanted` can have near ones in, but those that are far without doubt.

        Those of `wanted` that have the part's bits in common are searched for once: what differs in more than
        `far` of the bits that are the same in all of them is near none.
        """
        bits = _cut(wanted, part.start, part.size)
        order = np.argsort(bits)
        first = np.flatnonzero(np.diff(bits[order], prepend=-1))
        every, some = (
            np.bitwise_and.reduceat(wanted[order], first),
            np.bitwise_or.reduceat(wanted[order], first),
        )
        buckets = (bits[order[first]][:, None] ^ part.ways).ravel()
        counts = part.counts.take(buckets)
        filled = np.flatnonzero(counts)
        counts, begins = counts.take(filled), part.begins.take(buckets.take(filled))
        ends = np.cumsum(counts, dtype=np.int32)
        inside = np.repeat(begins - (ends - counts), counts)
        inside += np.arange(len(inside), dtype=np.int32)  # every bucket's stretch, one after the other
        last = np.searchsorted(filled, np.arange(1, len(first) + 1) * len(part.ways))
        of = np.diff(np.concatenate([[0], ends])[last], prepend=0)  # hashes that each group is held against
        differ = part.hashes.take(inside)
        differ ^= np.repeat(every, of)
        differ &= np.repeat(~(every ^ some), of)
        return part.places.take(inside.take(np.flatnonzero(np.bitwise_count(differ) <= self._far)))


def _cheapest(count: int, far: int) -> tuple[list[int], list[int]]:
    """The sizes of the parts, and the bits that may differ in each, for which a search looks at least."""
    ways = [_cut_into(parts, far) for parts in range(-(-BITS // _LARGEST), far + 2)]

    def looks(cut: tuple[list[int], list[int]]) -> float:
        """Buckets to look into, and hashes in them."""
        return sum(
            sum(comb(size, k) for k in range(most + 1)) * (1 + count / 2**size)
            for size, most in zip(*cut, strict=True)
        )

    return min(ways, key=looks)


def _cut_into(parts: int, far: int) -> tuple[list[int], list[int]]:
    """The larger parts are those in which more bits may differ."""
    return _shares(BITS, parts), [share - 1 for share in _shares(far + 1, parts)]


def _shares(whole: int, parts: int) -> list[int]:
    return [whole // parts + (part < whole % parts) for part in range(parts)]
