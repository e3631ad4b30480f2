"""Print README's table and draw its headline picture from two evaluated runs.

    for run in tiny_quick tiny_lcm; do
        lcm-kit encode distill/$run && lcm-kit train distill/$run && lcm-kit export runs/$run
        lcm-kit evaluate evaluation/quality run=runs/$run
    done
    python tools/readme_figures.py runs/tiny_quick runs/tiny_lcm

The table goes to standard output, the picture to docs/headline.png: one row a prompt, the teacher, the plain
solver with most right attributes at 4 UNet calls, and the first run's student at 4.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lcm_kit.results import best_plain

ROOT = Path(__file__).resolve().parent.parent
ZOOM, GAP, PICTURES = 2, 6, 5
HEAD = (
    "| | solver | steps | guidance_scale | UNet calls | right attributes | Frechet distance "
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


def main(quick: Path, longer: Path) -> int:
    """Write docs/headline.png and print the table."""
    headline(quick).save(ROOT / "docs" / "headline.png", optimize=True)
    print(HEAD)
    print("| --- " * (HEAD.count("|") - 1) + "|")
    for row in rows_of(quick):
        if row["name"] != "student":
            print(line(row["name"], row))
    for name, run in (("student, quickstart", quick), ("student, tiny_lcm", longer)):
        for row in rows_of(run):
            if row["name"] == "student":
                print(line(name, row))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
