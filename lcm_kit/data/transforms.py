"""From image files to pixels: upright, on white where transparent, 8-bit RGB, square, in [-1, 1]."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from lcm_kit.families.condition import Framing


def to_rgb(image: Image.Image) -> Image.Image:
    """The picture as a person sees it: EXIF orientation, transparency on white, 16-bit grey scaled to 8."""
    image = ImageOps.exif_transpose(image)
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


def to_square(image: Image.Image, resolution: int) -> Image.Image:
    """The shorter side resized to `resolution` (LANCZOS), then the centre cropped to a square."""
    top, left = framing(image.size, resolution).corner
    image = image.resize(_resized(image.size, resolution), Image.Resampling.LANCZOS)
    return image.crop((left, top, left + resolution, top + resolution))


def to_pixels(image: Image.Image, resolution: int, mirrored: bool = False) -> Tensor:
    """An RGB image, or its mirror image, as pixels [3, resolution, resolution], float32 in [-1, 1]."""
    square = to_square(image, resolution)
    if mirrored:
        square = ImageOps.mirror(square)
    array = np.array(square, dtype=np.float32)
    return torch.from_numpy(array).permute(2, 0, 1).contiguous() / 127.5 - 1
