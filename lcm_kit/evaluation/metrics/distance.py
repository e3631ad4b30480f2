"""How far is a picture from the teacher's of the same prompt and noise?

Fair for one-step and deterministic samplers. LCM with several steps draws fresh noise on its way, so a right
answer may differ from the teacher's: judge those by adherence, Frechet distance and saturation as well.
"""

from __future__ import annotations

from torch import Tensor


def rms(a: Tensor, b: Tensor) -> Tensor:
    """[N, ...] and [N, ...] -> [N]: root of the mean squared difference of each row, float64."""
    return (a.double() - b.double()).flatten(1).square().mean(1).sqrt()
