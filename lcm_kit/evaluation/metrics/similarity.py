"""Does it look like the brand? Nearness to its pictures, over nearness to pictures of other styles.

The control's mean is taken off all features first: those of any two pictures share a large part, which would
leave every cosine near 1 and the difference near 0. What is left is what sets a picture apart from the
control.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import normalize


def brand_similarity(features: Tensor, brand: Tensor, control: Tensor) -> Tensor:
    """[N, F], the brand's [B, F], the control's [C, F] -> [N]: mean cosine to the brand's less the control's.

    In [-2, 2], float64. Above the middle between the two `ends` is nearer to the brand than to the control.
    """
    a, b, c = _centred(features, brand, control)
    return a @ (b.mean(0) - c.mean(0))


def ends(brand: Tensor, control: Tensor) -> tuple[float, float]:
    """Floor and ceiling: what the control's own pictures and the brand's own get on average.

    Each picture is left out of the set that it is compared with. Raises `ValueError` for a set of one
    picture.
    """
    if min(len(brand), len(control)) < 2:
        raise ValueError(f"brand and control need 2 pictures or more, not {len(brand)} and {len(control)}")
    b, c = _centred(brand, control)
    floor, ceiling = c @ b.mean(0) - _to_others(c), _to_others(b) - b @ c.mean(0)
    return float(floor.mean()), float(ceiling.mean())


def _to_others(x: Tensor) -> Tensor:
    """[N, F] at length 1 -> [N]: mean cosine of each to the others."""
    return ((x.sum(0) - x) * x).sum(1) / (len(x) - 1)


def _centred(*sets: Tensor) -> list[Tensor]:
    """Each set less the mean of the last one, the control, at length 1; float64."""
    centre = sets[-1].double().mean(0)
    return [normalize(each.double() - centre, dim=1) for each in sets]
