"""How much do the pictures of one prompt differ? A collapsed student draws the same one again and again."""

from __future__ import annotations

from torch import Tensor


def within_prompts(features: Tensor, images_per_prompt: int) -> Tensor:
    """[N, F], the pictures of a prompt next to each other -> [P]: mean L2 distance of all their pairs.

    0 where all pictures of a prompt are the same. Raises `ValueError` for fewer than two pictures a prompt.
    """
    k = images_per_prompt
    if k < 2 or len(features) % k:
        raise ValueError(f"{len(features)} pictures do not make prompts of {k}, or those have no pairs")
    groups = features.double().unflatten(0, (-1, k))
    # not by torch.cdist: its matrix form loses the small distances of near-identical pictures
    distances = (groups[:, :, None] - groups[:, None]).square().sum(-1).sqrt()
    return distances.sum((1, 2)) / (k * (k - 1))
