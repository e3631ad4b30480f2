"""Print the tables of docs/results.md and docs/finetuning.md, and draw the pictures of the README.

    for run in tiny_quick tiny_lcm; do
        lcm-kit encode distill/$run && lcm-kit train distill/$run && lcm-kit export runs/$run
        lcm-kit evaluate evaluation/quality run=runs/$run
    done
    python tools/readme_figures.py runs/tiny_quick runs/tiny_lcm
    lcm-kit quickstart && python tools/readme_figures.py runs/quickstart

Tables go to standard output. docs/headline.png: one row a prompt, the teacher, the plain solver with most
right attributes at 4 UNet calls, and the first run's student at 4. docs/look.png: a column a prompt of the
look; the brand's picture, the base and the styled base at 50 steps, the adapter at 4.
"""

from __future__ import annotations

import json
import sys
from itertools import product
from pathlib import Path
from typing import Any

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lcm_kit.report import brand
from lcm_kit.report.shared import percent
from lcm_kit.results import best_plain

ROOT = Path(__file__).resolve().parent.parent
ZOOM, GAP, PICTURES = 2, 6, 5
HEAD = (
    "| | solver | steps | guidance | UNet calls | right attributes | Frechet distance "
    "| to the teacher | colour | s/image |"
)


def rows_of(run: Path) -> list[dict[str, Any]]:
    """The rows of a run's results.json."""
    return json.loads((run / "results.json").read_text(encoding="utf-8"))["rows"]


def line(name: str, row: dict[str, Any]) -> str:
    """One line of the table."""
    figures = (
        f"{row['attribute_accuracy']:.1%}", f"{row['frechet']:.3f}", f"{row['distance_to_teacher']:.3f}",
        f"{row['saturation']:.2f}", f"{row['seconds_per_image']:.3f}",
    )  # fmt: skip
    setting = (row["solver"], str(row["steps"]), f"{row['guidance_scale']:g}", str(row["unet_calls"]))
    return "| " + " | ".join((name, *setting, *figures)) + " |"


def headline(run: Path) -> Image.Image:
    """Teacher, best plain solver and student at 4 UNet calls, side by side: `PICTURES` rows of each."""
    rows = rows_of(run)
    chosen = [rows[0], best_plain(rows, 4)]
    chosen += [row for row in rows if row["name"] == "student" and row["unet_calls"] == 4]
    cell = 64 * ZOOM
    block = PICTURES * (cell + GAP)
    sheet = Image.new("RGB", (3 * block + 2 * 5 * GAP - GAP, 2 * (cell + GAP) - GAP), "white")
    for k, row in enumerate(chosen):
        for i, name in enumerate(row["pictures"][: 2 * PICTURES]):
            picture = Image.open(run / name).resize((cell, cell), Image.Resampling.LANCZOS)
            x = k * (block + 5 * GAP) + i % PICTURES * (cell + GAP)
            sheet.paste(picture, (x, i // PICTURES * (cell + GAP)))
    return sheet


def look(run: Path) -> int:
    """Write docs/look.png and print the table of docs/finetuning.md."""
    found = json.loads((run / "brand.json").read_text(encoding="utf-8"))
    head = brand.headline(found)
    lines = [found["brand_pictures"], *(head[name]["pictures"] for name in ("base", "styled", "adapter"))]
    cell = 64 * ZOOM
    columns = [k for k, name in enumerate(lines[0]) if name]
    size = len(columns) * (cell + GAP) - GAP, len(lines) * (cell + GAP) - GAP
    sheet = Image.new("RGB", size, "white")
    for (y, names), (x, k) in product(enumerate(lines), enumerate(columns)):
        picture = Image.open(run / names[k]).convert("RGB").resize((cell, cell), Image.Resampling.LANCZOS)
        sheet.paste(picture, (x * (cell + GAP), y * (cell + GAP)))
    sheet.save(ROOT / "docs" / "look.png", optimize=True)
    print(
        "| | brand similarity | prompts of the style right | other prompts right |\n| --- | --- | --- | --- |"
    )
    for name, text in (("base", "base"), ("styled", "style"), ("adapter", "style and speed in one LoRA")):
        row = head[name]
        shares = (brand.interval(row[f"{kind}_adherence"], percent) for kind in ("brand", "control"))
        cells = (brand.interval(row["brand_similarity"]), *shares)
        print(f"| {text}, {row['steps']} steps | {' | '.join(cells)} |")
    print(f"adapter less base: {head['less']}")
    return 0


def main(quick: Path, longer: Path) -> int:
    """Write docs/headline.png and print the table."""
    headline(quick).save(ROOT / "docs" / "headline.png", optimize=True)
    print(HEAD)
    print("| --- " * (HEAD.count("|") - 1) + "|")
    for row in rows_of(quick):
        if row["name"] != "student":
            print(line(row["name"], row))
    for name, run in (("student, tiny_quick", quick), ("student, tiny_lcm", longer)):
        for row in rows_of(run):
            if row["name"] == "student":
                print(line(name, row))
    return 0


if __name__ == "__main__":
    runs = [Path(word) for word in sys.argv[1:]]
    sys.exit(look(runs[0]) if len(runs) == 1 else main(*runs))
