"""Pictures to be edited: as pixels of a size that the base draws, what of them is drawn anew, and back.

A mask is white where the picture is drawn anew. What lies outside it comes back as it was, pixel by pixel: it
is pasted from the picture itself, and the edge is soft within the mask alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

_WHITE = 128  # from here on a mask is white: neither a JPEG's noise nor a soft brush changes what is outside


@dataclass(frozen=True, eq=False)
class Canvas:
    """A picture, and its pixels [1, 3, H, W] in [-1, 1]: padded at right and bottom by its own edge."""

    picture: Image.Image  # 8-bit RGB
    pixels: Tensor

    @classmethod
    def of(cls, picture: Image.Image, multiple: int) -> Canvas:
        """Both sides of the pixels are multiples of `multiple`."""
        picture = picture.convert("RGB")
        array = np.array(picture, dtype=np.float32)
        pixels = torch.from_numpy(array).permute(2, 0, 1)[None] / 127.5 - 1
        return cls(picture, _padded(pixels, multiple))

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the pixels."""
        return self.pixels.shape[2], self.pixels.shape[3]

    def hole(self, mask: Image.Image) -> Tensor:
        """Where a mask of the picture's size is white, bool [H, W]; padding beside white is white."""
        white = torch.from_numpy(np.array(mask.convert("L")) >= _WHITE)
        tall, wide = (new - old for new, old in zip(self.size, white.shape, strict=True))
        return functional.pad(white[None, None].float(), (0, wide, 0, tall), mode="replicate")[0, 0] > 0


def _padded(pixels: Tensor, multiple: int) -> Tensor:
    height, width = pixels.shape[2:]
    return functional.pad(pixels, (0, -width % multiple, 0, -height % multiple), mode="replicate")


def filled(pixels: Tensor, hole: Tensor) -> Tensor:
    """Pixels [1, 3, H, W] whose `hole`, bool [H, W], is filled from around it, the smoother the farther in.

    Each step halves the picture and takes means of what is known, until all is; grey if nothing is known.
    Nothing of what lay in the hole is left.
    """
    known = (~hole)[None, None].float()
    return _filled(torch.where(hole, torch.zeros_like(pixels), pixels), known)


def _filled(pixels: Tensor, known: Tensor) -> Tensor:
    if bool(known.all()) or max(pixels.shape[2:]) == 1:
        return pixels
    share = functional.avg_pool2d(known, 2, ceil_mode=True, count_include_pad=False)
    means = functional.avg_pool2d(pixels * known, 2, ceil_mode=True, count_include_pad=False)
    coarse = _filled(means / share.clamp_min(1e-6), (share > 0).float())
    fine = functional.interpolate(coarse, size=pixels.shape[2:], mode="bilinear", align_corners=False)
    return torch.where(known > 0, pixels, fine)


def meeting(original: Tensor, drawn: Tensor, hole: Tensor, feather: int) -> Tensor:
    """`drawn` pixels [B, 3, H, W] so that they meet the `original` [1, 3, H, W] at the edge of `hole`.

    What the two differ by around the hole is carried smoothly into it, and fades over `feather` pixels (0:
    nothing is moved). So no pixel of the original, nor a filling, shines through what is drawn.
    """
    differ = filled(original - drawn, hole)
    return drawn + (1 - feathered(hole, feather)) * differ


def cells(hole: Tensor, factor: int) -> Tensor:
    """The latents' cells that a `hole`, bool [H, W], touches: bool [1, 1, H / factor, W / factor]."""
    return functional.max_pool2d(hole[None, None].float(), factor) > 0


def feathered(hole: Tensor, feather: int) -> Tensor:
    """How much of what is drawn shows in each pixel, float32 [H, W]: 0 outside, rising over `feather` pixels.

    A part thinner than that is shown whole along its middle.
    """
    depth, eroded = hole.to(torch.int16), hole
    for _ in range(feather):
        eroded = _eroded(eroded)
        if not bool(eroded.any()):
            break
        depth += eroded
    reach = _largest(_largest(depth, feather).T, feather).T
    return (depth / reach.clamp_min(1)).where(hole, 0.0)


def _eroded(inside: Tensor) -> Tensor:
    """Where a pixel of `inside`, bool [H, W], and its eight neighbours are all true.

    What is beyond the picture's edge is no outside: nothing is kept there.
    """
    for _ in range(2):  # along one axis, and then along the other
        both = inside.clone()
        both[1:] &= inside[:-1]
        both[:-1] &= inside[1:]
        inside = both.T
    return inside


def _largest(values: Tensor, radius: int) -> Tensor:
    """The largest of [H, W], none below 0, within `radius` along H; by windows of twice the size each."""
    length, wide = len(values), 2 * radius + 1
    found, size = functional.pad(values, (0, 0, radius, radius)), 1
    while 2 * size <= wide:
        found, size = torch.maximum(found[:-size], found[size:]), 2 * size
    return torch.maximum(found[:length], found[wide - size : wide - size + length])


def pasted(original: Image.Image, drawn: Image.Image, hole: Tensor) -> Image.Image:
    """`drawn` in the `hole`, bool [H, W], of `original`, both of one size; all else stays."""
    width, height = original.size
    inside = Image.fromarray(hole[:height, :width].to(torch.uint8).numpy() * 255)
    return Image.composite(drawn, original, inside)


def grown(
    picture: Image.Image, left: int, top: int, right: int, bottom: int
) -> tuple[Image.Image, Image.Image]:
    """The picture with so many pixels more on each side, and the mask of these."""
    size = picture.width + left + right, picture.height + top + bottom
    larger, mask = Image.new("RGB", size), Image.new("L", size, 255)
    larger.paste(picture, (left, top))
    mask.paste(0, (left, top, left + picture.width, top + picture.height))
    return larger, mask
