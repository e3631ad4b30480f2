"""How much do the pictures of one prompt differ? A collapsed student draws the same one again and again."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import normalize


def within_prompts(features: Tensor, images_per_prompt: int, unit: bool = False) -> Tensor:
    """[N, F], the pictures of a prompt next to each other -> [P]: mean L2 distance of all their pairs.

    0 where all pictures of a prompt are the same; unbiased for any number of pictures a prompt. `unit`:
    features are taken at length 1, so that the figure is in [0, 2] whatever the extractor; as they come, only
    its ratio to another's by the same extractor says anything. Raises `ValueError` for fewer than two
    pictures a prompt.
    """
    k = images_per_prompt
    if k < 2 or len(features) % k:
        raise ValueError(f"{len(features)} pictures do not make prompts of {k}, or those have no pairs")
    rows = features.double()
    groups = (normalize(rows, dim=1) if unit else rows).unflatten(0, (-1, k))
    # not by torch.cdist: its matrix form loses the small distances of near-identical pictures
    pairs = ((groups[:, i] - groups[:, j]).norm(dim=1) for i in range(k) for j in range(i))
    return sum(pairs, start=groups.new_zeros(len(groups))) / (k * (k - 1) / 2)
