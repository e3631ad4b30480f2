"""Image files: what kind one is, by its content, and its picture, within bounds of pixels and memory.

A file's ending is not believed. Only raster formats of a fixed list are opened, each by its own decoder, so
that no file that calls itself a picture starts another program (as Pillow does for PostScript).
"""

from __future__ import annotations

import io
import os
import re
import struct
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from importlib import import_module
from threading import Condition
from typing import TypeVar

from PIL import Image

from lcm_kit.data.transforms import to_rgb, upright_for
from lcm_kit.errors import UserError

Found = TypeVar("Found")

# Endings of files that are meant as pictures, whatever is in them
SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jfif", ".jpe", ".apng",
    ".ppm", ".pgm", ".pbm", ".pnm",
)  # fmt: skip
# Endings of pictures that are not read, or only with an extra: they are named where they are passed over
UNREAD = (
    ".heic", ".heif", ".jp2", ".jxl", ".psd", ".tga", ".exr", ".svg", ".ai", ".eps", ".ico",
    ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2",
)  # fmt: skip
READ = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "PPM", "JPEG2000", "QOI")  # Pillow's own
_EXTRAS = {"HEIF": ("pillow_heif", "heif"), "JXL": ("pillow_jxl", "jxl")}  # package, extra of lcm-kit
_NAMES = {"HEIF": "HEIC", "JXL": "JPEG XL"}  # what people call them
MOST_PIXELS = 178_956_970  # of a picture: 4 bytes each; Pillow refuses more as well
MOST_COPIED = 80_000_000  # of a format whose decoder holds several whole copies of the picture at once
_IN_STRIPS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "PPM")  # decoded row by row into the one that is kept
HEAD = 64  # bytes that tell the kind
_AT_ONCE = 100_000_000  # pixels that threads decode at the same time; a larger picture is decoded alone

_MAGIC = (  # first bytes, kind; the longer ones first where one begins another
    (rb"\x89PNG\r\n\x1a\n", "PNG"),
    (rb"\xff\xd8\xff", "JPEG"),
    (rb"GIF8[79]a", "GIF"),
    (rb"BM.{12}[\x0c\x10\x28\x34\x38\x40\x6c\x7c]\0\0\0", "BMP"),
    (rb"II[*+]\0|MM\0[*+]", "TIFF"),
    (rb"RIFF....WEBP", "WEBP"),
    (rb"....ftyp(avi[fs]|.{4,40}avi[fs])", "AVIF"),
    (rb"....ftyp(hei[cxms]|hev[cxms]|mif1|msf1)", "HEIF"),
    (rb"\xff\x0a|\0\0\0\x0cJXL \r\n\x87\n", "JXL"),
    (rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51", "JPEG2000"),
    (rb"P[1-6]\s(?:#[^\n]*\n|\s)*\d+\s+\d+", "PPM"),
    (rb"qoif", "QOI"),
    (rb"8BPS", "a Photoshop file"),
    (rb"%!PS|\xc5\xd0\xd3\xc6", "a PostScript file"),
    (rb"%PDF", "a PDF file"),
    (rb"\s*<(?:\?xml|svg)", "an SVG file"),
    (rb"\s*<(?:!DOCTYPE|html)", "a web page"),
    (rb"version https://git-lfs", "the stand-in of a file that git-lfs keeps; run `git lfs pull`"),
)
_KINDS = tuple((re.compile(magic, re.DOTALL | re.IGNORECASE), kind) for magic, kind in _MAGIC)


def kind_of(head: bytes) -> str | None:
    """What the first `HEAD` bytes of a file say that it is: a format of Pillow, or words; None: nothing."""
    return next((kind for magic, kind in _KINDS if magic.match(head)), None)


def is_picture(head: bytes) -> bool:
    """Whether a file that begins so can be read as a picture, if need be with an extra."""
    kind = kind_of(head)
    return kind in READ or kind in _EXTRAS


def decode(content: bytes) -> Image.Image:
    """An image file's content as an RGB picture. Raises `UserError` with the reason if it cannot be read."""
    return of_image(content, to_rgb)


def try_to_read(content: bytes) -> None:
    """Raise the `UserError` that `decode` would raise, without a whole picture in RGB."""

    def first_row(image: Image.Image) -> None:
        image, _ = upright_for(image, 1)
        to_rgb(image.crop((0, 0, image.width, 1)))

    of_image(content, first_row)


def of_image(content: bytes, use: Callable[[Image.Image], Found]) -> Found:
    """`use` of the image that is in `content`, opened and not yet decoded, in whatever mode it has.

    The image itself is closed then: `use` gives something else that it made of it.
    Raises `UserError` with the reason if it cannot be read, there or in `use`. Text and profiles in a PNG
    beyond Pillow's bounds are left out: they are none of the picture's pixels.
    """
    try:
        return _of_image(content, use)
    except UserError:
        raise
    except ValueError as error:
        if not content.startswith(b"\x89PNG") or "text" not in str(error).lower():
            raise _unreadable(error) from error
    # Pillow's plugins raise nearly anything on broken files (struct.error, SyntaxError, IndexError, ...)
    except Exception as error:
        raise _unreadable(error) from error
    try:
        return _of_image(without_text(content), use)
    except UserError:
        raise
    except Exception as error:
        raise _unreadable(error) from error


def _unreadable(error: Exception) -> UserError:
    return UserError(f"unreadable image: {str(error) or type(error).__name__}")


def _of_image(content: bytes, use: Callable[[Image.Image], Found]) -> Found:
    image = _opened(content)
    with _turn(image.width * image.height), closing(image):  # its pixels are gone before the next one's turn
        return use(image)


def _opened(content: bytes) -> Image.Image:
    """The image with its header read. Raises `UserError` for what is not opened at all."""
    kind = kind_of(content[:HEAD])
    if kind not in Image.OPEN:
        Image.init()
    if kind in _EXTRAS:
        _with_extra(kind)
    elif kind not in READ:
        what = "an empty file" if not content else f"{kind}" if kind else "not an image, or broken"
        raise UserError(f"unreadable image: {what}")
    try:
        # As Image.open, but for its bound of pixels: that one warns on stderr and does not name the size
        image = Image.OPEN[kind][0](io.BytesIO(content), "")
    except (SyntaxError, IndexError, TypeError, struct.error) as error:  # "not a PNG file" and the like
        raise UserError("unreadable image: not an image, or broken") from error
    most = MOST_PIXELS if kind in _IN_STRIPS else MOST_COPIED
    if image.width * image.height > most:
        raise UserError(
            f"unreadable image: {image.width} x {image.height} pixels are more than the {most // 10**6} "
            f"million that are read of {_NAMES.get(kind, kind)}; make it smaller"
        )
    return image


def _with_extra(kind: str) -> None:
    """Make Pillow able to open a kind. Raises `UserError` that names the extra where it is not installed."""
    package, extra = _EXTRAS[kind]
    try:
        module = import_module(package)
    except ImportError as error:
        raise UserError(
            f"unreadable image: {_NAMES[kind]}, whatever its name ends in; install what reads it with "
            f"`pip install 'lcm-kit[{extra}]'`, or export as PNG"
        ) from error
    if kind == "HEIF":
        module.register_heif_opener()


# The C library keeps freed blocks of up to 32 MiB, every thread its own; larger ones are given back at once.
# As the environment variable PILLOW_BLOCK_SIZE, which goes first (Pillow's documentation, Block Allocator).
if "PILLOW_BLOCK_SIZE" not in os.environ:
    Image.core.set_block_size(64 << 20)

_free = _AT_ONCE
_waiting = Condition()


@contextmanager
def _turn(pixels: int) -> Iterator[None]:
    """Wait until so many pixels may be decoded: threads share `_AT_ONCE`, a larger picture takes all."""
    global _free
    wanted = min(pixels, _AT_ONCE)
    with _waiting:
        _waiting.wait_for(lambda: _free >= wanted)
        _free -= wanted
    try:
        yield
    finally:
        with _waiting:
            _free += wanted
            _waiting.notify_all()


_TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")


def without_text(content: bytes) -> bytes:
    """A PNG without its text and its colour profile; a picture is as upright without them if it has eXIf."""
    kept, place = [content[:8]], 8
    while place + 8 <= len(content):
        length, kind = struct.unpack(">I4s", content[place : place + 8])
        if kind not in _TEXTS:
            kept.append(content[place : place + 12 + length])
        place += 12 + length
    return b"".join(kept)
