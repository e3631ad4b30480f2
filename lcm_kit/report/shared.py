"""What the reports share: numbers as text, pictures as data URIs, and the page's template."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from lcm_kit.io import own_files

AGAIN = "remove it and evaluate again, which draws it anew"  # of a damaged picture
LARGEST = 256  # pixels: larger pictures are embedded smaller
_BUDGET = 1 << 18  # bytes a picture; pages with many pictures give less
# Tried from left to right until a picture is within its budget: share of the largest side, JPEG quality
_SMALLER = ((1.0, 88), (1.0, 75), (0.75, 75), (0.75, 60), (0.5, 60), (0.5, 35), (0.25, 35))


# -- Numbers as text -----------------------------------------------------------------------------------------


def number(value: float | None, digits: int = 3) -> str:
    """A figure with `digits` significant digits, never as 1.23e+03; a dash where nothing was measured."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:#.{digits}g}".rstrip(".")


def percent(value: float | None) -> str:
    """A share as whole percent, or a dash."""
    return "–" if value is None else f"{value:.0%}".replace("%", "\u00a0%")


def seconds(value: float) -> str:
    """A duration a person can compare: 0.31 s, 12 ms."""
    return f"{value * 1000:.0f}\u00a0ms" if value < 0.1 else f"{value:.2f}\u00a0s"


# -- Pictures ------------------------------------------------------------------------------------------------


def uri(data: bytes, kind: str) -> str:
    """`data` of the type image/`kind` as a data URI."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def picture_uri(file: Path, largest: int = LARGEST, budget: int = _BUDGET) -> str:
    """A picture of ours as data URI: the PNG itself if it is small, else as `image_uri`.

    Raises `UserError` if it is damaged.
    """
    picture = own_files.read_picture(file, AGAIN)
    if max(picture.size) <= largest and file.stat().st_size <= budget:
        return uri(file.read_bytes(), "png")
    return image_uri(picture, largest, budget)


def image_uri(picture: Image.Image, largest: int = LARGEST, budget: int = _BUDGET) -> str:
    """A picture as data URI: a PNG if it is small, else a JPEG of at most `largest` pixels a side.

    `budget` is in bytes, before base64 adds a third. A picture that does not compress (noise) is made smaller
    until it fits; the last trial has a quarter of the side and a few kB.
    """
    colours, data = picture.convert("RGB"), b""
    if max(picture.size) <= largest and len(whole := _png(colours)) <= budget:
        return uri(whole, "png")
    for share, quality in _SMALLER:
        data = _jpeg(colours, max(1, int(largest * share)), quality)
        if len(data) <= budget:
            break
    return uri(data, "jpeg")


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _jpeg(picture: Image.Image, largest: int, quality: int) -> bytes:
    small = picture.copy()
    small.thumbnail((largest, largest), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


# -- The page ------------------------------------------------------------------------------------------------


def page(template: str, context: Mapping[str, Any], **filters: Any) -> str:
    """The template of this folder with `context`, whose text is escaped; a name that it lacks is an error."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters.update(number=number, percent=percent, seconds=seconds, **filters)
    return environment.get_template(template).render(context)
