"""The figures of the study of methods as text and pictures: results.csv, the page's tables, a plot, a sheet.

Called by `python -m studies.methods --tables`. How intervals are made says `studies.methods_measure`.
"""

from __future__ import annotations

import csv
import re
import textwrap
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageDraw

from lcm_kit import sample
from lcm_kit.training.run_files import folders
from studies.brand_tables import narrow
from studies.methods_draw import MAIN, SHOWN, Studio
from studies.methods_measure import SHARES, Known, Measured, Study, interval, mean_of
from studies.methods_plan import DONE, TEACHER, Plan

PLAIN = "lcm"  # the entry that others are held against: the shipped config
STEPS = (1, 2, 4, 8)
BAR_STEPS = 4  # plain LCM's quality at so many steps is what the time is taken to
BARS = {"prompt_adherence": True, "frechet_real": False}  # whether more is better
HEADS = {
    "prompt_adherence": "right, %", "frechet_real": "Fréchet", "kernel_real": "kernel x 1000",
    "saturation": "colour", "sharpness": "sharpness", "diversity": "diversity",
    "effective_guidance": "effective guidance", "unsaid": "grey, %",
    "obeyed": "gone with the negative prompt, %", "object_kept": "objects right with it, %",
}  # fmt: skip
TABLE = tuple(HEADS)[:7]
SHEET_STEPS = (1, 2, 4)
PICTURES = """

![Right pictures and Fréchet distance against seconds of training, a line a method](images/methods.png)

![Pictures of the teacher and of all methods at 1, 2 and 4 steps, a row a prompt](images/methods-sheet.png)"""
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")
_SIDE, _TOP = 66, 66  # of the sheet, pixels
_LETTERS = 12  # of a heading, that fit above a picture


def text(key: str, found: tuple[float, float, float], share: bool = True) -> str:
    """Value and interval; shares in percent, cut at 0 and 100 unless they are differences."""
    if key in SHARES or key == "object_kept":
        value, low, high = (100 * each for each in found)
        if share:
            low, high = max(low, 0.0), min(high, 100.0)
        return f"{value:.1f} ({low:.1f} to {high:.1f})"
    digits = {"frechet_real": 3, "effective_guidance": 1}.get(key, 2)
    value, low, high = (1000 * each if key == "kernel_real" else each for each in found)
    return f"{value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def figure(study: Study, rows: Sequence[Measured], key: str) -> str:
    """A cell of a table: mean over seeds, bold within the teacher's interval, an asterisk for one seed."""
    mine = [row.figures[key] for row in rows if key in row.figures]
    if not mine:
        return "-"
    found = interval(mine)
    low, high = study.bounds.get(key, (1.0, 0.0))
    words = text(key, found)
    return (f"**{words}**" if low <= found[0] <= high else words) + ("*" if len(mine) == 1 else "")


def differences(study: Study, entry: str, other: str, steps: int, key: str) -> list[Known]:
    """`entry` less `other` at `steps`, a seed each, prompts and noise the same; the teacher has no seeds."""
    mine = {row.seed: row.figures for row in study.final(entry, steps)}
    if other == TEACHER:
        theirs = dict.fromkeys(mine, study.teacher)
    else:
        theirs = {row.seed: row.figures for row in study.final(other, steps)}
    seeds = [seed for seed in mine if seed in theirs and key in mine[seed] and key in theirs[seed]]
    return [mine[seed][key].minus(theirs[seed][key]) for seed in seeds]


def of_the_way(study: Study, entry: str, steps: int, key: str) -> float | None:
    """How much of what lies between plain LCM and the teacher the entry goes: 0 as LCM, 1 as the teacher."""
    mine, plain = (study.final(name, steps) for name in (entry, PLAIN))
    if not mine or not plain:
        return None
    here, start = (mean(row.figures[key].value for row in rows) for rows in (mine, plain))
    end = study.teacher[key].value
    return None if end == start else (here - start) / (end - start)


# -- Time to quality -----------------------------------------------------------------------------------------


class Reached(NamedTuple):
    """When a curve first is as good as the bar; `at_most`: it is so at its first point."""

    at: float
    at_most: bool = False


def reached(at: Sequence[float], values: Sequence[float], bar: float, more: bool) -> Reached | None:
    """Where the line through (at, values) first is as good as `bar`, linear between points; None: never."""
    good = [(value >= bar) if more else (value <= bar) for value in values]
    if True not in good:
        return None
    k = good.index(True)
    if k == 0:
        return Reached(at[0], at_most=True)
    share = (bar - values[k - 1]) / (values[k] - values[k - 1])
    return Reached(at[k - 1] + share * (at[k] - at[k - 1]))


def bar(study: Study, key: str) -> float | None:
    """Plain LCM's quality at the end of its training, on the curve's prompts, the mean over seeds."""
    points = study.curve(PLAIN, BAR_STEPS)
    return mean(row.figures[key].value for row in points[max(points)]) if points else None


def time_to(study: Study, entry: str, key: str, of: str = "seconds") -> tuple[Reached | None, list[float]]:
    """When the entry has LCM's final quality: of the mean over seeds, and of every seed that gets there.

    `of`: `seconds` or `samples`.
    """
    wanted, points = bar(study, key), study.curve(entry, BAR_STEPS)
    if wanted is None or not points:
        return None, []
    at = [mean(getattr(row, of) for row in rows) for rows in points.values()]
    middle = [mean(row.figures[key].value for row in rows) for rows in points.values()]
    each = []
    for seed in sorted({row.seed for rows in points.values() for row in rows}):
        mine = [row for rows in points.values() for row in rows if row.seed == seed]
        values = [row.figures[key].value for row in mine]
        if found := reached([getattr(row, of) for row in mine], values, wanted, BARS[key]):
            each.append(found.at)
    return reached(at, middle, wanted, BARS[key]), each


def _when(found: tuple[Reached | None, list[float]], seeds: int) -> str:
    middle, each = found
    words = "never" if middle is None else f"{'at most ' * middle.at_most}{middle.at:.0f}"
    if seeds > 1 and each:
        missing = "" if len(each) == seeds else f"; {seeds - len(each)} of {seeds} never"
        words += f" ({min(each):.0f} to {max(each):.0f}{missing})"
    return words


# -- Tables --------------------------------------------------------------------------------------------------


def table(study: Study, plan: Plan, steps: int) -> str:
    """Markdown tables of all entries at `steps`, the teacher first."""
    teacher = study.final(TEACHER)
    lines = (
        [[f"teacher, {teacher[0].steps} steps", *(_teachers(study, key) for key in TABLE)]] if teacher else []
    )
    for name, entry in plan.entries.items():
        if rows := study.final(name, steps):
            lines.append([entry.label, *(figure(study, rows, key) for key in TABLE)])
    return narrow(("method", *(HEADS[key] for key in TABLE)), lines, (1, 2, 3), (4, 5), (6, 7))


def _teachers(study: Study, key: str) -> str:
    found = study.teacher.get(key)
    if key not in study.bounds:
        return "-" if found is None else text(key, interval([found]))
    return text(key, (1.0 if found is None else found.value, *study.bounds[key]))


def beside(study: Study, plan: Plan, other: str, steps: int) -> str:
    """Markdown tables of every entry less `other` at `steps`, paired; nothing where there is no other."""
    keys = [key for key in TABLE if not (other == TEACHER and key == "effective_guidance")]
    lines = []
    for name, entry in plan.entries.items():
        if name != other and study.final(name, steps):
            pairs = [differences(study, name, other, steps, key) for key in keys]
            if any(pairs):
                cells = [
                    text(key, interval(each), share=False) + "*" * (len(each) == 1) if each else "-"
                    for key, each in zip(keys, pairs, strict=True)
                ]
                lines.append([entry.label, *cells])
    if not lines:
        return ""
    columns = range(1, 1 + len(keys))
    return narrow(("method", *(HEADS[key] for key in keys)), lines, columns[:3], columns[3:5], columns[5:])


def times(study: Study, plan: Plan) -> str:
    """Markdown tables of the time to plain LCM's final quality, and of what a training costs."""
    lines, whole = [], _cost(study, PLAIN)
    for name, entry in plan.entries.items():
        cost = _cost(study, name)
        if cost is None or entry.drawn_from is not None:
            continue
        seeds = len({row.seed for row in study.final(name)})
        found = {of: {key: time_to(study, name, key, of) for key in BARS} for of in ("seconds", "samples")}
        both = [each[0] for each in found["seconds"].values()]
        last = max((each.at for each in both if each), default=0.0) if all(both) else None
        speed = "-" if not last or whole is None else f"{whole[1] / last:.1f}"
        cells = [_when(found[of][key], seeds) for of, key in product(found, BARS)]
        lines.append([entry.label, *cells, speed, f"{cost[0]:.3f}", f"{cost[1]:.0f}", f"{cost[2]:.0f}"])
    heads = (
        "method", "right: s", "Fréchet: s", "right: pictures", "Fréchet: pictures",
        "times as fast as LCM's whole training", "s a step", "s in all", "peak memory, MiB",
    )  # fmt: skip
    return narrow(heads, lines, (1, 2), (3, 4), (5, 6, 7, 8))


def _cost(study: Study, name: str) -> tuple[float, float, float] | None:
    """Seconds a step, seconds in all with what it started from, peak memory: means over seeds."""
    mine = [cost for (entry, _), cost in study.costs.items() if entry == name]
    ends = [max(row.seconds for row in study.final(name) if row.seed == seed)
            for seed in {row.seed for row in study.final(name)}]  # fmt: skip
    if not mine or not ends:
        return None
    return mean(c.seconds_a_step for c in mine), mean(ends), max(c.peak_mib for c in mine)


def ways(study: Study, plan: Plan) -> str:
    """A Markdown table of how much of the way from plain LCM to the teacher each entry goes."""
    heads, lines = ["method"], []
    for steps, key in product(SHEET_STEPS, BARS):
        heads.append(f"{HEADS[key].partition(',')[0]}, {steps} step{'s' * (steps > 1)}")
    for name, entry in plan.entries.items():
        found = [of_the_way(study, name, steps, key) for steps, key in product(SHEET_STEPS, BARS)]
        if name != PLAIN and any(each is not None for each in found):
            lines.append([entry.label, *("-" if each is None else f"{each:.2f}" for each in found)])
    return narrow(heads, lines, range(1, len(heads)))


def negatives(study: Study, plan: Plan) -> str:
    """A Markdown table of what negative prompts do, of the teacher and of entries that are drawn guided."""
    keys, lines = ("unsaid", "obeyed", "object_kept"), []
    for name, label in ((TEACHER, "teacher"), *((name, e.label) for name, e in plan.entries.items())):
        for steps in sorted({row.steps for row in study.final(name)}):
            rows = study.final(name, steps)
            if any("unsaid" in row.figures for row in rows):
                label_ = f"{label}, {steps} step{'s' * (steps > 1)}"
                lines.append([label_, *(figure(study, rows, key) for key in keys)])
    return narrow(("method", *(HEADS[key] for key in keys)), lines, (1, 2), (3,))


# -- Files ---------------------------------------------------------------------------------------------------


def flat(row: Measured, keys: Sequence[str]) -> dict[str, Any]:
    """A row of results.csv: each figure with the interval of its prompts."""
    settings = ("entry", "seed", "step", "samples", "seconds", "steps", "sampler", "guidance", "prompts")
    found: dict[str, Any] = {"set": "end" if row.final else "curve"}
    found |= {name: getattr(row, name) for name in settings}
    found["seconds"] = round(row.seconds, 2)
    for key in keys:
        parts = interval([row.figures[key]]) if key in row.figures else (None, None, None)
        for name, value in zip((key, f"{key}_low", f"{key}_high"), parts, strict=True):
            found[name] = None if value is None else round(value, 6)
    return found


def write_csv(study: Study, file: Path) -> None:
    """All rows, a training and a way of drawing each."""
    keys = list(dict.fromkeys(key for row in study.rows for key in row.figures))
    with file.open("w", newline="", encoding="utf-8") as handle:
        lines = [flat(row, keys) for row in study.rows]
        writer = csv.DictWriter(handle, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def plot(study: Study, plan: Plan, file: Path) -> None:
    """Quality against seconds of training: a row a figure, a column a number of steps; thin: seeds."""
    from matplotlib.figure import Figure

    numbers = plan.curve.steps
    canvas = Figure(figsize=(4.6 * len(numbers), 6.8), layout="constrained")
    panels = canvas.subplots(len(BARS), len(numbers), sharex=True, squeeze=False)
    for (line, key), (column, steps) in product(enumerate(BARS), enumerate(numbers)):
        axes, scale = panels[line, column], 100 if key in SHARES else 1
        for k, (name, entry) in enumerate(plan.entries.items()):
            points, colour = study.curve(name, steps), _COLOURS[k % len(_COLOURS)]
            if not points or entry.drawn_from is not None:
                continue
            style = "-" if k < len(_COLOURS) else "--"
            at = [mean(row.seconds for row in rows) for rows in points.values()]
            middle = [scale * mean_of([row.figures[key] for row in rows]).value for rows in points.values()]
            axes.plot(at, middle, style, marker="o", markersize=3, color=colour, label=entry.label)
            for seed in {row.seed for rows in points.values() for row in rows}:
                mine = [row for rows in points.values() for row in rows if row.seed == seed]
                values = [scale * row.figures[key].value for row in mine]
                axes.plot(
                    [row.seconds for row in mine], values, style, color=colour, alpha=0.25, linewidth=0.8
                )
        axes.axhline(
            scale * study.teacher[key].value, color="black", linestyle=":", label="teacher, 50 steps"
        )
        if key == "frechet_real":
            axes.set_yscale("symlog", linthresh=0.1)
            axes.set_xlabel("seconds of training, one core")
        if line == 0:
            axes.set_title(f"{steps} step{'s' * (steps > 1)}")
        if column == 0:
            axes.set_ylabel({"frechet_real": "Fréchet distance to real pictures"}.get(key, HEADS[key]))
        axes.grid(alpha=0.3)
    lines: dict[str, Any] = {}  # a method may be in one column alone
    for panel in panels.flat:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            lines.setdefault(label, handle)
    canvas.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=3, fontsize=9)
    canvas.savefig(file, dpi=110, metadata={"Software": None})


def sheet(plan: Plan, output: Path, file: Path) -> None:
    """Pictures of the first seed: a row a prompt, a column the teacher or an entry at a number of steps."""
    studio, columns = Studio(plan, output), {}
    shown = min(SHOWN, plan.prompts)
    columns["teacher\n50"] = studio.rows(MAIN, studio.teacher())["pictures"][:shown]
    for name, entry in plan.entries.items():
        folder = output / f"{name}-{plan.seeds[0]}"
        if not (folder / DONE).is_file():
            continue
        run = output / f"{entry.drawn_from or name}-{plan.seeds[0]}" / "run"
        subject = studio.subject(folder, run, folders(run)[-1])
        for cell in (cell for cell in studio.students(subject, entry) if cell.steps in SHEET_STEPS):
            words = textwrap.fill(entry.label, _LETTERS)
            columns[f"{words}\n{cell.steps}"] = studio.rows(MAIN, cell)["pictures"][:shown]
    canvas = Image.new("RGB", (_SIDE * len(columns), _TOP + _SIDE * shown), "white")
    pen = ImageDraw.Draw(canvas)
    for x, (label, pictures) in enumerate(columns.items()):
        pen.text((x * _SIDE + 1, 1), label, fill="black", font_size=10)
        for y, picture in enumerate(sample.to_pil(pictures.to(torch.float32) / 127.5 - 1)):
            canvas.paste(picture, (x * _SIDE, _TOP + y * _SIDE))
    canvas.save(file, optimize=True)


def page(study: Study, plan: Plan) -> str:
    """All tables, with their headings."""
    parts = []
    for steps in STEPS:
        words = f"{steps} step{'s' * (steps > 1)}"
        if any(study.final(name, steps) for name in plan.entries):
            parts += [f"### {words}", table(study, plan, steps)]
            for other, label in ((PLAIN, "plain LCM"), (TEACHER, "the teacher")):
                if found := beside(study, plan, other, steps):
                    parts += [f"Less {label}, {words}:", found]
    parts += ["### Of the way from plain LCM to the teacher", ways(study, plan)]
    parts += [f"### Time to plain LCM's final quality at {BAR_STEPS} steps", times(study, plan)]
    parts += ["### Negative prompts", negatives(study, plan)]
    return "\n\n".join(parts)


def write(study: Study, plan: Plan, output: Path, docs: Path) -> None:
    """results.csv, docs/methods.csv, the plot, the sheet, and the tables between the marks of the page."""
    (docs / "images").mkdir(parents=True, exist_ok=True)
    for file in (output / "results.csv", docs / "methods.csv"):
        write_csv(study, file)
    plot(study, plan, docs / "images" / "methods.png")
    sheet(plan, output, docs / "images" / "methods-sheet.png")
    found, file = page(study, plan) + PICTURES, docs / "methods.md"
    if file.is_file():
        marks = r"(<!-- tables -->\n).*?(<!-- end of tables -->)"
        before = file.read_text(encoding="utf-8")
        file.write_text(re.sub(marks, lambda m: f"{m[1]}\n{found}\n\n{m[2]}", before, flags=re.S))
    print(found)
