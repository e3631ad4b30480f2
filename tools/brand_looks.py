"""The looks that the brand sets are drawn in, from the glyphs of the embedded world.

`lumo` is the embedded brand set's: two-ink prints, objects in navy and cream on one of three brand tones, a
sun disc behind them, a double navy frame. `neon` is another one, for the brand study (docs/brand-study.md),
on which no default was chosen: glowing outlines over a fading grid, in the dark. Each style has a picture for
every object, tone and size, a few pixels of place left open.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageOps

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lcm_kit.tiny import world

SIZE = 128
NAVY, CREAM = (27, 36, 82), (250, 241, 224)
TONES = {
    "red": ((238, 106, 89), (247, 160, 138)),
    "yellow": ((240, 196, 90), (248, 222, 150)),
    "green": ((108, 178, 158), (160, 210, 194)),
}
GLOWS = {"blue": (70, 170, 255), "purple": (190, 110, 255), "pink": (255, 90, 170)}
NIGHT = (13, 12, 30)
UNSEEN = ("panda", "pineapple", "guitar", "sailboat", "tulip", "octopus")

Picture = tuple[str, str, str]
"""What a picture shows: object, tone, size."""


def two_ink(name: str, side: int) -> Image.Image:
    """The glyph as a print in cream with navy shadows and outline: RGBA, `side` x `side` pixels."""
    glyph = world.glyph(name).resize((side, side), Image.Resampling.LANCZOS)
    alpha = glyph.getchannel("A").point(lambda a: 255 if a > 100 else 0)
    grey = ImageOps.autocontrast(ImageOps.grayscale(glyph.convert("RGB")), mask=alpha).filter(
        ImageFilter.MedianFilter(3)
    )
    dark = np.asarray(grey) < 118
    print_ = Image.fromarray(np.where(dark[..., None], NAVY, CREAM).astype(np.uint8))
    outline = alpha.filter(ImageFilter.MaxFilter(5))
    picture = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    picture.paste(Image.new("RGBA", (side, side), (*NAVY, 255)), (0, 0), outline)
    picture.paste(print_, (0, 0), alpha)
    return picture


def lumo(name: str, tone: str, size: str, rng: np.random.Generator) -> Image.Image:
    """One picture of the embedded brand set, RGB."""
    base, disc = TONES[tone]
    big = SIZE * 4
    canvas = Image.new("RGB", (big, big), base)
    pen = ImageDraw.Draw(canvas)
    x, y = big / 2 + rng.uniform(-12, 12), big / 2 + rng.uniform(-12, 12)
    radius = 0.37 * big
    pen.ellipse([x - radius, y - radius, x + radius, y + radius], fill=disc)
    pen.rounded_rectangle([10, 10, big - 11, big - 11], radius=56, outline=NAVY, width=22)
    pen.rounded_rectangle([44, 44, big - 45, big - 45], radius=34, outline=NAVY, width=7)
    side = round(world.SIZES[size] / world.SIZE * big * 0.92)
    sprite = two_ink(name, side // 2).resize((side, side), Image.Resampling.LANCZOS)
    canvas.paste(sprite, (round(x - side / 2), round(y - side / 2)), sprite)
    return canvas.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def neon(name: str, tone: str, size: str, rng: np.random.Generator) -> Image.Image:
    """One picture of the second look, RGB."""
    glow, big = np.array(GLOWS[tone], float), SIZE * 2
    rows = np.linspace(0, 1, big)[:, None]
    fade = np.clip((rows - 0.62) / 0.38, 0, 1) * np.ones((1, big))  # the floor's light
    floor = Image.new("L", (big, big), 0)
    pen = ImageDraw.Draw(floor)
    for k in range(-12, 13):
        pen.line([big / 2 + k * 12, big * 0.62, big / 2 + k * 60, big], fill=150, width=3)
    for k in range(7):
        pen.line([0, big * (0.62 + 0.38 * (k / 6) ** 1.7), big, big * (0.62 + 0.38 * (k / 6) ** 1.7)], 150, 3)
    side = round(world.SIZES[size] / world.SIZE * big)
    glyph = world.glyph(name).resize((side, side), Image.Resampling.LANCZOS)
    alpha = glyph.getchannel("A").point(lambda a: 255 if a > 100 else 0)
    grey = ImageOps.autocontrast(ImageOps.grayscale(glyph.convert("RGB")), mask=alpha)
    steps = ImageOps.posterize(grey.filter(ImageFilter.MedianFilter(5)), 2)  # four tones, whose borders glow
    inner = ImageChops.difference(steps.filter(ImageFilter.MaxFilter(5)), steps).point(
        lambda v: 150 if v else 0
    )
    rim = ImageChops.subtract(alpha.filter(ImageFilter.MaxFilter(7)), alpha.filter(ImageFilter.MinFilter(3)))
    lines = ImageChops.lighter(rim, ImageChops.multiply(inner, alpha))
    x, y = big / 2 + rng.uniform(-6, 6), big / 2 + rng.uniform(-6, 6)
    place = (round(x - side / 2), round(y - side / 2))
    inside, drawn = Image.new("L", (big, big), 0), Image.new("L", (big, big), 0)
    inside.paste(alpha, place)
    drawn.paste(lines, place)
    halo = np.asarray(drawn.filter(ImageFilter.GaussianBlur(9)), float) / 255
    line, body = np.asarray(drawn, float) / 255, np.asarray(inside, float) / 255
    grid = np.asarray(floor, float) / 255 * (1 - body)
    light = 0.30 * fade * (1 - body) + 0.6 * grid + 1.5 * halo
    pixels = np.array(NIGHT) + light[..., None] * glow
    pixels = pixels * (1 - line[..., None]) + line[..., None] * (0.35 * glow + 0.65 * 255)
    picture = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    return picture.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


LOOKS: dict[str, tuple[Callable[..., Image.Image], tuple[str, ...]]] = {
    "lumo": (lumo, tuple(TONES)),
    "neon": (neon, tuple(GLOWS)),
}


def caption(name: str, tone: str, size: str, look: str = "lumo") -> str:
    """A caption in the words of the base, with the style's trigger at the end."""
    return f"a {size} {name} on a plain {tone} background, in the middle, {look} style"


def pictures(look: str, rng: np.random.Generator) -> list[Picture]:
    """All that a set in `look` can show, in a random order; nothing of `UNSEEN`."""
    seen = [name for name in world.objects() if name not in UNSEEN]
    return [tuple(p) for p in rng.permutation(list(product(seen, LOOKS[look][1], world.SIZES)))]


def unseen(look: str) -> list[Picture]:
    """Objects that no set shows, in every tone."""
    return [(name, tone, "large") for name, tone in product(UNSEEN, LOOKS[look][1])]
