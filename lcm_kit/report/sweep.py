"""Builds a sweep's `report.html`: which settings to use, what they look like, and the figures behind that."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from lcm_kit import __version__
from lcm_kit.config.resolution import read, shown, width_height
from lcm_kit.errors import UserError
from lcm_kit.evaluation import results as results_of
from lcm_kit.evaluation.result_shapes import Recommended, Results
from lcm_kit.io.files import atomic_write
from lcm_kit.report import sweep_plots
from lcm_kit.report.plots import svg
from lcm_kit.report.shared import number, page, uri
from lcm_kit.report.sweep_sheets import (
    Cell,
    describe,
    embed,
    families,
    groups,
    of_kind,
    sampler,
    sheets,
    title,
    weighed,
)
from lcm_kit.samplers import title_of

_CALLS = 4  # UNet calls of the cell that is shown where none is recommended
_QUALITY = ("prompt_adherence", "frechet_real", "kernel_teacher", "frechet_teacher")
_COSTS = ("seconds", "energy", "cost_1000")


def write_sweep_report(folder: Path) -> Path:
    """Write `folder/report.html` from `results.json` and `pictures/`, and return its path.

    The page holds all that it shows: it opens from disk and asks for nothing. Raises `UserError` if the
    folder holds no sweep, or one of another version.
    """
    text = page("sweep.html.j2", context(folder), describe=describe, interval=interval)
    atomic_write(folder / "report.html", text)
    return folder / "report.html"


def context(folder: Path) -> dict[str, Any]:
    """What the template shows."""
    results = _results(folder)
    cells: list[Cell] = [{**cell, "number": n} for n, cell in enumerate(results["cells"])]
    uris = embed(folder, cells, results)
    metrics, asked = _metrics(results, cells), results_of.prompts(results)
    chosen = quality(cells)
    best = sweep_plots.front(cells, chosen, metrics[chosen]["better"]) if chosen else []
    return {
        "results": results,
        "recommended": _recommended(results),
        "head": _headline(results, cells, chosen),
        "command": _command(results),
        "prompts": [results_of.prompt_of(results, sample) for sample in asked["shown"]],
        "asked": asked,
        "count": results_of.count(results),
        "teacher": results_of.reference(results),
        "sheets": sheets(cells),
        "hurt": _hurt(results, cells),
        "swept_guidance": any(cell["guidance_scale"] > 1 for cell in of_kind(cells, "student")),
        "quality": chosen,
        "metrics": metrics,
        "plots": _plots(results, cells, metrics),
        "pareto": _pareto(cells, best, chosen, metrics),
        "front": best,
        "cells": cells,
        "comparisons": _comparisons(results, cells, metrics),
        "facts": _facts(results),
        "uris": uris,
        "frame": _frame(results),
        "version": __version__,
    }


def _frame(results: Results) -> tuple[str, str]:
    """The width and height of a picture's place on the page, the longer side 100."""
    sides = width_height(read(results["resolution"]))
    across, down = (f"{100 * side / max(sides):g}" for side in sides)
    return across, down


def _results(folder: Path) -> Results:
    found = results_of.of_sweep(folder)
    if found is None:
        raise UserError(f"{folder} has no results.json; run `lcm-kit evaluate` with a guidance sweep first")
    return found


# -- Figures -------------------------------------------------------------------------------------------------


def interval(figure: Mapping[str, float] | None) -> str:
    """`0.860 to 0.940`; empty where the figure has no interval."""
    if figure is None or figure["low"] == figure["high"]:
        return ""
    return f"{number(figure['low'])} to {number(figure['high'])}"


def quality(cells: Sequence[Cell]) -> str | None:
    """The metric that says how good pictures are: prompts where they are read, else the style."""
    drawn = [cell for cell in cells if cell["kind"] != "teacher"]
    present = (key for key in _QUALITY if any(cell["metrics"].get(key) for cell in drawn))
    return next(present, None)


def _recommended(results: Results) -> Recommended:
    assert results["recommended"] is not None  # a sweep's never is
    return results["recommended"]


def _metrics(results: Results, cells: Sequence[Cell]) -> dict[str, dict[str, Any]]:
    """What results.json says of the metrics that any cell has; every entry complete."""
    names = dict.fromkeys([*results["metrics"], *(key for cell in cells for key in cell["metrics"])])
    currency = (results["settings"].get("cost") or {}).get("currency", "")
    found = {}
    for key in names:
        if any(cell["metrics"].get(key) for cell in cells):
            empty = {"label": key, "unit": currency if key == "cost_1000" else "", "better": None, "help": ""}
            about = dict(results["metrics"].get(key) or {})
            found[key] = {**empty, **{name: text for name, text in about.items() if text}}
    return found


# -- The headline --------------------------------------------------------------------------------------------


def _headline(results: Results, cells: Sequence[Cell], key: str | None) -> list[dict[str, Any]]:
    """Teacher, recommended cell and best plain sampler at as many UNet calls; those that there are."""
    by_id = {cell["id"]: cell for cell in cells}
    teacher, chosen = by_id.get(results["reference"]), by_id.get(_recommended(results)["cell"] or "")
    students = of_kind(cells, "student")
    shown = chosen or min(students, key=lambda cell: abs(cell["unet_calls"] - _CALLS), default=None)
    by = [*([key] if key else []), "kernel_teacher"]
    best = (
        results_of.best_plain(results["cells"], shown["unet_calls"], by, results["metrics"])
        if shown
        else None
    )
    plain = by_id[best["id"]] if best else None
    calls = shown["unet_calls"] if shown else 0
    who = {
        "Teacher": teacher,
        "Recommended" if chosen else "Not recommended": shown,
        f"Best plain sampler at {calls} UNet call" + ("s" if calls != 1 else ""): plain,
    }
    return [{"title": name, "cell": cell} for name, cell in who.items() if cell]


def _command(results: Results) -> str | None:
    """The recommended settings as a command; None where nothing is recommended."""
    chosen = _recommended(results)
    file = next((each["file"] for each in results["adapters"] if each["name"] == chosen["adapter"]), None)
    if chosen["cell"] is None or file is None:
        return None
    across, down = map(str, width_height(read(results["resolution"])))
    asked = ["--width", across, "--height", down] if results["settings"].get("resolution") else []
    words = [
        "lcm-kit", "sample", "--base", results["base"]["path"], "--adapter", file, "--steps",
        str(chosen["steps"]), "--guidance", f"{chosen['guidance_scale']:g}", "--weight",
        f"{chosen['lora_weight']:g}", "--sampler", str(chosen["sampler"]), *asked, "--prompt",
        results_of.prompt_of(results, next(iter(results_of.prompts(results)["shown"]), 0)),
    ]  # fmt: skip
    return shlex.join(words)


def _hurt(results: Results, cells: Sequence[Cell]) -> list[str]:
    """The ids of the cells at which guidance hurts: from the scale on that `breaks` names."""
    found = []
    for name, entries in results.get("breaks", {}).items():
        for entry in entries:
            wanted = (name, entry["sampler"], entry["steps"], entry["lora_weight"])
            found += [
                cell["id"]
                for cell in cells
                if (cell["adapter"], cell["sampler"], cell["steps"], cell["lora_weight"]) == wanted
                and cell["guidance_scale"] >= entry["guidance_scale"]
            ]
    return found


# -- Plots ---------------------------------------------------------------------------------------------------


def _plots(results: Results, cells: Sequence[Cell], metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For each group of cells its plots: over guidance (if there is one, over steps), then over weights."""
    found = []
    for of, line in groups(of_kind(cells, "student")).items():
        guided = len({cell["guidance_scale"] for cell in line}) > 1
        if not guided and len(line) == 1:
            continue
        x, series = ("guidance_scale", "steps") if guided else ("steps", "guidance_scale")
        starts = _starts(results, line[0]) if guided else {}
        found.append(
            {"title": title(of, line), "figures": _figures(results, line, metrics, x, series, starts)}
        )
    for name, line in weighed(of_kind(cells, "student")).items():
        kept = {key: about for key, about in metrics.items() if key not in _COSTS}
        found.append({"title": name, "figures": _figures(results, line, kept, "lora_weight", "steps", {})})
    teachers = of_kind(cells, "teacher")
    if len(teachers) > 1:
        name = f"Teacher: {sampler(teachers[0])}, over its own guidance_scale"
        figures = _figures(results, teachers, metrics, "guidance_scale", "steps", {})
        found.append({"title": name, "figures": figures})
    return found


def _figures(
    results: Results, line: Sequence[Cell], metrics: Mapping[str, Any], x: str, series: str,
    starts: Mapping[float, float],
) -> list[dict[str, str]]:  # fmt: skip
    found = []
    for key, about in metrics.items():
        level = _level(results, key) if line[0]["kind"] != "teacher" else None
        drawn = sweep_plots.lines(line, key, about, x=x, series=series, level=level, breaks=starts)
        if drawn is not None:
            alt = f"Plot of {about['label']} over {x}, a line for each value of {series}"
            found.append({"uri": uri(svg(drawn).encode(), "svg+xml"), "alt": alt})
    return found


def _starts(results: Results, cell: Cell) -> dict[float, float]:
    """Steps -> the guidance_scale from which it hurts, of the cell's adapter, sampler and weight."""
    return {
        entry["steps"]: entry["guidance_scale"]
        for entry in results.get("breaks", {}).get(cell["adapter"], ())
        if (entry["sampler"], entry["lora_weight"]) == (cell["sampler"], cell["lora_weight"])
    }


def _level(results: Results, key: str) -> Mapping[str, float] | None:
    """The teacher's figure; its effective guidance is, by definition, its guidance."""
    if key == "effective_guidance":
        return dict.fromkeys(("value", "low", "high"), results_of.reference(results)["guidance_scale"])
    return cast(Mapping[str, float] | None, results_of.figure(results_of.reference(results), key))


def _pareto(
    cells: Sequence[Cell], best: Sequence[sweep_plots.Cell], key: str | None, metrics: Mapping[str, Any]
) -> str | None:
    drawn = sweep_plots.pareto(families(cells), best, key, metrics[key]) if key else None
    return None if drawn is None else uri(svg(drawn).encode(), "svg+xml")


# -- Pairs and facts -----------------------------------------------------------------------------------------


def _comparisons(results: Results, cells: Sequence[Cell], metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Adapters against each other, and against plain samplers: a table each, a row for each pair of cells."""
    by_id = {cell["id"]: cell for cell in cells}
    pairs: dict[tuple[str, str], dict[str, Any]] = {}
    for row in results["comparisons"]:
        better = (metrics.get(row["metric"]) or {}).get("better")
        found = {**row, "mark": _mark(row["low"], row["high"], better), "value": row["difference"]}
        pairs.setdefault((row["a"], row["b"]), {})[row["metric"]] = found
    tables: dict[str, list[dict[str, Any]]] = {}
    for (a, b), found in pairs.items():
        if a in by_id and b in by_id:
            both = by_id[b]["kind"] == "student"
            name = "Adapters at the same settings" if both else "Against plain samplers at as many UNet calls"
            tables.setdefault(name, []).append({"a": by_id[a], "b": by_id[b], "metrics": found})
    return [
        {
            "title": name,
            "rows": rows,
            "keys": [key for key in metrics if any(key in row["metrics"] for row in rows)],
        }
        for name, rows in sorted(tables.items())
    ]  # fmt: skip


def _mark(low: float, high: float, better: str | None) -> str:
    """What the interval of a - b says of a: better, worse, different; empty if it holds 0."""
    if low <= 0 <= high:
        return ""
    if better not in ("lower", "higher"):
        return "different"
    return "better" if (low > 0) == (better == "higher") else "worse"


def _facts(results: Results) -> list[tuple[str, str]]:
    """How it was made, for the end of the page."""
    base, teacher, settings = results["base"], results_of.reference(results), results["settings"]
    asked = results_of.prompts(results)
    folders = {
        "real": settings.get("real"), "brand": settings.get("brand"), "control": settings.get("control")
    }  # fmt: skip
    at = f" at revision {base['revision']}" if base.get("revision") else ""
    facts = [("base", f"{base['path']}{at}, content {base['hash'][:12]}, {base['prediction_type']}")]
    for each in results["adapters"]:
        fault = each["fault"]
        text = f"{each['file']}, SHA-256 {each['sha256'][:12]}, {each['layers']} layers"
        facts.append((f"adapter {each['name']}", text + (f"; {fault}" if fault else "")))
    facts += [
        ("teacher", f"{title_of(teacher['sampler'])}, {teacher['steps']} steps, "
                    f"guidance_scale {teacher['guidance_scale']:g}"),
        ("samples", f"{results_of.count(results)} a cell: {len(asked['texts'])} prompts, "
                    f"{asked['images_per_prompt']} of each, {shown(read(results['resolution']))} pixels"),
        ("seed", f"{settings['seed']}; sample i has the same initial noise in every cell"),
        ("features", "; ".join(filter(None, (str(settings.get("features")), results.get("seen"))))),
        *((name, path) for name, path in folders.items() if path),
        ("intervals", f"{settings['confidence']:.0%}, bootstrap over prompts, the same in every cell"),
    ]  # fmt: skip
    if told := results_of.decoded(results):
        facts.insert(0, ("pictures", told))
    if cost := settings.get("cost"):
        facts.append(("price", f"{cost['price_per_hour']:g} {cost['currency']} an hour"))
    facts.append(("machine", ", ".join(f"{key} {text}" for key, text in results["machine"].items())))
    return [*facts, ("versions", ", ".join(f"{key} {text}" for key, text in results["versions"].items()))]
