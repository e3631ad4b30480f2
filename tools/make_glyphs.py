"""Draw the glyph sheet of the embedded world from Noto Color Emoji.

    apt-get install fonts-noto-color-emoji
    python tools/make_glyphs.py

Writes lcm_kit/assets/glyphs/sheet.png (8 cells a row, 128 x 128 pixels a cell, RGBA) and glyphs.json. Only
needed to change the set of objects: the sheet is checked in, so nobody else needs the font.
"""

from __future__ import annotations

import json
import sys
import unicodedata
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
OUTPUT = Path(__file__).resolve().parent.parent / "lcm_kit" / "assets" / "glyphs"
CELL, MARGIN, COLUMNS = 128, 4, 8
OBJECTS = {
    "apple": "\N{RED APPLE}",
    "banana": "\N{BANANA}",
    "strawberry": "\N{STRAWBERRY}",
    "grapes": "\N{GRAPES}",
    "pineapple": "\N{PINEAPPLE}",
    "watermelon": "\N{WATERMELON}",
    "hamburger": "\N{HAMBURGER}",
    "doughnut": "\N{DOUGHNUT}",
    "cake": "\N{BIRTHDAY CAKE}",
    "cat": "\N{CAT FACE}",
    "dog": "\N{DOG FACE}",
    "panda": "\N{PANDA FACE}",
    "frog": "\N{FROG FACE}",
    "fox": "\N{FOX FACE}",
    "lion": "\N{LION FACE}",
    "penguin": "\N{PENGUIN}",
    "owl": "\N{OWL}",
    "butterfly": "\N{BUTTERFLY}",
    "octopus": "\N{OCTOPUS}",
    "fish": "\N{TROPICAL FISH}",
    "turtle": "\N{TURTLE}",
    "snail": "\N{SNAIL}",
    "sunflower": "\N{SUNFLOWER}",
    "tulip": "\N{TULIP}",
    "mushroom": "\N{MUSHROOM}",
    "cactus": "\N{CACTUS}",
    "rocket": "\N{ROCKET}",
    "sailboat": "\N{SAILBOAT}",
    "car": "\N{AUTOMOBILE}",
    "house": "\N{HOUSE BUILDING}",
    "guitar": "\N{GUITAR}",
    "crown": "\N{CROWN}",
}


def draw(character: str) -> Image.Image:
    """One glyph, cropped to its ink and centred in a cell."""
    canvas = Image.new("RGBA", (160, 160), (0, 0, 0, 0))
    font = ImageFont.truetype(str(FONT), 109)  # the one size that this bitmap font has
    ImageDraw.Draw(canvas).text((10, 10), character, font=font, embedded_color=True)
    ink = canvas.getbbox()
    if ink is None:
        raise ValueError(f"{FONT.name} has no picture of {unicodedata.name(character)}")
    picture = canvas.crop(ink)
    picture.thumbnail((CELL - 2 * MARGIN, CELL - 2 * MARGIN), Image.Resampling.LANCZOS)
    cell = Image.new("RGBA", (CELL, CELL), (0, 0, 0, 0))
    cell.paste(picture, ((CELL - picture.width) // 2, (CELL - picture.height) // 2))
    return cell


def main() -> int:
    """Write the sheet and its table."""
    if not FONT.exists():
        print(f"error: {FONT} is missing: apt-get install fonts-noto-color-emoji", file=sys.stderr)
        return 2
    rows = -(-len(OBJECTS) // COLUMNS)
    sheet = Image.new("RGBA", (COLUMNS * CELL, rows * CELL), (0, 0, 0, 0))
    for index, character in enumerate(OBJECTS.values()):
        sheet.paste(draw(character), (CELL * (index % COLUMNS), CELL * (index // COLUMNS)))
    OUTPUT.mkdir(parents=True, exist_ok=True)
    sheet.save(OUTPUT / "sheet.png", optimize=True)
    table = {
        name: {"codepoint": f"U+{ord(c):04X}", "unicode": unicodedata.name(c)} for name, c in OBJECTS.items()
    }
    (OUTPUT / "glyphs.json").write_text(
        json.dumps({"font": "Noto Color Emoji", "objects": table}, indent=1) + "\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
