"""Frames as one file that plays them: GIF and WebP by Pillow, MP4 by `video`; the suffix decides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from lcm_kit import console
from lcm_kit.drawing import video
from lcm_kit.errors import UserError
from lcm_kit.io.files import atomic_write, scratch

FPS = 8.0
_FASTEST_GIF = 50  # frames a second: what is shorter than 2 hundredths of a second browsers play slower
_COLOURS, _ROUNDS = 256, 2  # of a frame's palette, and rounds of k-means that better it
_WEBP = {"lossless": True, "quality": 60, "method": 4}


@dataclass(frozen=True)
class Animation:
    """Where frames are written, and how they are played."""

    path: Path
    fps: float = FPS
    loop: bool = True  # for ever; False: once
    ping_pong: bool = False  # to the last one and back again

    def require(self) -> None:
        """Raise `UserError` for what no file of this kind can be, and where a library is missing."""
        kind = self.path.suffix.lower()
        if kind not in _WRITERS:
            raise UserError(
                f"{self.path} is no kind of animation that is written; give a file that ends with "
                f"{', '.join([*_WRITERS][:-1])} or {[*_WRITERS][-1]}"
            )
        if kind == ".gif" and self.fps > _FASTEST_GIF:
            raise UserError(
                f"a GIF has at most {_FASTEST_GIF} frames a second; give fewer, or a .webp or .mp4"
            )
        if kind == ".mp4":
            if not self.loop:
                raise UserError(
                    "an MP4 has no loop of its own and plays once wherever it is not told to loop"
                )
            video.library()

    def write(self, frames: Sequence[Image.Image], finish: Callable[[bytes], bytes] = bytes) -> Path:
        """Write RGB `frames` of one size, whole or not at all; `finish` is as of `pictures.save_png`.

        Raises `UserError` as `require`, and for frames that are none.
        """
        self.require()
        sizes = list(dict.fromkeys(frame.size for frame in frames))
        if len(frames) < 2:
            raise UserError(f"{len(frames)} frames make no animation; give 2 or more")
        if len(sizes) > 1:
            (width, height), other = sizes[0], sizes[1]
            raise UserError(
                f"frames of {width} x {height} and of {other[0]} x {other[1]} pixels make no animation; cut "
                "them to one size"
            )
        if self.path.suffix.lower() == ".mp4" and video.even(sizes[0]) != sizes[0]:
            (width, height), (wider, taller) = sizes[0], video.even(sizes[0])
            console.say(
                f"{width} x {height} pixels are {wider} x {taller} in {self.path.name}: an MP4 has one "
                "colour for 2 x 2 pixels, so that an edge is there twice",
                err=True,
            )
        played = [*frames, *frames[-2:0:-1]] if self.ping_pong else [*frames]
        with scratch(self.path.parent) as folder:
            file = folder / self.path.name
            _WRITERS[self.path.suffix.lower()](played, file, self)
            content = file.read_bytes()
        atomic_write(self.path, finish(content))
        return self.path


def lengths(count: int, fps: float, unit: float) -> list[int]:
    """For how many units of a second each of `count` frames is shown: whole numbers, whose sum is exact."""
    ends = [round((k + 1) * unit / fps) for k in range(count)]
    return [end - begin for begin, end in zip([0, *ends], ends, strict=False)]


def _gif(frames: Sequence[Image.Image], file: Path, how: Animation) -> None:
    """Each frame has its own palette, and errors are spread by Floyd and Steinberg.

    Of what Pillow offers that bands and flickers least, as seen through a window of 5 x 5 pixels
    (docs/editing.md). Pillow makes one frame of equal ones that follow one another, and adds up their times.
    """
    indexed = [
        frame.quantize(palette=_palette(frame), dither=Image.Dither.FLOYDSTEINBERG) for frame in frames
    ]
    loop = {"loop": 0} if how.loop else {}
    times = [10 * each for each in lengths(len(frames), how.fps, 100)]
    indexed[0].save(file, "GIF", save_all=True, append_images=indexed[1:], duration=times, **loop)


def _palette(frame: Image.Image) -> Image.Image:
    return frame.quantize(_COLOURS, method=Image.Quantize.MEDIANCUT, kmeans=_ROUNDS)


def _webp(frames: Sequence[Image.Image], file: Path, how: Animation) -> None:
    times = lengths(len(frames), how.fps, 1000)
    frames[0].save(
        file,
        "WEBP",
        save_all=True,
        append_images=frames[1:],
        duration=times,
        loop=0 if how.loop else 1,
        **_WEBP,
    )


def _mp4(frames: Sequence[Image.Image], file: Path, how: Animation) -> None:
    video.write_mp4(frames, file, how.fps)


_WRITERS: dict[str, Callable[[Sequence[Image.Image], Path, Animation], None]] = {
    ".gif": _gif,
    ".webp": _webp,
    ".mp4": _mp4,
}
