"""Draw the embedded brand set: the style of "Lumo", which the base does not draw. Or a set in another style.

    python tools/make_brand.py
    python tools/make_brand.py neon runs/neon-set    # a new folder

Writes lcm_kit/assets/brand/NNN-object.png (128 x 128 pixels) with NNN-object.txt beside each, and
prompts.txt: held-out prompts, of object and tone pairs that no picture shows; six objects (`UNSEEN`) are in
no picture at all. The styles themselves are in `brand_looks.py`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from brand_looks import LOOKS, caption, pictures, unseen
from PIL import Image

OUTPUT = Path(__file__).resolve().parent.parent / "lcm_kit" / "assets" / "brand"
SEED, COUNT = 7, 96


def main(look: str = "lumo", folder: Path = OUTPUT) -> int:
    """Write the set anew; a folder of another style must not be there yet."""
    rng = np.random.default_rng(SEED)
    draw, _ = LOOKS[look]
    if folder != OUTPUT and folder.exists():
        raise SystemExit(f"error: {folder} is there already; name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    for old in (*folder.glob("*.png"), *folder.glob("*.txt")):
        old.unlink()
    shown = pictures(look, rng)
    for index, (name, tone, size) in enumerate(shown[:COUNT]):
        stem = folder / f"{index:03d}-{name}"
        picture = draw(name, tone, size, rng)
        if look == "lumo":  # few inks, so a palette loses nothing
            picture = picture.quantize(48, dither=Image.Dither.NONE)
        picture.save(stem.with_suffix(".png"), optimize=True)
        stem.with_suffix(".txt").write_text(caption(name, tone, size, look) + "\n")
    held_out = [caption(*p, look) for p in [*shown[COUNT : COUNT + 30], *unseen(look)]]
    (folder / "prompts.txt").write_text(
        "# held out: no brand picture shows these\n" + "\n".join(held_out) + "\n"
    )
    return 0


if __name__ == "__main__":
    if len(sys.argv) not in (1, 3) or (len(sys.argv) == 3 and sys.argv[1] not in LOOKS):
        sys.exit(f"usage: python tools/make_brand.py [STYLE FOLDER], STYLE being one of {', '.join(LOOKS)}")
    sys.exit(main(sys.argv[1], Path(sys.argv[2])) if len(sys.argv) == 3 else main())
