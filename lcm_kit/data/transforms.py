"""From image files to pixels: upright, on white where transparent, 8-bit RGB, square, in [-1, 1]."""

from __future__ import annotations

from math import ceil, floor

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from lcm_kit.bases.condition import Framing

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


def upright_for(image: Image.Image, resolution: int) -> tuple[Image.Image, tuple[int, int]]:
    """`upright`, and the size that the whole picture has so, for `to_pixels` at `resolution`.

    A JPEG of more than `_WHOLE` pixels is reduced while it is decoded: its own format can do that.
    """
    whole = image.size
    if whole[0] * whole[1] > _WHOLE:
        image.draft(None, (_SPARED * resolution, _SPARED * resolution))
    image.load()
    if image.getexif().get(ExifTags.Base.Orientation) in ON_THE_SIDE:
        whole = whole[1], whole[0]
    return upright(image), whole


def to_rgb(image: Image.Image) -> Image.Image:
    """The picture as a person sees it: EXIF orientation, transparency on white, 16-bit grey scaled to 8."""
    image = upright(image)
    if image.mode.startswith("I"):  # PIL clips 16-bit grey to white instead of scaling it
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def framing(size: tuple[int, int], resolution: int, mirrored: bool = False) -> Framing:
    """How `to_pixels` cuts its square from a picture of `size` (width, height), and where that lies.

    The corner is that of the picture as it is seen: of the mirror image if `mirrored`.
    """
    width, height = _resized(size, resolution)
    left, top = (width - resolution) // 2, (height - resolution) // 2
    if mirrored:
        left = width - resolution - left
    return Framing((size[1], size[0]), (top, left), (resolution, resolution))


def _resized(size: tuple[int, int], resolution: int) -> tuple[int, int]:
    """(width, height) with the shorter side at `resolution`."""
    short = min(size)
    width, height = (max(resolution, round(side * resolution / short)) for side in size)
    return width, height


def to_square(image: Image.Image, resolution: int, whole: tuple[int, int] | None = None) -> Image.Image:
    """The shorter side resized to `resolution` (LANCZOS), then the centre cropped to a square: RGB.

    `image` may have any mode. One so long that it would be enormous when resized is cropped first. `whole`:
    the size of the picture of which `image` was decoded at a fraction (`upright_for`).
    """
    image = upright(image)
    size = whole or image.size
    top, left = framing(size, resolution).corner
    width, height = _resized(size, resolution)
    if width * height > _RESIZED:
        return _cropped_first(image, resolution)
    return resized(image, (width, height)).crop((left, top, left + resolution, top + resolution))


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


def _cropped_first(image: Image.Image, resolution: int) -> Image.Image:
    """The square of a picture that is far longer than wide or far wider than long."""
    scale = min(image.size) / resolution
    corner = [scale * ((side - resolution) // 2) for side in _resized(image.size, resolution)]
    margin = _REACH * max(scale, 1) + 1
    wanted = [min(begin, side - min(image.size)) for begin, side in zip(corner, image.size, strict=True)]
    begins = [max(0, floor(begin - margin)) for begin in wanted]
    ends = [
        min(side, ceil(begin + min(image.size) + margin))
        for begin, side in zip(wanted, image.size, strict=True)
    ]
    part = to_rgb(image.crop((begins[0], begins[1], ends[0], ends[1])))
    left, top = (begin - first for begin, first in zip(wanted, begins, strict=True))
    box = (left, top, left + min(image.size), top + min(image.size))
    return part.resize((resolution, resolution), Image.Resampling.LANCZOS, box=box)


def to_pixels(
    image: Image.Image, resolution: int, mirrored: bool = False, whole: tuple[int, int] | None = None
) -> Tensor:
    """An image, or its mirror image, as pixels [3, resolution, resolution], float32 in [-1, 1].

    `whole` as in `to_square`.
    """
    square = to_square(image, resolution, whole)
    if mirrored:
        square = ImageOps.mirror(square)
    array = np.array(square, dtype=np.float32)
    return torch.from_numpy(array).permute(2, 0, 1).contiguous() / 127.5 - 1
