"""How far is a picture from the teacher's of the same prompt and noise?"""

from __future__ import annotations

from torch import Tensor


def distance_to_teacher(images: Tensor, teacher: Tensor) -> float:
    """Pixel RMS in units of [-1, 1]: sqrt(mean of squared differences) of each picture, then the mean of all.

    Fair for one-step and deterministic samplers. LCM with several steps draws fresh noise on its way, so a
    right answer may differ from the teacher's: judge those by accuracy, Frechet distance and saturation as
    well.
    """
    return float(((images - teacher) ** 2).mean(dim=(1, 2, 3)).sqrt().mean())


def rms(a: Tensor, b: Tensor) -> Tensor:
    """[N, ...] and [N, ...] -> [N]: root of the mean squared difference of each row, float64."""
    return (a.double() - b.double()).flatten(1).square().mean(1).sqrt()
