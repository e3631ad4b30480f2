"""Draw the embedded brand set: the style of "Lumo", which the base does not draw.

    python tools/make_brand.py

Writes lcm_kit/assets/brand/NNN-object.png (128 x 128 pixels) with NNN-object.txt beside each, and
prompts.txt: held-out prompts, of object and tone pairs that no picture shows; six objects (`UNSEEN`) are in
no picture at all. The style itself is in `brand_looks.py`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from brand_looks import caption, lumo, pictures, unseen
from PIL import Image

OUTPUT = Path(__file__).resolve().parent.parent / "lcm_kit" / "assets" / "brand"
SEED, COUNT = 7, 96


def main() -> int:
    """Write the set anew."""
    rng = np.random.default_rng(SEED)
    OUTPUT.mkdir(parents=True, exist_ok=True)
    for old in (*OUTPUT.glob("*.png"), *OUTPUT.glob("*.txt")):
        old.unlink()
    shown = pictures("lumo", rng)
    for index, (name, tone, size) in enumerate(shown[:COUNT]):
        stem = OUTPUT / f"{index:03d}-{name}"
        picture = lumo(name, tone, size, rng).quantize(48, dither=Image.Dither.NONE)
        picture.save(stem.with_suffix(".png"), optimize=True)
        stem.with_suffix(".txt").write_text(caption(name, tone, size) + "\n")
    held_out = [caption(*p) for p in [*shown[COUNT : COUNT + 30], *unseen("lumo")]]
    (OUTPUT / "prompts.txt").write_text(
        "# held out: no brand picture shows these\n" + "\n".join(held_out) + "\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
