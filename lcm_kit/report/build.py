"""Builds `report.html` from a run's folder: all is embedded, nothing fetched, and text escaped by Jinja2."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lcm_kit import __version__, adapter, assets, own_files, result_shapes
from lcm_kit import results as results_of
from lcm_kit.errors import UserError
from lcm_kit.files import atomic_write
from lcm_kit.locks import sweep
from lcm_kit.report import brand, plots, style
from lcm_kit.report.shared import page, picture_uri, uri
from lcm_kit.report.sweep import write_sweep_report
from lcm_kit.run_files import config_of, metrics_of
from lcm_kit.samplers import title_of

_CALLS = 4  # UNet calls of the headline comparison
_SHOWN = 8  # pictures a row
_BEST, _OTHERS = "Base with the best plain solver", "Base with every other plain solver"
Row = Mapping[str, Any]


def write_report(run: Path) -> Path:
    """Write `run/report.html` and return its path; that of a sweep, if `run` is a sweep's folder.

    Reads `brand.json` (`evaluation/brand`) and `results.json` with `pictures/` (`evaluation/quality`), at
    least one of them, and `config.yaml`, `metrics.jsonl` and `validation/` where they are. Raises `UserError`
    if the run has not been evaluated, or has no student. A style LoRA's report (`style.py`) needs no
    evaluation.
    """
    sweep(run, deep=False)
    if results_of.is_sweep(run):
        return write_sweep_report(run)
    if (config := config_of(run)).get("recipe") == style.RECIPE:
        text = page("style.html.j2", _style(run, config))
    else:
        text = page(
            "template.html.j2", context(run), describe=describe, how=brand.how, interval=brand.interval
        )
    atomic_write(run / "report.html", text)
    return run / "report.html"


def _style(run: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    found = style.context(run, config, metrics_of(run))
    drawn = {name: uri(svg.encode(), "svg+xml") if svg else None for name, svg in found["plots"].items()}
    more = {"validation": _validation(run), "settings": _settings(run), "version": __version__}
    return {**found, "plots": drawn, **more}


def _settings(run: Path) -> str:
    file = run / "config.yaml"
    return own_files.read_text(file, "put back what the run was started with") if file.is_file() else ""


def context(run: Path) -> dict[str, Any]:
    """What the template shows."""
    found = brand.read(run)
    results = _results(run, needed=found is None)
    metrics = metrics_of(run)
    return {
        "name": run.resolve().name,
        "brand": brand.context(run, found, results) if found else None,
        **(_quality(run, results) if results else {"results": None}),
        "plots": _plots(results, metrics),
        "facts": _facts(run, config_of(run)),
        "style": _style_export(run),
        "settings": _settings(run),
        "said": _said(run, metrics),
        "validation": _validation(run),
        **_use(run, found, results),
        "version": __version__,
    }


def _quality(run: Path, results: Mapping[str, Any]) -> dict[str, Any]:
    """The part that compares with the teacher and with plain solvers."""
    rows: list[Row] = [{**row, "images": _images(run, row)} for row in results["rows"]]
    head = headline(rows)
    return {
        "results": results,
        "rows": rows,
        "head": head,
        "verdict": verdict(head),
        "prompts": results["prompts"][:_SHOWN],
        "gallery": _gallery(rows),
        "folded": _OTHERS,
    }


def _results(run: Path, needed: bool = True) -> result_shapes.Quality | None:
    """What `evaluation/quality` found; None if it did not run and is not `needed`."""
    found = results_of.of_run(run)
    if found is None:
        if not needed:
            return None
        raise UserError(f"run {str(run)!r} has no results.json; run `lcm-kit evaluate` on it first")
    if not any(row["name"] == "student" for row in found["rows"]):
        raise UserError(
            f"run {str(run)!r} was evaluated without a student, so there is nothing to report; its figures "
            "are in results.json"
        )
    return found


def describe(row: Mapping[str, Any]) -> str:
    """How a row was drawn, in words: `DDIM, 2 steps with guidance`."""
    steps = f"{row['steps']} step" + ("s" if row["steps"] != 1 else "")
    guided = " with guidance" if row["guidance_scale"] > 1 else ""
    return f"{title_of(row['solver'])}, {steps}{guided}"


# -- Does it work? -------------------------------------------------------------------------------------------


def lowest_frechet(rows: Sequence[Row], calls: int) -> float | None:
    """The least Frechet distance of a plain solver at `calls` UNet calls; None where none was measured.

    It may be another row than the one that draws most right: without guidance a plain solver keeps closer to
    the look of real pictures and further from their prompts.
    """
    found = [row["frechet"] for row in rows if row["name"] == "base" and row["unet_calls"] == calls]
    return min((value for value in found if value is not None), default=None)


def headline(rows: Sequence[Row]) -> dict[str, Any]:
    """The comparison that matters: teacher, best plain solver and student, the last two at equal UNet calls.

    The student's row is the one at 4 calls or the nearest to it; `plain` is None where no plain solver ran at
    it.
    """
    teacher = next(row for row in rows if row["name"] == "teacher")
    students = [row for row in rows if row["name"] == "student"]
    student = min(students, key=lambda row: abs(row["unet_calls"] - _CALLS))
    plain = results_of.best_plain(rows, student["unet_calls"])
    return {
        "teacher": teacher,
        "plain": plain,
        "student": student,
        "plain_frechet": lowest_frechet(rows, student["unet_calls"]),
        "fewer": teacher["unet_calls"] / student["unet_calls"],
        "faster": teacher["seconds_per_image"] / student["seconds_per_image"],
        "columns": [row for row in (teacher, plain, student) if row],
    }


def verdict(head: Mapping[str, Any]) -> str:
    """Yes: within 10 points of the teacher, and at most half of any plain solver's Frechet distance."""
    teacher, plain, student = head["teacher"], head["plain"], head["student"]
    if plain is None or student["attribute_accuracy"] is None:
        return "Judge by eye"
    close = student["attribute_accuracy"] >= teacher["attribute_accuracy"] - 0.10
    better = student["attribute_accuracy"] > plain["attribute_accuracy"]
    if close and better and student["frechet"] <= 0.5 * head["plain_frechet"]:
        return "Yes"
    return "In part" if better else "No"


def _gallery(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows to look at by heading; plain solvers: the best at each budget of UNet calls, and the rest."""
    plain = [row for row in rows if row["name"] == "base"]
    best = [results_of.best_plain(rows, calls) for calls in sorted({row["unet_calls"] for row in plain})]
    return {
        "Teacher": [row for row in rows if row["name"] == "teacher"],
        "Student": [row for row in rows if row["name"] == "student"],
        _BEST: [row for row in best if row],
        _OTHERS: [row for row in plain if not any(row is one for one in best)],
    }


# -- Pictures and plots --------------------------------------------------------------------------------------


def _images(run: Path, row: Mapping[str, Any]) -> list[str]:
    return [picture_uri(run / name) for name in row["pictures"][:_SHOWN] if (run / name).is_file()]


def _validation(run: Path) -> dict[str, Any] | None:
    """The last grid that the training drew, and the step it was drawn at."""
    last = max((run / "validation").glob("step-*.png"), default=None)
    return {"step": int(last.stem.partition("-")[2]), "uri": picture_uri(last, 1024)} if last else None


def _said(run: Path, metrics: Sequence[Mapping[str, float]]) -> list[str]:
    """What is to be said of the training's own figures; of a run without an adapter nothing."""
    if not (run / "adapter").is_dir():
        return []
    kept = adapter.read_facts(run / "adapter").optimizer_steps
    return style.said(style.figures(metrics, "train/distill"), kept)


def _plots(
    results: Mapping[str, Any] | None, metrics: Sequence[Mapping[str, float]]
) -> dict[str, str | None]:
    """The plots by name as data URIs; None where there is nothing to plot."""
    drawn = {
        **(_by_calls(results) if results else {}),
        "loss": plots.curve(metrics, "loss", "consistency loss", log=True),
        "one_step": plots.curve(metrics, "one_step_distance", "one-step distance to the teacher"),
        "control": style.control_curve(metrics, style.figures(metrics, "train/distill")),
    }
    return {name: uri(svg.encode(), "svg+xml") if svg else None for name, svg in drawn.items()}


def _by_calls(results: Mapping[str, Any]) -> dict[str, str | None]:
    """What the evaluation found over UNet calls, as SVG: what was read in pictures, or else distances."""
    rows = results["rows"]
    read = all(row["attribute_accuracy"] is not None for row in rows)
    if not read:
        distance = plots.by_calls(rows, "distance_to_teacher", "pixel distance to the teacher")
        return {"accuracy": None, "frechet": None, "distance": distance}
    floor = results["frechet_floor"]
    return {
        "accuracy": plots.by_calls(rows, "attribute_accuracy", "share of pictures all right"),
        "frechet": plots.by_calls(rows, "frechet", "Fréchet distance", floor),
        "distance": None,
    }


# -- How was it made, how is it used -------------------------------------------------------------------------


def _facts(run: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The settings that a person asks for first."""
    if not config:
        return {}
    lora, guidance, grid = config["adapter"], config["guidance"], config["grid"]
    trained = adapter.read_facts(run / "adapter") if (run / "adapter").is_dir() else None
    method = trained.distilled if trained else None
    steps = trained.steps if trained else config["steps"]
    images = config["batch_size"] * config["accumulation"]
    start = f", from {grid['steps_start']} upwards" if grid["steps_start"] else ""
    looks = ", ".join(each["path"] for each in config.get("teacher", {}).get("adapters", ()))
    return {
        "base": config["base"]["path"],
        **({"method": method.title} if method else {}),
        **({"the teacher's look": looks} if looks else {}),
        **_seen(config["data"]),
        "training": f"{steps} steps of {images} images a process",
        "LoRA": f"rank {lora['rank']}, alpha {lora['alpha']:g}, on {lora['targets']} layers",
        "guidance baked in": f"{guidance['min']:g} to {guidance['max']:g}",
        "solver": f"{config['solver']}, grid of {grid['steps']} steps{start}",
        "loss": config["loss"]["name"],
        "learning rate": f"{config['optimizer']['lr']:g}",
        "seed": str(config["seed"]),
    }


def _seen(data: Mapping[str, Any]) -> dict[str, str]:
    """What was trained on: images, the teacher's own samples, or both."""
    source = data.get("source", "images")
    images = {"images": data["path"]} if source != "teacher" else {}
    samples = {"the teacher's samples for": data["samples"]["prompts"]} if source != "images" else {}
    trigger = {"trigger": data["trigger"]} if data.get("trigger") else {}
    return {**images, **samples, **trigger}


def _style_export(run: Path) -> str | None:
    """Where the files of the look alone are, if the run was made by `lcm-kit finetune`."""
    return "style/export" if (run / "style" / "export").is_dir() else None


_SNIPPET = """import torch
from diffusers import AutoPipelineForText2Image, LCMScheduler

base = {base}
lora = {lora}
pipe = AutoPipelineForText2Image.from_pretrained(base, dtype=torch.float32)
pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
pipe.load_lora_weights(lora, weight_name="pytorch_lora_weights.safetensors")

image = pipe({prompt}, num_inference_steps={steps}, guidance_scale=1.0).images[0]
image.save("picture.png")"""


def _use(run: Path, look: Mapping[str, Any] | None, results: Mapping[str, Any] | None) -> dict[str, Any]:
    """How many steps to draw with, and a program that does: the brand's first, if it was evaluated."""
    if look:
        base = results["base"]["path"] if results else look["base"]["path"]
        steps, prompt = brand.headline(look)["adapter"]["steps"], look["prompts"][0]
    else:
        assert results is not None  # the page needs one of them
        base, steps = results["base"]["path"], headline(results["rows"])["student"]["steps"]
        prompt = results["prompts"][0]
    return {"steps": steps, "snippet": snippet(run, base, prompt, steps)}


def snippet(run: Path, base: str, prompt: str, steps: int) -> str:
    """A Python program that draws with the exported file and plain diffusers."""
    return _SNIPPET.format(
        base=json.dumps(assets.resolve(base)),
        lora=json.dumps(str((run / "export").resolve())),
        prompt=json.dumps(prompt, ensure_ascii=False),
        steps=steps,
    )
