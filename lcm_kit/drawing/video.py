"""Frames as MP4: H.264 in 4:2:0, which browsers and telephones play, in the colours of the pictures.

Y'CbCr is made here, by the formula of BT.709 in limited range, and the file says so in H.264's VUI and in the
container: what is not tagged is taken for BT.601 by some players and for BT.709 by others, which shifts pure
colours by some 20 levels. Colours are averaged where H.264 puts them if nothing else is said: between two
rows, at the left of two columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lcm_kit.errors import UserError, first_line

_RED, _BLUE = 0.2126, 0.0722  # of BT.709's luma; the rest is green's
_BT709, _LIMITED = 1, 1  # as H.264 numbers matrix, primaries and transfer, and FFmpeg the range
# What a quality of 12 loses is less than what 4:2:0 does (docs/editing.md). No frame refers to later ones, so
# that the clip is exactly as long as its frames
_QUALITY = {"crf": "12", "preset": "slow", "bf": "0"}


def library() -> Any:
    """PyAV. Raises `UserError` where it is not installed, or has no encoder for H.264."""
    try:
        import av
    except ImportError as error:
        raise UserError(
            "an MP4 needs the library av; install it with `pip install 'lcm-kit[video]'`, or give a .gif or "
            ".webp"
        ) from error
    if "libx264" not in av.codecs_available:
        raise UserError(
            "the library av is installed without libx264, which makes H.264; install its wheel from PyPI, or "
            "give a .gif or .webp"
        )
    return av


def even(size: tuple[int, int]) -> tuple[int, int]:
    """The (width, height) that is drawn on: 4:2:0 has one colour for 2 x 2 pixels."""
    return size[0] + size[0] % 2, size[1] + size[1] % 2


def write_mp4(frames: Sequence[Image.Image], file: Path, fps: float) -> None:
    """Write RGB `frames` of one size, each for 1 / `fps` seconds; odd sides get their edge twice.

    Raises `UserError` as `library`, and where FFmpeg refuses.
    """
    av = library()
    width, height = even(frames[0].size)
    try:
        with av.open(str(file), "w", format="mp4", options={"movflags": "+faststart"}) as container:
            stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.options = dict(_QUALITY)
            _tag(stream.codec_context)
            stream.codec_context.color_primaries = stream.codec_context.color_trc = _BT709
            for number, picture in enumerate(frames):
                frame = av.VideoFrame.from_ndarray(yuv420(np.asarray(picture.convert("RGB"))), "yuv420p")
                _tag(frame)
                frame.pts, frame.time_base = number, 1 / stream.codec_context.framerate
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    except av.error.FFmpegError as error:
        raise UserError(f"{file.name} cannot be written as MP4 ({first_line(error)})") from error


def _tag(what: Any) -> None:
    what.colorspace, what.color_range = _BT709, _LIMITED


def yuv420(rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """8-bit RGB [H, W, 3] as planes of 8-bit Y'CbCr one after the other, [1.5 H', W'], of even H' and W'.

    BT.709 (ITU-R BT.709-6, 3.2 and 4.2), Y' from 16 to 235, Cb and Cr from 16 to 240.
    """
    height, width = rgb.shape[:2]
    rgb = np.pad(rgb, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    red, green, blue = np.moveaxis(rgb.astype(np.float32) / 255, -1, 0)
    luma = _RED * red + (1 - _RED - _BLUE) * green + _BLUE * blue
    planes = [219 * luma + 16]
    for colour, weight in ((blue, _BLUE), (red, _RED)):
        planes.append(_halved(224 * (colour - luma) / (2 * (1 - weight)) + 128))
    flat = np.concatenate([plane.ravel() for plane in planes])
    return flat.round().clip(0, 255).astype(np.uint8).reshape(-1, luma.shape[1])


def _halved(plane: NDArray[np.floating]) -> NDArray[np.floating]:
    """[H, W] at half the size: the mean of two rows, and of columns 1/4, 1/2, 1/4 around every second one."""
    rows = (plane[::2] + plane[1::2]) / 2
    beside = np.pad(rows, ((0, 0), (1, 0)), mode="edge")
    return (beside[:, :-1:2] + 2 * beside[:, 1::2] + beside[:, 2::2]) / 4
