"""Does it look like the brand? Nearness to its pictures, over nearness to pictures of other looks."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import normalize


def brand_similarity(features: Tensor, brand: Tensor, control: Tensor) -> Tensor:
    """[N, F], the brand's [B, F] and the control's [C, F] -> [N]: mean cosine to the brand's, less the control's.

    The control's mean is taken off first: features of all pictures share a large part, which would leave every
    cosine near 1. Above 0 is nearer to the brand than to the control; `ends` says how far it can go.
    """
    centre = control.double().mean(0)
    a, b, c = (normalize(each.double() - centre) for each in (features, brand, control))
    return a @ (b.mean(0) - c.mean(0))


def ends(brand: Tensor, control: Tensor) -> tuple[float, float]:
    """What the control's own pictures and the brand's own get on average, each held against the others.

    Each picture is left out of the set that it is compared with.
    """
    centre = control.double().mean(0)
    b, c = normalize(brand.double() - centre), normalize(control.double() - centre)

    def others(x: Tensor) -> Tensor:
        return ((x.sum(0) - x) * x).sum(1) / (len(x) - 1)

    floor = (c @ b.mean(0) - others(c)).mean()
    ceiling = (others(b) - b @ c.mean(0)).mean()
    return float(floor), float(ceiling)
