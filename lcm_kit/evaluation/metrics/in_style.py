"""Does a picture show the style? Nearer to the brand's pictures than to what the base draws for such prompts.

Likeness to the brand's pictures alone does not say: it follows what a picture shows as well, and a base's
plain picture on the brand's ground may be more like the brand's than another in the style is. The base's
pictures of the same prompts show the same things without the style, so what sets the two sets apart is the
style.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SHRINKAGE = 0.5  # of the spread to one that is equal in all directions: pictures are fewer than features
HALF = 0.5  # of the way; from here on a picture is nearer to the brand's


def towards_style(features: Tensor, brand: Tensor, base: Tensor) -> Tensor:
    """[N, F], the brand's [B, F], the base's [C, F] -> [N]: 0 in the middle of the base's, 1 of the brand's.

    Along the direction that best tells the two sets apart (Fisher's linear discriminant, Annals of Eugenics
    1936, with the spread within the sets shrunk to the same in all directions). float64. All 0 where both
    have the same middle. Raises `ValueError` for a set of fewer than 2 pictures.
    """
    if min(len(brand), len(base)) < 2:
        raise ValueError(f"brand and base need 2 pictures or more, not {len(brand)} and {len(base)}")
    x, a, b = (each.double() for each in (features, base, brand))
    apart = b.mean(0) - a.mean(0)
    within = torch.cat([a - a.mean(0), b - b.mean(0)])
    spread = within.T @ within / len(within)
    even = torch.eye(len(spread), dtype=spread.dtype) * (spread.trace() / len(spread))
    shrunk = torch.lerp(spread, even, _SHRINKAGE)
    if not shrunk.any():  # sets of one picture many times
        shrunk = torch.eye(len(spread), dtype=spread.dtype)
    direction = torch.linalg.solve(shrunk, apart)
    length = apart @ direction
    return (x - a.mean(0)) @ direction / length if length > 0 else torch.zeros(len(x), dtype=x.dtype)
