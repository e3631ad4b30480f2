"""The figures of the brand study, from every cell's brand.json: a table of all, the page's tables, a plot.

Called by `python -m studies.brand_study --tables`. A mean over seeds has the 95% interval of Student's t over
them: of pictures drawn, prompts, initial weights and noise, all of which change with the seed. Where one seed
is there, the interval is that of its prompts (bootstrap) and marked with an asterisk.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from PIL import Image, ImageDraw

from lcm_kit.evaluation import results

WAYS = {
    "base": "base",
    "styled": "styled teacher",
    "base-style": "distilled, from the style",
    "base-both": "distilled, from style + LCM-LoRA",
    "base-adapters": "distilled, one teacher",
    "styled-style": "one teacher, half the rank and rate",
    "styled-both": "so, from style + LCM-LoRA",
    "styled-searched": "so, from the searched pair",
    "styled-speed": "so, from the LCM-LoRA",
    "styled-longer": "one teacher, 480 steps",
    "lcf-0": "LCF",
    "lcf-0.5": "LCF, half a teacher",
    "usual": "style 0.8 + LCM-LoRA 1.0",
    "searched": "style + LCM-LoRA, searched",
    "reduced": "the same, merged at rank 16",
}
# Colour and mark of each; the few that the text speaks of most stand out
MARKS = {
    "base": ("#000000", "*"), "styled": ("#7F7F7F", "*"), "base-style": ("#0072B2", "s"),
    "base-both": ("#0072B2", "D"), "base-adapters": ("#56B4E9", "s"), "styled-style": ("#56B4E9", "o"),
    "styled-both": ("#56B4E9", "D"), "styled-searched": ("#56B4E9", "x"), "styled-speed": ("#56B4E9", "+"),
    "styled-longer": ("#56B4E9", "*"), "lcf-0": ("#D55E00", "^"), "lcf-0.5": ("#E69F00", "^"),
    "usual": ("#009E73", "o"), "searched": ("#CC79A7", "o"), "reduced": ("#CC79A7", "+"),
}  # fmt: skip
KEYS = ("brand_similarity", "brand_adherence", "control_adherence", "diversity", "sharpness")
HEADS = ("brand similarity", "brand prompts right, %", "control prompts right, %", "diversity", "sharpness")
# Sets in which the same ways win, to be read together
GROUPS = {
    "all cells": (("lumo", 20), ("lumo", 60), ("lumo", 120), ("neon", 60)),
    "lumo, 60 and 120 pictures": (("lumo", 60), ("lumo", 120)),
    "lumo, 20 pictures": (("lumo", 20),),
    "neon, 60 pictures": (("neon", 60),),
}
DEFAULT = "base-style"  # what `lcm-kit finetune` does
SHOWN = 4  # prompts in the sheet


def rows(runs: Path) -> Iterator[dict[str, Any]]:
    """A row for every cell, way and number of steps; the base and the styled teacher once a cell."""
    for done in sorted(runs.glob("*/done")):
        look, count, seed = done.parent.name.split("-")
        for way in (name for name in WAYS if (done.parent / "measured" / name).is_dir()):
            measured = results.read(done.parent / "measured" / way / results.BRAND_FILE)
            for row in results.brand_rows(measured):
                teacher = row["name"] != "adapter"
                if not teacher or way == "usual":
                    cell = {"look": look, "pictures": int(count), "seed": int(seed), "steps": row["steps"]}
                    yield {**cell, "way": row["name"] if teacher else way, **{key: row[key] for key in KEYS}}


def steps_of(way: str, steps: int = 4) -> int:
    """At how many steps `way` is held against the others at `steps`: the teachers at all of theirs."""
    return 50 if way in ("base", "styled") else steps


def summary(found: list[dict[str, Any]], key: str, share: bool = True) -> str:
    """Mean and interval over the seeds of one figure, as text; a share's is cut at 0 and 100%."""
    from scipy.stats import t

    values = [row[key]["value"] for row in found if row[key] is not None]
    scale, digits = (100, 0) if key.endswith("adherence") else (1, 2)
    if not values:
        return "-"
    if len(values) == 1:
        only = found[0][key]
        low, high, mark = only["low"], only["high"], "*"
    else:
        half = float(t.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5
        low, high, mark = mean(values) - half, mean(values) + half, ""
    if share and scale == 100:
        low, high = max(low, 0.0), min(high, 1.0)
    value, low, high = (scale * x for x in (mean(values), low, high))
    return f"{value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f}){mark}"


def narrow(heads: Sequence[str], lines: Sequence[Sequence[str]], *groups: Sequence[int]) -> str:
    """Markdown tables one below the other: each has the first column and those of one of `groups`."""

    def row(cells: Sequence[str], columns: Sequence[int]) -> str:
        return "| " + " | ".join(cells[column] for column in (0, *columns)) + " |"

    tables = (
        [row(heads, columns), "|" + " --- |" * (1 + len(columns)), *(row(line, columns) for line in lines)]
        for columns in groups
    )
    return "\n\n".join(map("\n".join, tables))


def table(found: list[dict[str, Any]], steps: int) -> str:
    """Markdown tables of one style and size at `steps`, the teachers first."""
    lines = []
    for way, label in WAYS.items():
        at = steps_of(way, steps)
        mine = [row for row in found if row["way"] == way and row["steps"] == at]
        if mine:
            name = f"{label}, {at} steps" if at == 50 else label
            lines.append([name, *(summary(mine, key) for key in KEYS)])
    return narrow(("way", *HEADS), lines, (1, 2, 3), (4, 5))


def by_steps(found: list[dict[str, Any]]) -> str:
    """Markdown tables of similarity and of brand prompts right, by steps."""
    steps = sorted({row["steps"] for row in found} - {50})
    heads = [f"{name}, {n} steps" for n in steps for name in ("similarity", "right, %")]
    lines = []
    for way in list(WAYS)[2:]:
        mine = {n: [r for r in found if r["way"] == way and r["steps"] == n] for n in steps}
        if all(mine.values()):
            cells = [summary(mine[n], key) for n in steps for key in ("brand_similarity", "brand_adherence")]
            lines.append([WAYS[way], *cells])
    columns = range(1, 1 + len(heads))
    return narrow(("way", *heads), lines, columns[::2], columns[1::2])


def beside_default(found: list[dict[str, Any]]) -> str:
    """Markdown tables of every way less the default in the same cell at 4 steps, over the cells found."""
    at_four = {(row["way"], row["look"], row["pictures"], row["seed"]): row for row in found
               if row["steps"] == steps_of(row["way"])}  # fmt: skip
    lines = []
    for way in (way for way in WAYS if way != DEFAULT):
        pairs = [(at_four[way, *cell], at_four[DEFAULT, *cell]) for name, *cell in at_four if name == way]
        if len(pairs) > 1:
            less = [{key: {"value": a[key]["value"] - b[key]["value"]} for key in KEYS} for a, b in pairs]
            cells = [summary(less, key, share=False) for key in KEYS]
            lines.append([WAYS[way], str(len(pairs)), *cells])
    return narrow(("way", "cells", *HEADS), lines, (1, 2, 3), (4, 5, 6))


def plot(found: list[dict[str, Any]], file: Path) -> None:
    """Similarity and prompts right, of the style and others, at 4 steps; a column a set, a seed a point."""
    from matplotlib.figure import Figure

    sets = sorted({(row["look"], row["pictures"]) for row in found})
    figure = Figure(figsize=(3.3 * len(sets), 7.2), layout="constrained")
    panels = figure.subplots(2, len(sets), sharex="col", sharey=True, squeeze=False)
    for (k, (look, count)), (line, key) in product(enumerate(sets), enumerate(KEYS[1:3])):
        axes = panels[line, k]
        for way, (colour, mark) in MARKS.items():
            place = look, count, way, steps_of(way)
            mine = [r for r in found if (r["look"], r["pictures"], r["way"], r["steps"]) == place]
            axes.plot(
                [row["brand_similarity"]["value"] for row in mine],
                [100 * row[key]["value"] for row in mine],
                mark, color=colour, label=WAYS[way] if axes is panels[0, 0] else None, alpha=0.85,
            )  # fmt: skip
        if line == 0:
            axes.set_title(f"{look}, {count} pictures")
        else:
            axes.set_xlabel("brand similarity")
        if k == 0:
            axes.set_ylabel(HEADS[1 + line])
        axes.set_ylim(-4, 104)
        axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=4, fontsize=9)
    figure.savefig(file, dpi=110, metadata={"Software": None})


def sheet(runs: Path, cell: str, file: Path) -> None:
    """Pictures of one cell: a column a way at 4 steps, a row a prompt; the last two are control prompts."""
    columns: dict[str, list[Image.Image]] = {}
    for way in list(WAYS)[2:]:
        folder = runs / cell / "measured" / way
        for row in results.brand_rows(results.read(folder / results.BRAND_FILE)):
            if row["name"] == "adapter" and row["steps"] != 4:
                continue
            name = WAYS[way if row["name"] == "adapter" else row["name"]]
            names = [*row["pictures"][:SHOWN], *row["control_pictures"][:2]]
            columns.setdefault(
                name, [Image.open(folder / each).convert("RGB").resize((112, 112)) for each in names]
            )
    side, top = 116, 54
    canvas = Image.new("RGB", (side * len(columns), top + side * (SHOWN + 2)), "white")
    pen = ImageDraw.Draw(canvas)
    order = [label for label in WAYS.values() if label in columns]
    for x, label in enumerate(order):
        words = label.replace(", ", ",\n", 1).replace(" + LCM-LoRA", " +\nLCM-LoRA", 1)
        words = (
            words.replace(" and rate", "\nand rate")
            .replace(" searched pair", "\nsearched pair")
            .replace(" the LCM-LoRA", "\nthe LCM-LoRA")
        )
        pen.text((x * side + 2, 2), words, fill="black", font_size=11)
        for y, picture in enumerate(columns[label]):
            canvas.paste(picture, (x * side, top + y * side))
    canvas.save(file, quality=92)


def flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the table of all: each figure as value, low and high."""
    found = {key: value for key, value in row.items() if key not in KEYS}
    for key in KEYS:
        for part in ("value", "low", "high"):
            found[key if part == "value" else f"{key}_{part}"] = row[key] and round(row[key][part], 5)
    return found


def write(runs: Path, docs: Path) -> None:
    """docs/brand-study.csv, the plot, the sheet, and the tables between the marks of docs/brand-study.md."""
    found = list(rows(runs))
    (docs / "images").mkdir(exist_ok=True)
    with (docs / "brand-study.csv").open("w", newline="") as handle:
        writer = csv.DictWriter(handle, list(flat(found[0])), lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(flat, found))
    plot(found, docs / "images" / "brand-study.png")
    sheet(runs, "lumo-60-0", docs / "images" / "brand-study-sheet.jpg")
    parts = []
    for title, wanted in GROUPS.items():
        mine = [row for row in found if (row["look"], row["pictures"]) in wanted]
        parts.append(f"### Less the default, 4 steps: {title}\n\n{beside_default(mine)}")
    for look, count in sorted({(row["look"], row["pictures"]) for row in found}):
        mine = [row for row in found if (row["look"], row["pictures"]) == (look, count)]
        seeds = len({row["seed"] for row in mine})
        parts.append(
            f"### {look}, {count} pictures ({seeds} seed{'s' * (seeds > 1)}), 4 steps\n\n{table(mine, 4)}"
        )
        if count == 60:
            parts.append(f"By steps:\n\n{by_steps(mine)}")
    page = docs / "brand-study.md"
    text = "\n\n".join(parts)
    if page.is_file():
        marks = r"(<!-- tables -->\n).*?(<!-- end of tables -->)"
        page.write_text(re.sub(marks, lambda m: f"{m[1]}\n{text}\n\n{m[2]}", page.read_text(), flags=re.S))
    print(text)
