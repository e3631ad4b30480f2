"""Does the picture show what its prompt asked for? Read by the probe of the embedded world."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lcm_kit.tiny.world import Scene

ATTRIBUTES = ("object", "colour", "pattern")


def standard_error(p: float, n: int) -> float:
    """Standard error of a fraction p of n independent trials, sqrt(p (1 - p) / n)."""
    return math.sqrt(p * (1 - p) / n)


@torch.no_grad()
def attribute_accuracy(probe: Any, images: Tensor, scenes: Sequence[Scene]) -> dict[str, float]:
    """Fractions of pictures that show their scene, as the probe reads them (`lcm_kit.tiny.probe`).

    `attribute_accuracy`: object and colour and pattern all right; `attribute_accuracy_stderr`: its binomial
    standard error; `object_accuracy`, `colour_accuracy`, `pattern_accuracy`: each alone. `images` [N, 3, 64,
    64], N scenes.
    """
    seen = probe.read(images)
    pairs = zip(seen, scenes, strict=True)
    right = [[got[name] == getattr(scene, name) for name in ATTRIBUTES] for got, scene in pairs]
    n = len(right)
    both = sum(map(all, right)) / n
    each = {f"{name}_accuracy": sum(row[k] for row in right) / n for k, name in enumerate(ATTRIBUTES)}
    return {"attribute_accuracy": both, "attribute_accuracy_stderr": standard_error(both, n), **each}
