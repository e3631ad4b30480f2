"""Where a picture's noise comes from: the seed and the picture's own number, and nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import torch

Picture = tuple[int, int]
"""(seed, number): all that the noise of a picture follows from."""


def generators(seed: int, first: int, count: int) -> list[torch.Generator]:
    """CPU generators of samples first .. first+count-1: each depends on (seed, its own index) alone."""
    return streams(pictures(count, seed, first))


def pictures(count: int, seed: int | Sequence[int] = 0, first: int | Sequence[int] = 0) -> list[Picture]:
    """`count` pictures of one seed or each of its own, numbered from `first` or each by its own number."""
    numbers = range(first, first + count) if isinstance(first, int) else first
    seeds = [seed] * count if isinstance(seed, int) else seed
    return list(zip(seeds, numbers, strict=True))


def streams(of: Iterable[Picture]) -> list[torch.Generator]:
    """CPU generators of the noise that pictures are drawn from."""
    return [_stream(f"{seed}/{number}") for seed, number in of]


def for_decoding(of: Iterable[Picture]) -> list[torch.Generator]:
    """As `streams`, of what a decoder that draws adds: other noise than that of the latents."""
    return [_stream(f"decoder/{seed}/{number}") for seed, number in of]


def _stream(name: str) -> torch.Generator:
    digest = hashlib.sha256(name.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
