"""Where a picture's noise comes from: the seed and the picture's own number, and nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch


def generators(seed: int, first: int, count: int) -> list[torch.Generator]:
    """CPU generators of samples first .. first+count-1: each depends on (seed, its own index) alone."""
    return numbered(seed, range(first, first + count))


def numbered(seed: int, numbers: Iterable[int]) -> list[torch.Generator]:
    """As `generators`, of the samples of any numbers."""
    digests = (hashlib.sha256(f"{seed}/{number}".encode()).digest() for number in numbers)
    return [torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1) for digest in digests]
