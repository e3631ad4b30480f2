"""What is left of frames in a GIF, a WebP and an MP4, and why GIFs are made as they are.

    OMP_NUM_THREADS=2 python -m studies.animations [--frames 16] [--folder FOLDER]

Frames are tiny-sd's between two pictures of the embedded world, as drawn (64 x 64, whose colours change from
pixel to pixel) and enlarged to 256 x 256 (bicubic: as smooth as pictures of that size are), and a smooth sky
that drifts above a fixed ground, in which bands show. Of each file its size; its PSNR; what a window of 5 x 5
pixels sees of the error, root mean square in levels of 255 (bands), and of the error's change from frame to
frame (flicker). MP4s are decoded by their tags, colours nearest. The rows of GIF are made of Pillow's
palettes: by median cut, bettered by k-means, or by octree; one of all frames or one each; with and without
the errors spread. Figures stand in docs/editing.md; with --folder the files and their frames stay there.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image

import lcm_kit
from lcm_kit.drawing.pictures import contact_sheet, save_png
from lcm_kit.drawing.video import library
from lcm_kit.tiny import world

Frames = Sequence[Image.Image]
MEDIAN, OCTREE = Image.Quantize.MEDIANCUT, Image.Quantize.FASTOCTREE
PALETTES = {"median cut": (MEDIAN, 0), "median cut, k-means": (MEDIAN, 2), "octree": (OCTREE, 0)}


def drawn(count: int) -> list[Image.Image]:
    """Frames from a fox to a cat."""
    ends = [world.Scene("fox", "blue", "plain"), world.Scene("cat", "red", "striped")]
    texts = ["a large fox on a plain blue background", "a large cat on a striped red background"]
    first, last = (world.render(scene) for scene in ends)
    return lcm_kit.edit(
        "interpolate", first, texts[0], to=last, prompt_to=texts[1], frames=count, base="asset:tiny-sd",
        adapter="asset:tiny-lcm-lora", seed=1, device="cpu",
    )  # fmt: skip


def sky(count: int, side: int = 256) -> list[Image.Image]:
    """Smooth colours that drift, above others that do not."""
    y, x = np.mgrid[0:side, 0:side] / side
    ground = np.stack([120 + 100 * x, 80 + 60 * y, 60 + 50 * x * y], -1)
    made = []
    for k in range(count):
        waves = 30 * np.sin(3 * x + k / count), 20 * np.cos(2 * x + k / count)
        above = np.stack([40 + 60 * y + waves[0], 90 + 80 * y + 20 * x, 200 - 60 * y + waves[1]], -1)
        made.append(np.where(y[..., None] < 0.5, above, ground).round().clip(0, 255).astype(np.uint8))
    return [*map(Image.fromarray, made)]


# -- Reading back --------------------------------------------------------------------------------------------


def array(frames: Frames) -> Any:
    """[n, H, W, 3]."""
    return np.stack([np.asarray(frame.convert("RGB"), dtype=float) for frame in frames])


def read(file: Path) -> Any:
    """The frames of a file, [n, H, W, 3] in levels."""
    if file.suffix != ".mp4":
        with Image.open(file) as opened:
            found = []
            for k in range(opened.n_frames):  # type: ignore[attr-defined]
                opened.seek(k)
                found.append(opened.convert("RGB"))
            return array(found)
    with library().open(str(file)) as opened:
        return np.stack([_rgb(frame.to_ndarray(), frame.height) for frame in opened.decode(video=0)])


def _rgb(planes: Any, height: int) -> Any:
    """Y'CbCr of BT.709 in limited range, each colour for 2 x 2 pixels."""
    red, blue, width = 0.2126, 0.0722, planes.shape[1]
    y = (planes[:height].astype(float) - 16) / 219
    small = planes[height:].reshape(2, height // 2, width // 2).repeat(2, 1).repeat(2, 2)
    cb, cr = (small.astype(float) - 128) / 224
    r, b = y + 2 * (1 - red) * cr, y + 2 * (1 - blue) * cb
    return (255 * np.stack([r, (y - red * r - blue * b) / (1 - red - blue), b], -1)).clip(0, 255)


def told(size: int, found: Any, wanted: Any) -> str:
    """A row's figures."""
    error = found - wanted
    mean = float((error**2).mean())
    psnr = f"{10 * np.log10(255**2 / mean):.1f}" if mean else "exact"
    return f"{size / 1000:.0f} | {psnr} | {seen(error):.2f} | {seen(np.diff(error, axis=0)):.2f}"


def seen(error: Any) -> float:
    """Root mean square of the means of 5 x 5 pixels."""
    return float(np.sqrt((sliding_window_view(error, (5, 5), axis=(1, 2)).mean((-1, -2)) ** 2).mean()))


# -- The ways ------------------------------------------------------------------------------------------------


def gifs(frames: Frames, folder: Path) -> Iterator[tuple[str, Path]]:
    """Every way to make a GIF with Pillow's palettes."""
    for name, (method, rounds) in PALETTES.items():
        whole = Image.fromarray(array(frames).astype(np.uint8).reshape(-1, frames[0].width, 3))
        one = whole.quantize(256, method=method, kmeans=rounds)
        for each in (False, True):
            for dither in (Image.Dither.NONE, Image.Dither.FLOYDSTEINBERG):
                made = []
                for frame in frames:
                    palette = frame.quantize(256, method=method, kmeans=rounds) if each else one
                    made.append(frame.quantize(palette=palette, dither=dither))
                file = folder / "tried.gif"
                made[0].save(file, save_all=True, append_images=made[1:], duration=120, loop=0)
                spread = "spread" if dither else "as they are"
                yield f"GIF: {name}, {'a palette each' if each else 'one palette'}, errors {spread}", file


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--folder", type=Path)
    asked = parser.parse_args()
    small = drawn(asked.frames)
    large = [frame.resize((256, 256), Image.Resampling.BICUBIC) for frame in small]
    sets = {"drawn-64": small, "drawn-256": large, "sky-256": sky(min(asked.frames, 8))}
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for name, frames in sets.items():
            print(f"\n{name}, {len(frames)} frames\n\n| file | kB | PSNR | seen | flicker |\n|{' --- |' * 5}")
            wanted = array(frames)
            for kind in ("gif", "webp", "mp4"):
                file = lcm_kit.save_animation(frames, folder / f"{name}.{kind}")
                found = read(file)
                print(f"| {kind} | {told(file.stat().st_size, found, wanted)} |", flush=True)
                if asked.folder:
                    pictures = [*map(Image.fromarray, found.round().astype(np.uint8))]
                    save_png(contact_sheet(pictures, 8), folder / f"{name}-{kind}.png")
            for way, file in gifs(frames, folder):
                print(f"| {way} | {told(file.stat().st_size, read(file), wanted)} |", flush=True)


if __name__ == "__main__":
    main()
