"""Print the tables of docs/results.md and docs/finetuning.md, and draw the pictures of the README.

    lcm-kit encode distill/tiny_dmd && lcm-kit train distill/tiny_dmd && lcm-kit export runs/tiny_dmd
    lcm-kit evaluate evaluation/quality run=runs/tiny_dmd
    python tools/readme_figures.py runs/tiny_dmd    # more runs add their students to the table
    lcm-kit quickstart && python tools/readme_figures.py runs/quickstart

Tables go to standard output. docs/headline.png: one row a prompt, the teacher, the plain sampler with most
right attributes at 4 UNet calls, and the first run's student at 4. docs/style.png: a column a prompt of the
look; the brand's picture, the base and the styled base at 50 steps, the adapter at 4.
"""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lcm_kit.evaluation import results, verdicts
from lcm_kit.evaluation.result_shapes import Cell
from lcm_kit.report import brand
from lcm_kit.report.shared import percent

ROOT = Path(__file__).resolve().parent.parent
ZOOM, GAP, PICTURES = 2, 6, 5
HEAD = (
    "| | sampler | steps | guidance | UNet calls | right attributes | Frechet distance "
    "| to the teacher | colour | s/image |"
)


def line(name: str, cell: Cell) -> str:
    """One line of the table."""
    shown = {
        "prompt_adherence": ".1%", "frechet_biased": ".3f", "pixel_distance": ".3f", "saturation": ".2f",
        "seconds": ".3f",
    }  # fmt: skip
    figures = (format(results.value(cell, key), how) for key, how in shown.items())
    setting = (cell["sampler"], str(cell["steps"]), f"{cell['guidance_scale']:g}", str(cell["unet_calls"]))
    return "| " + " | ".join((name, *setting, *figures)) + " |"


def headline(run: Path) -> Image.Image:
    """Teacher, best plain sampler and student at 4 UNet calls, side by side: `PICTURES` rows of each."""
    found = results.read(run / results.FILE)
    students = results.cells_of(found["cells"], "student")
    chosen = [results.reference(found), verdicts.best_plain(found, 4)]
    chosen += [cell for cell in students if cell["unet_calls"] == 4]
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
    """Write docs/style.png and print the table of docs/finetuning.md."""
    found = results.read(run / results.BRAND_FILE)
    head = verdicts.brand_headline(found)
    rows = {"base": head.base, "style": head.styled, "style and speed in one LoRA": head.adapter}
    lines = [found["brand_pictures"], *(row["pictures"] for row in rows.values())]
    cell = 64 * ZOOM
    columns = [k for k, name in enumerate(lines[0]) if name]
    size = len(columns) * (cell + GAP) - GAP, len(lines) * (cell + GAP) - GAP
    sheet = Image.new("RGB", size, "white")
    for (y, names), (x, k) in product(enumerate(lines), enumerate(columns)):
        picture = Image.open(run / names[k]).convert("RGB").resize((cell, cell), Image.Resampling.LANCZOS)
        sheet.paste(picture, (x * (cell + GAP), y * (cell + GAP)))
    sheet.save(ROOT / "docs" / "style.png", optimize=True)
    print(
        "| | prompts that show the style | brand similarity | prompts of the style right "
        "| other prompts right |\n| --- | --- | --- | --- | --- |"
    )
    for text, row in rows.items():
        shares = (brand.interval(row[f"{kind}_adherence"], percent) for kind in ("brand", "control"))
        shown = f"{verdicts.showing(head, row)} of {head.n}"
        cells = (shown, brand.interval(row["brand_similarity"]), *shares)
        print(f"| {text}, {row['steps']} steps | {' | '.join(cells)} |")
    print(f"the brand's own pictures: {found['brand_own']}; adapter less base: {head.nearer}")
    return 0


def main(runs: list[Path]) -> int:
    """Write docs/headline.png, of the first run, and print the table, with the students of all."""
    headline(runs[0]).save(ROOT / "docs" / "headline.png", optimize=True)
    print(HEAD)
    print("| --- " * (HEAD.count("|") - 1) + "|")
    for cell in results.read(runs[0] / results.FILE)["cells"]:
        if cell["kind"] != "student":
            print(line({"plain": "base"}.get(cell["kind"], cell["kind"]), cell))
    for run in runs:
        for cell in results.cells_of(results.read(run / results.FILE)["cells"], "student"):
            print(line(f"student, {run.name}", cell))
    return 0


if __name__ == "__main__":
    given = [Path(word) for word in sys.argv[1:]]
    sys.exit(look(given[0]) if (given[0] / results.BRAND_FILE).exists() else main(given))
