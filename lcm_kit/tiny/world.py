"""The world that tiny-sd draws: one named object on a patterned, coloured background.

Every attribute of a picture is known, so a probe can say whether a sample shows what its prompt asked for.
What the caption does not say (the pattern's phase, a few pixels of place) varies freely: a sampler that takes
too few steps shows the mean of those possibilities, a blur, which is what distillation has to avoid.

Pixels are 8-bit RGB, `SIZE` x `SIZE`. All randomness comes from the `numpy.random.Generator` that is passed
in. The glyphs are Noto Color Emoji images (Apache-2.0, Google Inc.); see `lcm_kit/assets/glyphs/README.md`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources

import numpy as np
from PIL import Image, ImageDraw

SIZE = 64
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (205, 62, 58),
    "orange": (236, 140, 52),
    "yellow": (238, 205, 74),
    "green": (84, 164, 84),
    "blue": (66, 116, 208),
    "purple": (138, 84, 178),
    "pink": (236, 146, 178),
    "grey": (128, 132, 138),
}
PATTERNS = ("plain", "striped", "dotted", "checkered")
SIZES = {"small": 36, "large": 46}  # pixels, the glyph's longer side
PLACES = {  # (x, y): the side that the object moves to
    "on the left": (-1, 0),
    "in the middle": (0, 0),
    "on the right": (1, 0),
    "at the top": (0, -1),
    "at the bottom": (0, 1),
}
_SUPERSAMPLE = 2  # patterns and glyphs are drawn this much larger, then reduced: no jagged edges
_INK = 0.55  # share of white in the pattern's ink


@dataclass(frozen=True)
class Scene:
    """One picture: what its caption says, and after that what it leaves open (pixels at `SIZE`)."""

    object: str
    colour: str
    pattern: str
    size: str = "large"
    place: str = "in the middle"
    dx: float = 0.0
    dy: float = 0.0
    phase: tuple[float, float] = (0.0, 0.0)  # shift of the pattern, in periods

    @property
    def prompt(self) -> str:
        """The full caption, every attribute named."""
        article = "an" if self.object[0] in "aeiou" else "a"
        noun = f"a {self.size} {self.object}" if self.size else f"{article} {self.object}"
        place = f", {self.place}" if self.place else ""
        return f"{noun} on a {self.pattern} {self.colour} background{place}"


@cache
def _sheet() -> tuple[Image.Image, dict[str, dict[str, object]]]:
    folder = resources.files("lcm_kit") / "assets" / "glyphs"
    with (folder / "glyphs.json").open() as handle:
        table = json.load(handle)
    with (folder / "sheet.png").open("rb") as handle:
        return Image.open(handle).convert("RGBA"), table["objects"]


def objects() -> tuple[str, ...]:
    """The names of the objects, in the order of the probe's classes."""
    return tuple(_sheet()[1])


@cache
def glyph(name: str) -> Image.Image:
    """The picture of one object: RGBA, 128 x 128 pixels, transparent around the object."""
    sheet, table = _sheet()
    if name not in table:
        raise ValueError(f"object {name!r} is not in this world; it has {', '.join(table)}")
    index, cell = list(table).index(name), 128
    x, y = cell * (index % 8), cell * (index // 8)
    return sheet.crop((x, y, x + cell, y + cell))


def random_scene(rng: np.random.Generator) -> Scene:
    """A scene drawn uniformly over all attributes."""
    return Scene(
        object=str(rng.choice(objects())),
        colour=str(rng.choice(list(COLOURS))),
        pattern=str(rng.choice(PATTERNS)),
        size=str(rng.choice(list(SIZES))),
        place=str(rng.choice(list(PLACES))),
        dx=float(rng.uniform(-2, 2)),
        dy=float(rng.uniform(-3, 3)),
        phase=(float(rng.uniform()), float(rng.uniform())),
    )


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """A caption of `scene`; size and place go unsaid a quarter of the time each, as people leave them out."""
    from dataclasses import replace

    size = "" if rng.uniform() < 0.25 else scene.size
    place = "" if rng.uniform() < 0.25 else scene.place
    return replace(scene, size=size, place=place).prompt


def background(scene: Scene, size: int = SIZE) -> Image.Image:
    """The background alone, RGB, `size` x `size` pixels."""
    full = size * _SUPERSAMPLE
    unit = full / SIZE  # canvas pixels for one pixel of the world
    base = COLOURS[scene.colour]
    light = tuple(round(c + (255 - c) * _INK) for c in base)
    canvas = Image.new("RGB", (full, full), base)
    draw = ImageDraw.Draw(canvas)
    if scene.pattern == "striped":
        period = 12 * unit
        for k in range(-1, int(2 * full / period) + 1):
            x = (k + scene.phase[0]) * period
            draw.polygon(
                [(x, 0), (x + period / 2, 0), (x + period / 2 - full, full), (x - full, full)], fill=light
            )
    elif scene.pattern == "dotted":
        period, radius = 12 * unit, 3.2 * unit
        for i in range(-1, 8):
            for j in range(-1, 8):
                x, y = (i + scene.phase[0]) * period, (j + scene.phase[1]) * period
                draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=light)
    elif scene.pattern == "checkered":
        period = 16 * unit
        for i in range(-1, 6):
            for j in range(-1, 6):
                for half in (0.0, 0.5):
                    x, y = (i + scene.phase[0] + half) * period, (j + scene.phase[1] + half) * period
                    draw.rectangle([x, y, x + period / 2 - 1, y + period / 2 - 1], fill=light)
    elif scene.pattern != "plain":
        raise ValueError(f"pattern {scene.pattern!r} is not in this world; it has {', '.join(PATTERNS)}")
    return canvas.resize((size, size), Image.Resampling.LANCZOS)


def centre(scene: Scene) -> tuple[float, float]:
    """The object's centre in pixels of the world, (x, y)."""
    room = (SIZE - SIZES[scene.size or "large"]) / 2
    x, y = PLACES[scene.place or "in the middle"]
    return SIZE / 2 + x * room * 0.8 + scene.dx, SIZE / 2 + y * room * 0.8 + scene.dy


def render(scene: Scene, size: int = SIZE) -> Image.Image:
    """The picture of `scene`, RGB, `size` x `size` pixels."""
    picture = background(scene, size)
    side = round(SIZES[scene.size or "large"] * size / SIZE)
    sprite = glyph(scene.object).resize((side, side), Image.Resampling.LANCZOS)
    x, y = centre(scene)
    picture.paste(sprite, (round(x * size / SIZE - side / 2), round(y * size / SIZE - side / 2)), sprite)
    return picture


def parse(prompt: str) -> Scene | None:
    """The scene that a prompt names, or None if it names no object, colour and pattern of this world.

    Words around them (a style, a trigger) are passed over; size and place are "" where the prompt leaves them
    out.
    """
    words = set(prompt.lower().replace(",", " ").split())
    nouns = [name for name in objects() if name in words]
    before, found, _ = prompt.lower().partition(" background")
    tail = before.split()[-2:]
    if len(nouns) != 1 or not found or len(tail) != 2 or tail[0] not in PATTERNS or tail[1] not in COLOURS:
        return None
    size = next((size for size in SIZES if size in words), "")
    place = next((place for place in PLACES if place in prompt.lower()), "")
    return Scene(object=nouns[0], pattern=tail[0], colour=tail[1], size=size, place=place)
