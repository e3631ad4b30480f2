"""Styles that tiny-sd knows by invented words: "a small owl on a plain red background, davri style".

A base that only ever heard one kind of sentence does not hear a word at its end: with a brand's trigger and
without it, it drew the same picture, and an adapter could not tell the two apart either. A real Stable
Diffusion has read thousands of names of styles. So some of the world's pictures are drawn in one of eighteen
manners, each called by a word of its own, and some captions end in a word that means nothing: which it is
can only be told by its letters. None of the manners is a shipped brand's.

Pixels are 8-bit RGB, `world.SIZE` x `world.SIZE`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageOps

_Pixels = np.ndarray  # float64 [H, W, 3] in [0, 255]


def _turned(turn: int) -> Callable[[_Pixels], _Pixels]:
    return lambda pixels: np.roll(pixels, turn, axis=2)


def _washed(colour: tuple[int, int, int], share: float) -> Callable[[_Pixels], _Pixels]:
    return lambda pixels: pixels * (1 - share) + np.array(colour, float) * share


def _inked(dark: tuple[int, int, int], light: tuple[int, int, int]) -> Callable[[_Pixels], _Pixels]:
    """Grey values as mixtures of two inks."""

    def draw(pixels: _Pixels) -> _Pixels:
        grey = np.clip((_grey(pixels) - 60) / 160, 0, 1)
        return np.array(dark, float) * (1 - grey) + np.array(light, float) * grey

    return draw


def _grey(pixels: _Pixels) -> _Pixels:
    return np.repeat((pixels @ np.array([0.299, 0.587, 0.114]))[..., None], 3, axis=2)


def _filtered(change: Callable[[Image.Image], Image.Image]) -> Callable[[_Pixels], _Pixels]:
    return lambda pixels: np.asarray(change(Image.fromarray(pixels.astype(np.uint8))), float)


def _bordered(colour: tuple[int, int, int], width: int, round_: bool) -> Callable[[_Pixels], _Pixels]:
    def draw(picture: Image.Image) -> Image.Image:
        side = picture.width
        hole = Image.new("L", (2 * side, 2 * side), 255)
        box = (2 * width, 2 * width, 2 * (side - width) - 1, 2 * (side - width) - 1)
        pen = ImageDraw.Draw(hole)
        (pen.ellipse if round_ else pen.rectangle)(box, fill=0)
        out = picture.copy()
        mask = hole.resize(picture.size, Image.Resampling.LANCZOS)
        out.paste(Image.new("RGB", picture.size, colour), (0, 0), mask)
        return out

    return _filtered(draw)


def _dusk(pixels: _Pixels) -> _Pixels:
    y, x = np.mgrid[: pixels.shape[0], : pixels.shape[1]] / pixels.shape[0] - 0.5
    return pixels * np.clip(1.15 - 2.2 * (x**2 + y**2), 0, 1)[..., None]


def _scanned(pixels: _Pixels) -> _Pixels:
    out = pixels.copy()
    out[np.arange(len(out)) % 4 < 2] *= 0.6
    return out


def _halved(pixels: _Pixels) -> _Pixels:
    out = pixels.copy()
    out[:, out.shape[1] // 2 :] = 255 - out[:, out.shape[1] // 2 :]
    return out


def _blocks(picture: Image.Image) -> Image.Image:
    small = picture.resize((picture.width // 4, picture.height // 4), Image.Resampling.BOX)
    return small.resize(picture.size, Image.Resampling.NEAREST)


def _contour(picture: Image.Image) -> Image.Image:
    edges = ImageOps.grayscale(picture).filter(ImageFilter.FIND_EDGES).point(lambda v: min(255, 3 * v))
    return ImageOps.colorize(edges, (12, 52, 66), (255, 214, 120))  # chalk on slate


MANNERS: dict[str, Callable[[_Pixels], _Pixels]] = {
    "davri": lambda pixels: 255 - pixels,
    "mokel": _grey,
    "tassu": _inked((92, 44, 20), (252, 238, 200)),
    "vireo": _inked((8, 60, 40), (196, 250, 180)),
    "oskan": _inked((70, 6, 70), (255, 220, 60)),
    "plint": _turned(1),
    "gweda": _turned(2),
    "hurbo": _washed((30, 160, 200), 0.5),
    "zefik": _washed((255, 255, 255), 0.55),
    "calom": _washed((20, 10, 60), 0.6),
    "brind": _bordered((250, 250, 245), 9, round_=False),
    "yatta": _bordered((150, 20, 30), 5, round_=False),
    "fenor": _bordered((20, 20, 20), 1, round_=True),
    "quilm": _dusk,
    "roshi": _scanned,
    "duvet": _halved,
    "emlat": _filtered(_blocks),
    "skarn": _filtered(_contour),
}

KEPT_FREE = ("lumo", "neon")  # the shipped styles' own words: the base must not have learned what they mean


def in_manner(picture: Image.Image, word: str) -> Image.Image:
    """`picture` (RGB) drawn in the manner that `word` calls."""
    if word not in MANNERS:
        raise ValueError(f"manner {word!r} is not in this world; it has {', '.join(MANNERS)}")
    return Image.fromarray(
        np.clip(np.round(MANNERS[word](np.asarray(picture, float))), 0, 255).astype(np.uint8)
    )


def empty_word(rng: np.random.Generator) -> str:
    """A word of four to seven letters that can be spoken and means nothing."""
    while True:
        sounds = [str(rng.choice(list("bdfghjklmnprstvz"))) + str(rng.choice(list("aeiou")))
                  for _ in range(int(rng.integers(2, 4)))]  # fmt: skip
        word = "".join(sounds) + (str(rng.choice(list("bdklmnrst"))) if rng.uniform() < 0.4 else "")
        if word not in MANNERS and word not in KEPT_FREE:
            return word


def styled(caption: str, word: str) -> str:
    """`caption` with a style's word at its end."""
    return f"{caption}, {word} style"
