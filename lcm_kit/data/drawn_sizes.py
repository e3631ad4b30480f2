"""Pictures that are drawn to train on, in sizes of their own: whose turn each size is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from lcm_kit.bases import BaseInfo
from lcm_kit.config.finetune import Finetune
from lcm_kit.config.resolution import Resolution, plain, width_height
from lcm_kit.config.schema import Data, Training
from lcm_kit.data.buckets import Shaped, Shaper, Size, nearest
from lcm_kit.data.lost import Lost
from lcm_kit.errors import UserError


def of_number(number: int, prompts: int, data: Data, resolutions: Sequence[Resolution]) -> Resolution:
    """The size of picture `number`, of so many `prompts` that are drawn again and again.

    The sizes take turns, and begin with another each time that the prompts are through: a prompt that comes
    again gets the next one. Without `resolutions` all are squares of `data.resolution`.
    """
    if not resolutions:
        return data.resolution
    again, at = divmod(number, prompts)
    return resolutions[(at + again) % len(resolutions)]


def require(config: Training, base: BaseInfo) -> None:
    """Raise `UserError` for any size of a training that the base cannot draw, or that is not trained at."""
    base.require_resolution(config.data.resolution, "data.resolution")
    base.require_resolution(config.drawn_at, "validation.resolution")
    for resolution in config.data.samples.resolutions:
        base.require_resolution(resolution, "data.samples.resolutions")
    require_shapes(config, base)


def require_shapes(config: Training, base: Shaped) -> None:
    """Raise `UserError` for pictures of the prior that would be cropped to what is trained at."""
    if not isinstance(config, Finetune) or config.prior.prompts is None:
        return
    shapes = Shaper.of(base, config.data).shapes
    for size in map(width_height, config.prior.resolutions):
        if size not in shapes:
            near = nearest(size, shapes)
            raise UserError(
                f"prior.resolutions: {size[0]} × {size[1]} is none of the shapes that data.shapes trains "
                f"at, so these pictures would be cropped; the nearest is [{near[0]}, {near[1]}]"
            )


def of_entry(number: int, prompts: int, data: Data) -> Size | None:
    """`of_number` with `data.samples`, as a row of a cache says it: None for squares of `data.resolution`."""
    resolution = of_number(number, prompts, data, data.samples.resolutions)
    return None if resolution == data.resolution else width_height(resolution)


def largest(data: Data, resolutions: Sequence[Resolution]) -> Resolution:
    """The one of the most pixels."""

    def pixels(resolution: Resolution) -> int:
        width, height = width_height(resolution)
        return width * height

    return max(resolutions or [data.resolution], key=pixels)


def remarks(sizes: Iterable[Size | None], data: Data) -> list[str]:
    """How many rows there are of each size, where `data.samples.resolutions` asks for any."""
    square = (data.resolution, data.resolution)
    found = Lost(Counter(size or square for size in sizes))
    return [*found.sentences()] if data.samples.resolutions else []


def setting(resolutions: Sequence[Resolution]) -> dict[str, list[int | list[int]]]:
    """What a manifest keeps of them: nothing where there are none, as caches had before there were sizes."""
    return {"resolutions": [*map(plain, resolutions)]} if resolutions else {}
