"""From image files to pixels: upright, on white where transparent, 8-bit RGB, cut to a shape, in [-1, 1]."""

from __future__ import annotations

from math import ceil, floor

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from lcm_kit.data.buckets import Cut, Size

ON_THE_SIDE = (5, 6, 7, 8)  # EXIF orientations that swap width and height
_WHOLE = 64_000_000  # pixels, 256 MB in RGB: a larger picture is made narrower in strips of rows
_RESIZED = 100_000_000  # pixels: where the whole picture would be larger than this, it is cropped first
_SPARED = 4  # times the result: what a very large JPEG, decoded at a fraction of its size, still has at least
_STRIP = 4_000_000  # pixels of a strip of rows
_REACH = 3  # pixels of the result that LANCZOS looks to each side


def upright(image: Image.Image) -> Image.Image:
    """The picture turned as its EXIF orientation says; itself where that says nothing."""
    image.load()  # a PNG may say so behind its pixels
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    return image if orientation == 1 else ImageOps.exif_transpose(image)


def upright_for(image: Image.Image, resolution: int) -> tuple[Image.Image, Size]:
    """`upright`, and the size that the whole picture has so, to be cut to about `resolution` pixels a side.

    A JPEG of more than `_WHOLE` pixels is reduced while it is decoded: its own format can do that.
    """
    whole = image.size
    if whole[0] * whole[1] > _WHOLE:
        image.draft(None, (_SPARED * resolution, _SPARED * resolution))
    image.load()
    if image.getexif().get(ExifTags.Base.Orientation) in ON_THE_SIDE:
        whole = whole[1], whole[0]
    return upright(image), whole


def upright_size(image: Image.Image, content: bytes) -> Size:
    """(width, height) of an opened picture as it is seen, from its header; `content`: the file's."""
    if image.format == "PNG" and b"eXIf" in content:
        image.load()  # it may stand behind the pixels
    turned = image.getexif().get(ExifTags.Base.Orientation) in ON_THE_SIDE
    return (image.height, image.width) if turned else image.size


def eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey scaled to 8, which PIL would clip to white; anything else as it is."""
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8))


def to_rgb(image: Image.Image) -> Image.Image:
    """The picture as a person sees it: EXIF orientation, transparency on white, 16-bit grey scaled to 8."""
    image = eight_bits(upright(image))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def to_shape(image: Image.Image, how: Cut) -> Image.Image:
    """The picture resized (LANCZOS) and cropped as `how` says: RGB.

    `image` may have any mode, and be decoded at a fraction of the size that `how` is of (`upright_for`). One
    so long that it would be enormous when resized is cropped first.
    """
    image = upright(image)
    (width, height), (left, top) = how.resized, how.corner
    if width * height > _RESIZED:
        return _cropped_first(image, how)
    return resized(image, (width, height)).crop((left, top, left + how.target[0], top + how.target[1]))


def resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """`to_rgb(image)` resized to `size` by LANCZOS, without the whole of a very large one in RGB.

    There rows are made shorter first, by strips, and columns then; PIL rounds to 8 bits between the two, and
    takes columns first where that is less work, so that single values may differ by the rounding.
    """
    image = upright(image)
    width, height = image.size
    if width * height <= _WHOLE:
        return to_rgb(image).resize(size, Image.Resampling.LANCZOS)
    narrow = Image.new("RGB", (size[0], height))
    rows = max(1, min(_WHOLE // 4, _STRIP) // width)
    for top in range(0, height, rows):
        strip = to_rgb(image.crop((0, top, width, min(top + rows, height))))
        narrow.paste(strip.resize((size[0], strip.height), Image.Resampling.LANCZOS), (0, top))
    return narrow.resize(size, Image.Resampling.LANCZOS)


def _cropped_first(image: Image.Image, how: Cut) -> Image.Image:
    """The shape of a picture that is far longer than wide or far wider than long."""
    scale = min(old / new for old, new in zip(image.size, how.resized, strict=True))
    sides = [scale * each for each in how.target]  # of the crop, in the picture's own pixels
    margin = _REACH * max(scale, 1) + 1
    spare = [max(0.0, side - own) for side, own in zip(image.size, sides, strict=True)]
    wanted = [min(scale * corner, most) for corner, most in zip(how.corner, spare, strict=True)]
    begins = [max(0, floor(begin - margin)) for begin in wanted]
    ends = [
        min(side, ceil(begin + own + margin))
        for begin, side, own in zip(wanted, image.size, sides, strict=True)
    ]
    part = to_rgb(image.crop((begins[0], begins[1], ends[0], ends[1])))
    left, top = (begin - first for begin, first in zip(wanted, begins, strict=True))
    box = (left, top, min(left + sides[0], part.width), min(top + sides[1], part.height))
    return part.resize(how.target, Image.Resampling.LANCZOS, box=box)


def to_pixels(image: Image.Image, how: Cut, mirrored: bool = False) -> Tensor:
    """An image, or its mirror image, cut as `how` says: pixels [3, height, width], float32 in [-1, 1]."""
    shaped = to_shape(image, how)
    if mirrored:
        shaped = ImageOps.mirror(shaped)
    array = np.array(shaped, dtype=np.float32)
    return torch.from_numpy(array).permute(2, 0, 1).contiguous() / 127.5 - 1
