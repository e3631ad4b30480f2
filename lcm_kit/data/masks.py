"""What counts in a picture: a mask beside it, or its own transparency, as weights of the latents' cells."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from lcm_kit.data.buckets import Cut, Size
from lcm_kit.data.image_files import of_image
from lcm_kit.data.transforms import upright, upright_size
from lcm_kit.errors import UserError

ALPHA = "alpha"  # stands for a mask file's hash where the picture's own transparency is its mask
WHOLE = 255  # of a cell that counts in full


def require_fit(content: bytes, picture: Size) -> None:
    """Raise `UserError` if a mask file cannot be read, or is of other proportions than its `picture`."""
    try:
        width, height = of_image(content, lambda image: upright_size(image, content))
    except UserError as error:
        raise UserError(f"its mask: {error}") from error
    # as many pixels, or a reduced copy whose sides were rounded
    if abs(width * picture[1] - height * picture[0]) > max(*picture):
        raise UserError(
            f"its mask has {width} x {height} pixels and it {picture[0]} x {picture[1]}; draw the mask over "
            "the whole picture"
        )


def read(content: bytes) -> Image.Image:
    """A mask file as 8-bit grey: white (or, in a file with transparency, opaque) where it counts."""
    return of_image(content, lambda image: of_alpha(image) or upright(image).convert("L"))


def of_alpha(image: Image.Image) -> Image.Image | None:
    """The opacity of a picture, upright, 8-bit grey; None where it says nothing of it."""
    image = upright(image)
    return image.convert("RGBA").getchannel("A") if image.has_transparency_data else None


def cells(mask: Image.Image, how: Cut, factor: int, background: float, mirrored: bool = False) -> Tensor:
    """The weights of a picture's latent cells, uint8 [1, h, w] of 255: the mean of the mask over each.

    `how`: as the picture is cut; `factor`: pixels along a side of a cell. What is black weighs `background`.
    """
    across, down = (own / whole for own, whole in zip(mask.size, how.resized, strict=True))
    (left, top), (width, height) = how.corner, how.target
    box = (left * across, top * down, (left + width) * across, (top + height) * down)
    right, bottom = min(box[2], mask.width), min(box[3], mask.height)
    size = width // factor, height // factor
    shrunk = mask.resize(size, Image.Resampling.BOX, box=(box[0], box[1], right, bottom))
    if mirrored:
        shrunk = ImageOps.mirror(shrunk)
    share = np.asarray(shrunk, dtype=np.float32) / WHOLE
    weights = background + (1 - background) * share
    return torch.from_numpy((weights * WHOLE).round().astype(np.uint8))[None]
