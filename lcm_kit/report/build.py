"""Builds `report.html` from a run's folder: all is embedded, nothing fetched, and text escaped by Jinja2."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lcm_kit import __version__, assets
from lcm_kit.adapter import folder as adapter
from lcm_kit.config.resolution import read, shown
from lcm_kit.core.methods import Progressive
from lcm_kit.errors import UserError
from lcm_kit.evaluation import results as results_of
from lcm_kit.evaluation import verdicts
from lcm_kit.evaluation.result_shapes import Cell, Results
from lcm_kit.evaluation.results import BrandRow
from lcm_kit.io import own_files
from lcm_kit.io.files import atomic_write
from lcm_kit.io.locks import sweep
from lcm_kit.report import brand, contract, plots, style
from lcm_kit.report.shared import page, percent, picture_uri, uri
from lcm_kit.report.sweep import write_sweep_report
from lcm_kit.samplers import keywords, sampler_of, title_of
from lcm_kit.training.overtraining import COLLAPSED, DIVERSITY
from lcm_kit.training.run_files import config_of, metrics_of

_SHOWN = 8  # pictures a row
_BEST, _OTHERS = "Base with the best plain sampler", "Base with every other plain sampler"
Row = dict[str, Any]  # a cell, with its figures by name and its pictures as data URIs


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
        text = filled(context(run))
    atomic_write(run / "report.html", text)
    return run / "report.html"


def filled(found: Mapping[str, Any]) -> str:
    """The page of what `context` found."""
    return page(
        "template.html.j2", found, describe=describe, how=brand.how, interval=brand.interval,
        share=lambda figure: brand.interval(figure, percent),
    )  # fmt: skip


def _style(run: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    found = style.context(run, config, metrics_of(run))
    drawn = {name: uri(svg.encode(), "svg+xml") if svg else None for name, svg in found["plots"].items()}
    more = {"validation": _validation(run), "settings": _settings(run), "version": __version__}
    return {**found, "said": [*found["said"], *_contract(run)], "plots": drawn, **more}


def _contract(run: Path) -> list[str]:
    """What an evaluation/brand of these weights says of the trigger."""
    found = results_of.of_brand(run) if adapter.is_of_these_weights(run, results_of.BRAND_FILE) else None
    told = contract.sentence(found) if found else None
    return [f"What the trigger does: {told}"] if told else []


def _settings(run: Path) -> str:
    file = run / "config.yaml"
    return own_files.read_text(file, "put back what the run was started with") if file.is_file() else ""


def context(run: Path) -> dict[str, Any]:
    """What the template shows."""
    found = results_of.of_brand(run)
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


def _quality(run: Path, results: Results) -> dict[str, Any]:
    """The part that compares with the teacher and with plain samplers."""
    rows = {cell["id"]: _row(run, cell, results) for cell in results["cells"]}
    head = verdicts.quality_headline(results)
    columns = [rows[cell["id"]] for cell in (head.teacher, head.plain, head.student) if cell]
    return {
        "results": results,
        "rows": list(rows.values()),
        "head": head._asdict(),
        "columns": columns,
        "teacher": rows[head.teacher["id"]],
        "student": rows[head.student["id"]],
        "plain": rows[head.plain["id"]] if head.plain else None,
        "verdict": results["verdict"],
        "n": results_of.count(results),
        "floor": results.get("frechet_floor"),
        "decoded": results_of.decoded(results),
        "size": shown(read(results["resolution"])),
        "prompts": results_of.prompts(results)["texts"][:_SHOWN],
        "gallery": {name: [rows[cell["id"]] for cell in cells] for name, cells in _gallery(results).items()},
        "folded": _OTHERS,
    }


def _row(run: Path, cell: Cell, results: Results) -> Row:
    """A cell as the page shows it: figures by name, None where not measured."""
    figures = {key: results_of.value(cell, key) for key in results["metrics"]}
    images = [picture_uri(run / name) for name in cell["pictures"][:_SHOWN] if (run / name).is_file()]
    return {**figures, **cell, "images": images}


def _results(run: Path, needed: bool = True) -> Results | None:
    """What `evaluation/quality` found; None if it did not run and is not `needed`."""
    found = results_of.of_run(run)
    if found is None:
        if not needed:
            return None
        raise UserError(f"run {str(run)!r} has no results.json; run `lcm-kit evaluate` on it first")
    if not verdicts.has_student(found):
        raise UserError(
            f"run {str(run)!r} was evaluated without a student, so there is nothing to report; its figures "
            "are in results.json"
        )
    return found


def describe(cell: Mapping[str, Any]) -> str:
    """How a cell was drawn, in words: `DDIM, 2 steps with guidance`."""
    steps = f"{cell['steps']} step" + ("s" if cell["steps"] != 1 else "")
    guided = " with guidance" if cell["guidance_scale"] > 1 else ""
    return f"{title_of(cell['sampler'])}, {steps}{guided}"


def _gallery(results: Results) -> dict[str, list[Cell]]:
    """The cells to look at by heading; plain samplers: the best at each budget of calls, and the rest."""
    cells = results["cells"]
    plain = results_of.cells_of(cells, "plain")
    best = [verdicts.best_plain(results, calls) for calls in sorted({cell["unet_calls"] for cell in plain})]
    chosen = [cell["id"] for cell in best if cell]
    return {
        "Teacher": results_of.cells_of(cells, "teacher"),
        "Student": results_of.cells_of(cells, "student"),
        _BEST: [cell for cell in best if cell],
        _OTHERS: [cell for cell in plain if cell["id"] not in chosen],
    }


# -- Pictures and plots --------------------------------------------------------------------------------------


def _validation(run: Path) -> dict[str, Any] | None:
    """The last grid that the training drew, and the step it was drawn at."""
    last = max((run / "validation").glob("step-*.png"), default=None)
    return {"step": int(last.stem.partition("-")[2]), "uri": picture_uri(last, 1024)} if last else None


def _said(run: Path, metrics: Sequence[Mapping[str, float]]) -> list[str]:
    """What is to be said of the training's own figures; of a run without an adapter nothing."""
    if not (run / "adapter").is_dir():
        return []
    kept = adapter.read_provenance(run / "adapter").optimizer_steps
    stale = [
        f"{name} was measured before the last training of this run, so its figures and pictures are of other "
        "weights: export and evaluate again."
        for name in (results_of.FILE, results_of.BRAND_FILE)
        if (run / name).is_file() and not adapter.is_of_these_weights(run, name)
    ]
    return stale + style.verdict_sentences(style.figures(metrics, "train/distill"), kept)


def _plots(results: Results | None, metrics: Sequence[Mapping[str, float]]) -> dict[str, str | None]:
    """The plots by name as data URIs; None where there is nothing to plot."""
    drawn = {
        **(_by_calls(results) if results else {}),
        "loss": plots.curve(metrics, "loss", "consistency loss", log=True),
        "one_step": plots.curve(metrics, "one_step_distance", "one-step distance to the teacher"),
        "control": style.control_curve(metrics, style.figures(metrics, "train/distill")),
        "diversity": plots.curve(metrics, DIVERSITY, "diversity over the teacher's", level=COLLAPSED),
    }
    return {name: uri(svg.encode(), "svg+xml") if svg else None for name, svg in drawn.items()}


def _by_calls(results: Results) -> dict[str, str | None]:
    """What the evaluation found over UNet calls, as SVG: what was read in pictures, or else distances."""
    cells = results["cells"]
    if not all(results_of.figure(cell, "prompt_adherence") for cell in cells):
        distance = plots.by_calls(cells, "pixel_distance", "pixel distance to the teacher")
        return {"accuracy": None, "frechet": None, "distance": distance}
    floor = results.get("frechet_floor")
    return {
        "accuracy": plots.by_calls(cells, "prompt_adherence", "share of pictures all right"),
        "frechet": plots.by_calls(cells, "frechet_biased", "Fréchet distance", floor),
        "distance": None,
    }


# -- How was it made, how is it used -------------------------------------------------------------------------


def _facts(run: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The settings that a person asks for first."""
    if not config:
        return {}
    lora, guidance, grid = config["adapter"], config["guidance"], config["grid"]
    trained = adapter.read_provenance(run / "adapter") if (run / "adapter").is_dir() else None
    method = trained.distilled if trained else None
    steps = trained.steps if trained else config["steps"]
    images = config["batch_size"] * config["accumulation"]
    adaptive = ", adaptive c" if config["loss"].get("adaptive") else ""
    looks = ", ".join(each["path"] for each in config.get("teacher", {}).get("adapters", ()))
    return {
        "base": config["base"]["path"],
        **({"method": method.title} if method else {}),
        **({"the teacher's style": looks} if looks else {}),
        **_seen(config["data"]),
        "training": f"{steps} steps of {images} images a process",
        "LoRA": f"rank {lora['rank']}, alpha {lora['alpha']:g}, on {lora['targets']} layers",
        "guidance baked in": _baked(guidance["min"], guidance["max"]),
        "solver": f"{config['solver']}, {_grid(config['method'], grid)}",
        "loss": config["loss"]["name"] + adaptive,
        "learning rate": f"{config['optimizer']['lr']:g}",
        "seed": str(config["seed"]),
    }


def _grid(method: Mapping[str, Any], grid: Mapping[str, Any]) -> str:
    """The solver's grid in words, or the stages of progressive distillation."""
    if method["name"] == Progressive.name:
        return f"from {method['start']} steps to {method['finish']}, halved in each stage"
    start = f", from {grid['steps_start']} upwards" if grid["steps_start"] else ""
    sampling = grid.get("sampling", "uniform")  # runs of before there were others have no such key
    return f"grid of {grid['steps']} steps{start}" + ("" if sampling == "uniform" else f", t {sampling}")


def _baked(low: float, high: float) -> str:
    return "none" if high <= 1 else f"{low:g} to {high:g}"


def _seen(data: Mapping[str, Any]) -> dict[str, str]:
    """What was trained on: images, the teacher's own samples, both, or prompts alone."""
    source = data.get("source", "images")
    seen = {"images": data["path"]} if source in ("images", "mix") else {}
    if source in ("teacher", "mix"):
        seen["the teacher's samples for"] = data["samples"]["prompts"]
    if source == "prompts":
        seen["prompts, without pictures"] = data["samples"]["prompts"]
    return {**seen, **({"trigger": data["trigger"]} if data.get("trigger") else {})}


def _style_export(run: Path) -> str | None:
    """Where the files of the style alone are, if the run was made by `lcm-kit finetune`."""
    return "style/export" if (run / "style" / "export").is_dir() else None


_SNIPPET = """import torch
from diffusers import AutoPipelineForText2Image, {scheduler}

base = {base}
lora = {lora}
pipe = AutoPipelineForText2Image.from_pretrained(base, dtype=torch.float32)
pipe.scheduler = {scheduler}.from_config(pipe.scheduler.config{settings})
pipe.load_lora_weights(lora, weight_name="pytorch_lora_weights.safetensors")

image = pipe({prompt}{call}).images[0]
image.save("picture.png")"""


def _use(run: Path, look: Results | None, quality: Results | None) -> dict[str, Any]:
    """How many steps to draw with, and a program that does: the brand's first, if it was evaluated."""
    chosen = look or quality
    assert chosen is not None  # the page needs one of them
    student = verdicts.brand_headline(look).adapter if look else verdicts.quality_headline(chosen).student
    prompt = results_of.prompts(chosen)["texts"][0]
    return {"use": student, "snippet": snippet(run, chosen["base"]["path"], prompt, student)}


def snippet(run: Path, base: str, prompt: str, use: Cell | BrandRow) -> str:
    """A Python program that draws as `use` was, with the exported file and plain diffusers."""
    sampler = sampler_of(use["sampler"])
    more = {**sampler.call, "num_inference_steps": use["steps"], "guidance_scale": use["guidance_scale"]}
    return _SNIPPET.format(
        scheduler=sampler.scheduler,
        settings=keywords(sampler.settings),
        call=keywords(more),
        base=json.dumps(assets.resolve(base)),
        lora=json.dumps(str((run / "export").resolve())),
        prompt=json.dumps(prompt, ensure_ascii=False),
    )
