"""Does the picture show what its prompt asked for? Read by the probe of the embedded world."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lcm_kit.tiny.world import Scene

ATTRIBUTES = ("object", "colour", "pattern")


@torch.no_grad()
def attributes_right(probe: Any, images: Tensor, scenes: Sequence[Scene]) -> Tensor:
    """[N, 3] bool: whether object, colour and pattern of each picture are its scene's, as the probe
    (`lcm_kit.tiny.probe`) reads them. `images` [N, 3, 64, 64], N scenes.
    """
    pairs = zip(probe.read(images), scenes, strict=True)
    return torch.tensor(
        [[seen[name] == getattr(scene, name) for name in ATTRIBUTES] for seen, scene in pairs]
    )
