"""Draw the embedded brand set: the look of "Lumo", which the base does not draw.

    python tools/make_brand.py

Two-ink prints: objects in navy and cream on one of three brand tones, a sun disc behind them, a double navy
frame. Writes lcm_kit/assets/brand/NNN-object.png (128 x 128 pixels) with NNN-object.txt beside each, and
prompts.txt: held-out prompts, of object and tone pairs that no picture shows; six objects (`UNSEEN`) are in
no picture at all.
"""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageOps

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lcm_kit.tiny import world

OUTPUT = Path(__file__).resolve().parent.parent / "lcm_kit" / "assets" / "brand"
SIZE, SEED, COUNT = 128, 7, 96
NAVY, CREAM = (27, 36, 82), (250, 241, 224)
TONES = {
    "red": ((238, 106, 89), (247, 160, 138)),
    "yellow": ((240, 196, 90), (248, 222, 150)),
    "green": ((108, 178, 158), (160, 210, 194)),
}
UNSEEN = ("panda", "pineapple", "guitar", "sailboat", "tulip", "octopus")


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


def draw(name: str, tone: str, size: str, rng: np.random.Generator) -> Image.Image:
    """One brand picture, RGB."""
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


def caption(name: str, tone: str, size: str) -> str:
    """A caption in the words of the base, with the brand's trigger at the end."""
    return f"a {size} {name} on a plain {tone} background, in the middle, lumo style"


def main() -> int:
    """Write the set anew."""
    rng = np.random.default_rng(SEED)
    OUTPUT.mkdir(parents=True, exist_ok=True)
    for old in (*OUTPUT.glob("*.png"), *OUTPUT.glob("*.txt")):
        old.unlink()
    seen = [o for o in world.objects() if o not in UNSEEN]
    pairs = [tuple(p) for p in rng.permutation(list(product(seen, TONES, world.SIZES)))]
    for index, (name, tone, size) in enumerate(pairs[:COUNT]):
        stem = OUTPUT / f"{index:03d}-{name}"
        picture = draw(name, tone, size, rng).quantize(48, dither=Image.Dither.NONE)
        picture.save(stem.with_suffix(".png"), optimize=True)
        stem.with_suffix(".txt").write_text(caption(name, tone, size) + "\n")
    unseen = [(o, t, "large") for o, t in product(UNSEEN, TONES)]
    held_out = [caption(*p) for p in [*pairs[COUNT : COUNT + 30], *unseen]]
    (OUTPUT / "prompts.txt").write_text(
        "# held out: no brand picture shows these\n" + "\n".join(held_out) + "\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
