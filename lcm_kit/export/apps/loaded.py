"""What an app makes of a LoRA file, and the pieces that the apps' rules share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import Tensor


class Loaded(NamedTuple):
    """What an app would change, by our names for the modules that it would change for real."""

    modules: dict[str, float]  # module -> what the app multiplies up @ down with
    unmatched: list[str]  # keys of the file that have no effect
    refused: str | None = None  # why the app takes nothing of the file, in words; then `modules` is empty


class Pair(NamedTuple):
    """The keys that an app takes for one module."""

    up: str
    down: str
    alpha: str | None = None
    mid: str | None = None


def refusal(tensors: Mapping[str, Tensor], reason: str) -> Loaded:
    """Nothing of the file is loaded."""
    return Loaded({}, list(tensors), reason)


def load(tensors: Mapping[str, Tensor], pairs: Mapping[str, Pair]) -> Loaded:
    """The strengths of `pairs`: alpha / rank, and 1.0 without alpha, which all four apps agree on."""
    for pair in pairs.values():
        down, alpha = tensors[pair.down], tensors[pair.alpha] if pair.alpha else None
        if not down.ndim or not down.shape[0] or (alpha is not None and alpha.numel() != 1):
            return refusal(
                tensors, f"it stops at {pair.down}, which has no rank or an alpha of several numbers"
            )
    used = {key for pair in pairs.values() for key in pair if key is not None}
    return Loaded(
        {module: _strength(tensors, pair) for module, pair in pairs.items()},
        [key for key in tensors if key not in used],
    )


def _strength(tensors: Mapping[str, Tensor], pair: Pair) -> float:
    if pair.alpha is None:
        return 1.0
    return float(tensors[pair.alpha]) / int(tensors[pair.down].shape[0])


def joined(dotted: str) -> str:
    """The name with `_` for each dot."""
    return dotted.replace(".", "_")


def groups(keys: Iterable[str]) -> dict[str, dict[str, str]]:
    """The keys by what stands before their first dot: name -> rest -> key."""
    found: dict[str, dict[str, str]] = {}
    for key in keys:
        name, _, rest = key.partition(".")
        found.setdefault(name, {})[rest] = key
    return found
