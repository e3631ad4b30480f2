"""Pixels as pictures: 8-bit, on a sheet, in a file."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from lcm_kit.io.files import atomic_write


def to_pil(images: Tensor) -> list[Image.Image]:
    """Pixels [B, 3, H, W] in [-1, 1] as 8-bit RGB pictures; values outside are clipped."""
    array = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(picture) for picture in array]


def contact_sheet(pictures: Sequence[Image.Image], columns: int | None = None, gap: int = 4) -> Image.Image:
    """All pictures (of one size) on one white sheet, row by row; nearly square unless `columns` is given."""
    columns = columns or math.ceil(math.sqrt(len(pictures)))
    rows = math.ceil(len(pictures) / columns)
    width, height = pictures[0].size
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for k, picture in enumerate(pictures):
        sheet.paste(picture, (k % columns * (width + gap), k // columns * (height + gap)))
    return sheet


def tile_of(
    sheet: Image.Image, number: int, size: tuple[int, int], columns: int, gap: int = 4
) -> Image.Image:
    """The picture of that number and of that (width, height) on a `contact_sheet`."""
    left, top = number % columns * (size[0] + gap), number // columns * (size[1] + gap)
    return sheet.crop((left, top, left + size[0], top + size[1]))


def png_bytes(picture: Image.Image, told: Mapping[str, str] | None = None, *, quick: bool = False) -> bytes:
    """The content of a PNG file of `picture`, with what is `told` in its text, by keyword.

    `quick`: a larger one, for somebody who waits for it.
    """
    text = PngInfo()
    for keyword, words in (told or {}).items():
        if words.isascii():
            text.add_text(keyword, words)  # tEXt, which everything reads
        else:
            text.add_itxt(keyword, words)  # UTF-8, as which ComfyUI reads tEXt too, that is Latin-1
    content = io.BytesIO()
    how: dict[str, Any] = {"compress_level": 1} if quick else {"optimize": True}
    picture.save(content, format="PNG", pnginfo=text, **how)
    return content.getvalue()


def save_png(
    picture: Image.Image,
    path: Path,
    told: Mapping[str, str] | None = None,
    finish: Callable[[bytes], bytes] = bytes,
) -> Path:
    """Write `picture` as PNG, whole or not at all; what is `told` stands in its text by keyword.

    `finish`: what is made of the file's content before it is written, as a signature in it.
    """
    atomic_write(path, finish(png_bytes(picture, told)))
    return path


def slug(prompt: str, length: int = 48) -> str:
    """`prompt` as a file name: lower-case ASCII words with dashes, `image` where nothing is left."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")
    return words[:length].rstrip("-") or "image"
