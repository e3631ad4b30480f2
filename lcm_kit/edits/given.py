"""Pictures and masks that a caller gives: read within the kit's bounds, upright, 8-bit."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from lcm_kit.errors import UserError
from lcm_kit.io.files import sha256_bytes

if TYPE_CHECKING:
    from PIL.Image import Image

Found = TypeVar("Found")


class Given(NamedTuple):
    """A picture as a person sees it."""

    image: Image  # RGB, on white where it was transparent
    opacity: Image | None  # 8-bit grey; None where it says nothing of it


UPLOADED = "PNG", "JPEG", "WEBP"  # what is opened of a stranger
_SCANS = 100  # of a JPEG: each is a pass over all of it, and a progressive one has about ten


@dataclass(frozen=True)
class Upload:
    """The content of a file that a stranger sent as `name`, and how many pixels a side may be in it."""

    name: str
    content: bytes
    side: int

    @property
    def sha256(self) -> str:
        """Of the file."""
        return sha256_bytes(self.content)

    def require_plain(self) -> None:
        """Raise `UserError` for a file of another kind, or one that would be decoded without end."""
        from lcm_kit.data.image_files import HEAD, kind_of

        kind = kind_of(self.content[:HEAD])
        if kind not in UPLOADED:
            what = f"{kind} is not taken" if kind else "it is no picture"
            raise UserError(f"{what}; send a PNG, JPEG or WebP file")
        if kind == "JPEG" and self.content.count(b"\xff\xda") > _SCANS:
            raise UserError(f"it is a JPEG of more than {_SCANS} scans; save it again as a plain one")

    def require_small(self, image: Image) -> None:
        """Raise `UserError` for a picture of more pixels, which is opened and not decoded yet."""
        if max(image.size) > self.side:
            raise UserError(
                f"it has {image.width} x {image.height} pixels, and this server takes {self.side} a side; "
                "make it smaller"
            )


def given_picture(source: Any) -> Given:
    """A picture of a file, or PIL's, or an `Upload`, turned as its EXIF orientation says.

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

    from lcm_kit.data.transforms import eight_bits, upright

    def grey(image: Image) -> Image:
        image = eight_bits(upright(image))
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

    upload = source if isinstance(source, Upload) else None

    def one(image: Image) -> Found:
        if upload is not None:
            upload.require_small(image)
        if getattr(image, "n_frames", 1) > 1:
            raise UserError(f"it has {image.n_frames} frames; give one of them")  # type: ignore[attr-defined]
        if image.mode == "CMYK":
            raise UserError("its colours are CMYK, a printer's; export it as RGB")
        return use(image)

    content: bytes | None = None
    if isinstance(source, pil.Image):
        name = what
    elif upload is not None:
        name, content = upload.name, upload.content
    else:
        name, content = f"{what} {os.fspath(source)}", Path(source).expanduser().read_bytes()
    try:
        if upload is not None:
            upload.require_plain()
        return one(source) if content is None else of_image(content, one)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
