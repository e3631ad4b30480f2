"""Pictures and masks that a caller gives: read within the kit's bounds, upright, 8-bit."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from lcm_kit.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

Found = TypeVar("Found")


class Given(NamedTuple):
    """A picture as a person sees it."""

    image: Image  # RGB, on white where it was transparent
    opacity: Image | None  # 8-bit grey; None where it says nothing of it


def given_picture(source: Any) -> Given:
    """A picture of a file, or PIL's, turned as its EXIF orientation says.

    Raises `UserError` that names it for what is none, for one with several frames, and for CMYK, whose
    colours nobody knows without the printer.
    """
    from lcm_kit.data.masks import of_alpha
    from lcm_kit.data.transforms import to_rgb

    return _read(source, "picture", lambda image: Given(to_rgb(image), of_alpha(image)))


def given_mask(source: Any, size: tuple[int, int]) -> Image:
    """A mask as 8-bit grey, of `size`; what is transparent in it is black.

    Raises `UserError` as `given_picture`, and for one of another size.
    """
    from PIL import Image as pil

    from lcm_kit.data.transforms import upright

    def grey(image: Image) -> Image:
        image = upright(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = pil.alpha_composite(pil.new("RGBA", image.size, "black"), image)
        return image.convert("L")

    mask = _read(source, "mask", grey)
    if mask.size != size:
        raise UserError(
            f"the mask has {mask.width} x {mask.height} pixels and the picture {size[0]} x {size[1]}; draw "
            "the mask over the whole picture"
        )
    return mask


def _read(source: Any, what: str, use: Callable[[Image], Found]) -> Found:
    from PIL import Image as pil

    from lcm_kit.data.image_files import of_image

    def one(image: Image) -> Found:
        if getattr(image, "n_frames", 1) > 1:
            raise UserError(f"it has {image.n_frames} frames; give one of them")  # type: ignore[attr-defined]
        if image.mode == "CMYK":
            raise UserError("its colours are CMYK, a printer's; export it as RGB")
        return use(image)

    if isinstance(source, pil.Image):
        name = what
        read: Callable[[], Found] = lambda: one(source)  # noqa: E731
    else:
        name = f"{what} {os.fspath(source)}"
        content = Path(source).expanduser().read_bytes()
        read = lambda: of_image(content, one)  # noqa: E731
    try:
        return read()
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
