"""Pictures of the kinds that studios have, in free palettes: what tiny-sd's VAE sees beside the world.

A VAE that has seen one world only draws everything in that world's colours and edges, and no adapter on top
can be better than it. So it sees flat grounds, gradients, fine patterns and cloudy noise, frames, discs,
strokes, lines of text-like marks, glyphs in two inks and glowing outlines, each in any colours. No picture of
a shipped style is among them: those are made by `tools/brand_looks.py`, in fixed inks and one composition.

Pixels are 8-bit RGB, `world.SIZE` x `world.SIZE`; all randomness comes from the generator that is passed in.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageOps

from lcm_kit.tiny import world

_CANVAS = 2 * world.SIZE  # drawn so large, then reduced: edges of any slope, lines thinner than a pixel

Colour = tuple[int, int, int]


def _colour(rng: np.random.Generator) -> Colour:
    """Any colour: half of them evenly over the cube, the others near its edges (inks, darks, lights)."""
    channels = rng.uniform(0, 1, 3)
    if rng.uniform() < 0.5:
        channels = rng.beta(0.5, 0.5, 3)
    red, green, blue = (int(c) for c in np.round(255 * channels))
    return red, green, blue


def _palette(rng: np.random.Generator) -> list[Colour]:
    """Two to five colours that a picture is drawn in; a third of the time shades of one."""
    count = int(rng.integers(2, 6))
    if rng.uniform() < 0.67:
        return [_colour(rng) for _ in range(count)]
    tone = np.array(_colour(rng), float)
    target = 255.0 * rng.integers(0, 2)
    shades = [tone + (target - tone) * share for share in np.sort(rng.uniform(0, 0.9, count))]
    return [(int(r), int(g), int(b)) for r, g, b in shades]


def _pick(rng: np.random.Generator, palette: list[Colour]) -> Colour:
    return palette[int(rng.integers(len(palette)))]


def _mixed(first: Colour, second: Colour, share: np.ndarray) -> Image.Image:
    """`first` where `share` [H, W] is 0, `second` where it is 1."""
    pixels = np.array(first, float) * (1 - share[..., None]) + np.array(second, float) * share[..., None]
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _clouds(rng: np.random.Generator) -> np.ndarray:
    """Noise whose amplitude falls with frequency as in photographs, [H, W] in [0, 1]."""
    frequency = np.hypot(np.fft.fftfreq(_CANVAS)[:, None], np.fft.rfftfreq(_CANVAS)[None])
    frequency[0, 0] = 1
    spectrum = np.fft.rfft2(rng.standard_normal((_CANVAS, _CANVAS))) / frequency ** rng.uniform(0.8, 2)
    spectrum[0, 0] = 0
    noise = np.fft.irfft2(spectrum, (_CANVAS, _CANVAS))
    return np.clip(0.5 + noise / (4 * noise.std()), 0, 1)


def _waves(rng: np.random.Generator) -> np.ndarray:
    """Stripes, checks or dots of any angle and a period of 3 to 20 pixels, [H, W] in [0, 1]."""
    y, x = np.mgrid[:_CANVAS, :_CANVAS] / _CANVAS * world.SIZE
    angle, period = rng.choice([0, np.pi / 2, rng.uniform(0, np.pi)]), np.exp(rng.uniform(1.1, 3))
    along = (x * np.cos(angle) + y * np.sin(angle)) / period + rng.uniform()
    across = (y * np.cos(angle) - x * np.sin(angle)) / period + rng.uniform()
    first, second = np.sin(2 * np.pi * along), np.sin(2 * np.pi * across)
    kind = rng.integers(4)
    value = (first, first * second, first + second - rng.uniform(0, 1), np.maximum(first, second) - 0.6)[kind]
    return np.clip(0.5 + value * rng.choice([0.5, 8]), 0, 1)


def _ground(rng: np.random.Generator, palette: list[Colour]) -> Image.Image:
    first, second = _pick(rng, palette), _pick(rng, palette)
    kind = rng.choice(["flat", "gradient", "waves", "clouds", "colours"], p=(0.4, 0.15, 0.25, 0.1, 0.1))
    if kind == "flat":
        return Image.new("RGB", (_CANVAS, _CANVAS), first)
    if kind == "gradient":
        y, x = np.mgrid[:_CANVAS, :_CANVAS] / _CANVAS - 0.5
        angle = rng.uniform(0, 2 * np.pi)
        ramp = np.hypot(x, y) * 1.4 if rng.uniform() < 0.3 else 0.5 + x * np.cos(angle) + y * np.sin(angle)
        return _mixed(first, second, np.clip(ramp, 0, 1))
    if kind == "waves":
        return _mixed(first, second, _waves(rng))
    if kind == "clouds":
        return _mixed(first, second, _clouds(rng))
    channels = np.stack([_clouds(rng) for _ in range(3)], axis=2)  # a photograph's colours
    return Image.fromarray((255 * channels).astype(np.uint8))


def _box(rng: np.random.Generator) -> tuple[float, float, float, float]:
    x, y = np.sort(rng.uniform(-0.1, 1.1, 2)) * _CANVAS, np.sort(rng.uniform(-0.1, 1.1, 2)) * _CANVAS
    return float(x[0]), float(y[0]), float(x[1]) + 8, float(y[1]) + 8


def _shape(rng: np.random.Generator, canvas: Image.Image, palette: list[Colour]) -> None:
    pen, fill, line = ImageDraw.Draw(canvas), _pick(rng, palette), _pick(rng, palette)
    box = _box(rng)
    narrow = int(min(box[2] - box[0], box[3] - box[1]))
    width = min(int(rng.integers(0, 9)), narrow // 4)
    kind = rng.integers(3)
    if kind == 0:
        pen.ellipse(box, fill=fill, outline=line, width=width)
    elif kind == 1:
        radius = min(float(rng.uniform(0, 20)), narrow / 2 - 2)
        pen.rounded_rectangle(box, radius=radius, fill=fill, outline=line, width=width)
    else:
        corners = rng.uniform(0, _CANVAS, (int(rng.integers(3, 6)), 2))
        pen.polygon([(float(x), float(y)) for x, y in corners], fill=fill)


def _frame(rng: np.random.Generator, canvas: Image.Image, palette: list[Colour]) -> None:
    """One to three nested frames, thin or heavy."""
    pen, inset = ImageDraw.Draw(canvas), float(rng.uniform(0, 10))
    for _ in range(int(rng.integers(1, 4))):
        width, far = int(rng.integers(1, 10)), _CANVAS - 1 - inset
        radius = float(rng.choice([0, rng.uniform(0, 24)]))
        if inset >= _CANVAS / 2 - 12:
            break
        pen.rounded_rectangle((inset, inset, far, far), radius, outline=_pick(rng, palette), width=width)
        inset += width + float(rng.uniform(1, 10))


def _strokes(rng: np.random.Generator, canvas: Image.Image, palette: list[Colour]) -> None:
    pen, ink = ImageDraw.Draw(canvas), _pick(rng, palette)
    for _ in range(int(rng.integers(1, 8))):
        points = rng.uniform(0, _CANVAS, (int(rng.integers(2, 5)), 2))
        pen.line(
            [(float(x), float(y)) for x, y in points],
            fill=ink, width=int(rng.integers(1, 8)), joint="curve",
        )  # fmt: skip


def _marks(rng: np.random.Generator, canvas: Image.Image, palette: list[Colour]) -> None:
    """Lines of small marks, as text looks when it is too small to be read."""
    pen, ink, height = ImageDraw.Draw(canvas), _pick(rng, palette), float(rng.uniform(5, 18))
    y, left = float(rng.uniform(0, _CANVAS)), float(rng.uniform(0, _CANVAS / 2))
    for _ in range(int(rng.integers(1, 5))):
        x, end = left, float(rng.uniform(left, _CANVAS))
        while x < end:
            width, stroke = height * float(rng.uniform(0.3, 0.9)), max(1, round(height / 6))
            kind = rng.integers(4)
            if kind == 0:
                pen.ellipse((x, y, x + width, y + height), outline=ink, width=stroke)
            elif kind == 1:
                pen.line([(x, y), (x, y + height)], fill=ink, width=stroke)
            elif kind == 2:
                pen.line([(x, y + height), (x + width / 2, y), (x + width, y + height)], ink, stroke)
            else:
                pen.line(
                    [(x, y), (x + width, y), (x + width / 2, y), (x + width / 2, y + height)], ink, stroke
                )
            x += width + height * 0.25 + (height * 0.5 if rng.uniform() < 0.2 else 0)
        y += height * 1.5


def _glyph(rng: np.random.Generator, canvas: Image.Image, palette: list[Colour]) -> None:
    """An object as it is, in two inks with an outline, or as a glowing line."""
    side = int(rng.uniform(0.35, 0.9) * _CANVAS)
    glyph = world.glyph(str(rng.choice(world.objects()))).resize((side, side), Image.Resampling.LANCZOS)
    place = (int(rng.uniform(-0.1, 1) * (_CANVAS - side)), int(rng.uniform(-0.1, 1) * (_CANVAS - side)))
    alpha, kind = glyph.getchannel("A"), rng.integers(3)
    if kind == 0:
        canvas.paste(glyph, place, glyph)
        return
    hard = alpha.point(lambda a: 255 if a > 100 else 0)
    grey = ImageOps.autocontrast(ImageOps.grayscale(glyph.convert("RGB")), mask=hard)
    if kind == 1:
        outline = hard.filter(ImageFilter.MaxFilter(int(rng.choice([3, 5, 7]))))
        dark, light = _pick(rng, palette), _pick(rng, palette)
        print_ = _mixed(dark, light, (np.asarray(grey) > rng.uniform(80, 170)).astype(float))
        canvas.paste(Image.new("RGB", (side, side), dark), place, outline)
        canvas.paste(print_, place, hard)
        return
    edge = ImageChops.subtract(hard.filter(ImageFilter.MaxFilter(5)), hard.filter(ImageFilter.MinFilter(3)))
    whole = Image.new("L", canvas.size, 0)
    whole.paste(edge, place)
    glow = whole.filter(ImageFilter.GaussianBlur(float(rng.uniform(1, 8))))
    ink = Image.new("RGB", canvas.size, _pick(rng, palette))
    canvas.paste(ink, (0, 0), glow.point(lambda v: min(255, 2 * v)))
    canvas.paste(Image.new("RGB", canvas.size, _pick(rng, palette)), (0, 0), whole)


_ELEMENTS = (_shape, _frame, _strokes, _marks, _glyph)
_OFTEN = (0.25, 0.2, 0.15, 0.15, 0.25)


def studio_picture(rng: np.random.Generator) -> Image.Image:
    """One picture, RGB, `world.SIZE` x `world.SIZE` pixels."""
    palette = _palette(rng)
    canvas = _ground(rng, palette)
    for index in rng.choice(len(_ELEMENTS), int(rng.integers(1, 6)), p=_OFTEN):
        _ELEMENTS[index](rng, canvas, palette)
    if rng.uniform() < 0.12:  # out of focus
        canvas = canvas.filter(ImageFilter.GaussianBlur(float(rng.uniform(1, 4))))
    picture = canvas.resize((world.SIZE, world.SIZE), Image.Resampling.LANCZOS)
    if rng.uniform() < 0.12:  # grain
        pixels = np.asarray(picture, float)
        grain = rng.standard_normal(pixels.shape) * rng.uniform(2, 12)
        picture = Image.fromarray(np.clip(pixels + grain, 0, 255).astype(np.uint8))
    return picture
