"""How a cell's pictures stand to the brand's and to the base's: what evaluation/brand measures of a style."""

from __future__ import annotations

from torch import Tensor

from lcm_kit.evaluation.measure import Drawn, Figure
from lcm_kit.evaluation.metrics import in_style, similarity
from lcm_kit.evaluation.metrics.distance import rms

_NO_WAY = 0.01  # of brand similarity between the base's pictures and the brand's own: less is none


def brand_similarity(drawn: Drawn) -> Figure | None:
    """Nearness to the brand's pictures, less that to the control's."""
    if drawn.ruler.brand is None:
        return None
    return drawn.mean(similarity.brand_similarity(drawn.rows["features"], *drawn.ruler.brand))


def prompts_in_style(drawn: Drawn) -> Figure | None:
    """The share of prompts whose pictures are nearer to the brand's than to the base's."""
    if drawn.ruler.brand is None or drawn.ruler.unstyled is None:
        return None
    brand, base = drawn.ruler.brand[0], drawn.ruler.unstyled  # the reference may be the styled teacher
    if min(len(brand), len(base)) < 2:
        return None
    images = drawn.ruler.resamples.images_per_prompt
    way = in_style.towards_style(drawn.rows["features"], brand, base).view(-1, images).mean(1)
    return drawn.mean((way >= in_style.HALF).repeat_interleave(images))


def style_way(drawn: Drawn) -> Figure | None:
    """How far it is from the base's brand similarity, on the same prompts and noise, to the brand's own.

    None for the base itself, and where the base's pictures are as near to the brand as its own: there is no
    way to go. Such resamples are NaN, and left out of the interval.
    """
    ruler = drawn.ruler
    if drawn.cell.adapter is None or ruler.brand is None or ruler.unstyled is None:
        return None
    if min(map(len, ruler.brand)) < 2:
        return None
    own = similarity.ends(*ruler.brand)[1]
    mine, base = (
        similarity.brand_similarity(each, *ruler.brand) for each in (drawn.rows["features"], ruler.unstyled)
    )
    whole = own - base
    if whole.mean() < _NO_WAY:
        return None
    found = drawn.ratio(mine - base, whole)
    assert found.resampled is not None
    possible = ruler.resamples.means(whole) >= _NO_WAY
    return Figure(found.value, found.resampled.where(possible, float("nan")))


def changed(drawn: Drawn) -> Figure | None:
    """How far the pictures are from the base's, where 1 is how far the base's from another noise are.

    None for the base itself, without a second noise, and for samplers that draw noise on their way: their
    pictures end elsewhere by chance.
    """
    base, other = drawn.ruler.unstyled, drawn.ruler.renoised
    if drawn.cell.adapter is None or not drawn.cell.deterministic or base is None or other is None:
        return None
    apart = rms(other, base)
    return drawn.ratio(rms(drawn.rows["features"], base), apart) if apart.mean() > 0 else None


def renoised(features: Tensor, images_per_prompt: int) -> Tensor | None:
    """Of the base's features [N, F], for each picture those of the next one of its prompt, which has another
    noise; None with one picture a prompt.
    """
    if images_per_prompt < 2:
        return None
    return features.unflatten(0, (-1, images_per_prompt)).roll(1, 1).flatten(0, 1)
