"""`lcm-kit quickstart`: encode, train, export, sample, evaluate and report, in one go."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lcm_kit import assets, shipped
from lcm_kit.config.evaluation import Quality
from lcm_kit.config.load import load
from lcm_kit.config.schema import Distill
from lcm_kit.errors import UserError

EVALUATION = "evaluation."  # overrides with this prefix are for the evaluation's config
PICTURES = 8


def main(output: Path, overrides: Sequence[str] = ()) -> Path:
    """Run all stages into `output` and return the path of its report.html.

    `overrides` are keys of `configs/quickstart.yaml`, or with `evaluation.` before them of
    `configs/evaluation/quality.yaml`. A stage that is done already does nothing or continues. Raises
    `UserError` as the stages do.
    """
    config, quality = _configs(output, overrides)
    console, began = Console(stderr=True), time.perf_counter()
    for number, (title, stage) in enumerate(_stages(config, quality), start=1):
        console.rule(f"[bold]{number}/6[/] {title}", align="left")
        started = time.perf_counter()
        stage()
        console.print(f"[dim]{_duration(time.perf_counter() - started)}[/]")
    report = output / "report.html"
    _summary(json.loads((output / "results.json").read_text(encoding="utf-8"))["rows"])
    print(f"\nDone in {_duration(time.perf_counter() - began)}.")
    print(f"The files to load into an app, and how (README.md): {output / 'export'}")
    print(f"The whole story, for a browser: {report}")
    return report


def _configs(output: Path, overrides: Sequence[str]) -> tuple[Distill, Quality]:
    """Both configs, checked before anything runs."""
    own = [override for override in overrides if not override.startswith(EVALUATION)]
    other = [override.removeprefix(EVALUATION) for override in overrides if override.startswith(EVALUATION)]
    config = load(shipped.find("configs/quickstart"), [*own, f"output={json.dumps(str(output))}"])
    quality = load(shipped.find("configs/evaluation/quality"), [*other, f"run={json.dumps(str(output))}"])
    if not isinstance(config, Distill) or not isinstance(quality, Quality):
        raise UserError(
            "quickstart distils and evaluates; leave out recipe=..., or use `lcm-kit train` with your config"
        )
    return config, quality


def _stages(config: Distill, quality: Quality) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The six stages by title; each imports its part of the library when it runs."""
    run = Path(config.output)

    def encode() -> None:
        from lcm_kit.data import sources

        sources.encode(config)

    def export() -> None:
        from lcm_kit.export.run import export_run

        export_run(run)

    def sample() -> None:
        from lcm_kit.sample import sample_to_folder

        prompts = assets.prompts(config.validation.prompts or quality.prompts)[:PICTURES]
        base = config.base
        sample_to_folder(
            base.path, prompts, run / "samples", adapter=run, seed=config.seed,
            revision=base.revision, variant=base.variant,
        )  # fmt: skip

    def report() -> None:
        from lcm_kit.export.run import write_card
        from lcm_kit.report.build import write_report

        write_card(run)  # again, now that there are numbers and pictures
        write_report(run)

    yield "encode: images and captions become latents and embeddings", encode
    yield "train: the student learns to land where the teacher lands", lambda: _recipe(config)
    yield "export: the files that apps load, each checked in each app", export
    yield f"sample: {PICTURES} pictures in 4 steps", sample
    yield "evaluate: teacher, plain solvers and student from the same noise", lambda: _recipe(quality)
    yield "report: one page that shows it", report


def _recipe(config: Distill | Quality) -> None:
    shipped.load_recipe(config.recipe).main(config)


def _summary(rows: list[dict[str, Any]]) -> None:
    """Print the teacher, and at 4 UNet calls the best plain solver and the student."""
    from lcm_kit.results import best_plain

    chosen = [row for row in rows if row["name"] == "teacher"][:1]
    plain = best_plain(rows, 4)
    chosen += [plain] if plain else []
    chosen += [row for row in rows if row["name"] == "student" and row["unet_calls"] == 4][:1]
    columns = ("", "UNet calls", "right attributes", "Fréchet distance", "seconds an image")
    table = Table(*columns, box=None, pad_edge=False)
    for row in chosen:
        accuracy, frechet = row.get("attribute_accuracy"), row.get("frechet")
        table.add_row(
            row["name"] if row["name"] != "base" else f"base, {row['solver']}",
            str(row["unet_calls"]),
            "-" if accuracy is None else f"{accuracy:.1%}",
            "-" if frechet is None else f"{frechet:.3g}",
            f"{row['seconds_per_image']:.3f}",
        )
    Console().print(table)


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds // 60)} min {seconds % 60:.0f} s"
