"""What an evaluation leaves on disk: results.json of one shape; tables, samples and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import torch

from lcm_kit import console, sample
from lcm_kit.bases import BaseInfo
from lcm_kit.config.brand import Brand
from lcm_kit.config.evaluation import Quality
from lcm_kit.config.resolution import plain
from lcm_kit.config.sweep import Compose, GuidanceSweep
from lcm_kit.evaluation import results as results_of
from lcm_kit.evaluation.cells import Cell
from lcm_kit.evaluation.draw import Samples, versions
from lcm_kit.evaluation.extract import FeatureExtractor
from lcm_kit.evaluation.kept import Rows
from lcm_kit.evaluation.measure import Figures
from lcm_kit.evaluation.metric_table import as_json, metrics_of, per_picture
from lcm_kit.evaluation.result_shapes import Cell as CellShape
from lcm_kit.evaluation.result_shapes import Comparison, Results
from lcm_kit.evaluation.swept_adapters import SweptAdapter
from lcm_kit.io import own_files
from lcm_kit.io.files import atomic_file, atomic_folder
from lcm_kit.io.own_shapes import Interval

C = TypeVar("C", bound=Cell)
Config = Quality | Brand | GuidanceSweep | Compose


@dataclass(frozen=True)
class Measured(Generic[C]):
    """A list of prompts, drawn by all cells and measured."""

    samples: Samples
    figures: Mapping[C, Figures]
    pictures: Mapping[str, list[str]]  # by cell, relative to the results' folder


def results(
    config: Config,
    name: str,
    base: BaseInfo,
    adapters: Sequence[SweptAdapter],
    look: FeatureExtractor,
    reference: Cell,
    measured: Mapping[str, Measured[C]],
    comparisons: list[Comparison],
) -> Results:
    """What results.json holds of any evaluation; `measured` by the name of its list of prompts.

    No verdict and no recommendation yet.
    """
    settings = {key: value for key, value in asdict(config).items() if key not in ("recipe", "output")}
    main = measured[results_of.MAIN].samples
    found = {
        "version": results_of.VERSION, "recipe": config.recipe, "name": name,
        "base": {"path": base.path, "revision": base.revision, "variant": base.variant,
                 "hash": base.base_hash, "prediction_type": base.prediction_type},
        "adapters": [subject.facts() for subject in adapters],
        "settings": settings, "resolution": plain(main.resolution), "adherence": look.kind(),
        "prompts": {
            kind: {"texts": list(each.samples.prompts), "shown": each.samples.shown,
                   "images_per_prompt": each.samples.images_per_prompt}
            for kind, each in measured.items()
        },
        "metrics": {key: metric.described() for key, metric in metrics_of(config.recipe).items()},
        "reference": reference.id,
        "cells": [
            _cell(kind, cell, figures, each, config) for kind, each in measured.items()
            for cell, figures in each.figures.items()
        ],
        "decoder": main.how.decoder and str(main.how.decoder),
        "comparisons": comparisons, "verdict": None, "recommended": None,
        "machine": machine(sample.placement()["device"]), "versions": versions(),
        **({"seen": seen} if (seen := look.seen(main.resolution)) else {}),
    }  # fmt: skip
    return cast(Results, found)


def cell_id(kind: str, cell: Cell) -> str:
    """A cell's id on a list of prompts: its own, on another list than the main one after that one's name."""
    return cell.id if kind == results_of.MAIN else f"{kind}-{cell.id}"


def _cell(kind: str, cell: C, figures: Figures, measured: Measured[C], config: Config) -> CellShape:
    found = {
        **cell.settings(), "id": cell_id(kind, cell), "prompts": kind,
        "metrics": as_json(figures, config.confidence, config.recipe), "pictures": measured.pictures[cell.id],
    }  # fmt: skip
    return cast(CellShape, found)


def write_pictures(folder: Path, tables: Mapping[C, Rows], samples: Samples) -> dict[str, list[str]]:
    """`pictures/CELL-NNN.png` for every cell and shown sample; the paths by cell, relative to `folder`."""
    with atomic_folder(folder / "pictures") as inside:
        names = save_pictures(inside, tables, samples)
    return {cell: [f"pictures/{file}" for file in files] for cell, files in names.items()}


def save_pictures(
    folder: Path, tables: Mapping[C, Rows], samples: Samples, begin: str = ""
) -> dict[str, list[str]]:
    """`CELL-NNN.png`, after `begin`, for every cell and shown sample into `folder`; the names by cell."""
    names: dict[str, list[str]] = {}
    for cell, table in tables.items():
        names[cell.id] = [f"{begin}{cell.id}-{i:03d}.png" for i in samples.shown]
        for file, picture in zip(names[cell.id], sample.to_pil(samples.pictures_of(table)), strict=True):
            picture.save(folder / file, optimize=True)
    return names


def write_tables(folder: Path, results: Results) -> None:
    """The cells as results.csv and results.parquet, a row a cell, and recommended.json."""
    from pyarrow import Table as Columns
    from pyarrow import csv, parquet

    table = Columns.from_pylist([_flat(cell) for cell in results["cells"]])
    with atomic_file(folder / "results.csv") as temporary:
        csv.write_csv(table, temporary)
    with atomic_file(folder / "results.parquet") as temporary:
        parquet.write_table(table, temporary)
    own_files.write_json(folder / "recommended.json", cast(Mapping[str, Any], results["recommended"]))


def write_results(file: Path, results: Results) -> Path:
    """Write results.json, last of all: where it is, the rest is."""
    own_files.write_json(file, results)
    return file


def write_samples(folder: Path, tables: Mapping[C, Rows], samples: Samples, recipe: str) -> None:
    """samples.parquet: a row for each sample of each cell."""
    from pyarrow import Table as Columns
    from pyarrow import concat_tables, parquet

    texts, parts = samples.texts, []
    for cell, table in tables.items():
        plain = {"cell": [cell.id] * len(texts), "sample": list(range(len(texts))), "prompt": texts}
        parts.append(Columns.from_pydict({**plain, **per_picture(recipe, table)}))
    with atomic_file(folder / "samples.parquet") as temporary:
        parquet.write_table(concat_tables(parts), temporary)


def _flat(cell: CellShape) -> dict[str, Any]:
    """A cell of results.json as one row: `metric`, `metric_low`, `metric_high`."""
    row = {key: value for key, value in cell.items() if key not in ("metrics", "pictures", "prompts")}
    for key, figure in cell["metrics"].items():
        row[key], row[f"{key}_low"], row[f"{key}_high"] = (
            (None, None, None) if figure is None else (figure["value"], figure["low"], figure["high"])
        )
    return row


_HEADS = {
    "prompt_adherence": "prompts", "brand_similarity": "similarity", "frechet_biased": "Frechet",
    "kernel_teacher": "kernel", "effective_guidance": "guidance", "pixel_distance": "distance",
    "saturation": "colour", "sharpness": "sharp", "diversity": "diverse", "seconds": "s/image",
}  # fmt: skip


def show(results: Results) -> None:
    """Print a line a cell, with those metrics that a person looks at first and that any cell has."""
    if told := results_of.decoded(results):
        console.say(f"figures of {told}")
    cells = results["cells"]
    heads = {key: head for key, head in _HEADS.items() if any(results_of.figure(cell, key) for cell in cells)}
    table = console.Table(
        "cell", "calls", *heads.values(), box=console.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0)
    )
    for cell in cells:
        values = [results_of.value(cell, key) for key in heads]
        words = ("-" if value is None else f"{value:.2f}" for value in values)
        table.add_row(cell["id"], str(cell["unet_calls"]), *words)
    console.show(table)


_COMPARED = ("prompt_adherence", "kernel_teacher", "brand_similarity", "saturation", "sharpness", "diversity")


def show_comparisons(results: Results) -> None:
    """Print how adapters differ at the same settings without guidance of their own, if there are several."""
    cells = {cell["id"]: cell for cell in results["cells"]}
    table = console.Table(
        "a less b", "metric", "difference", "interval", "p", box=console.SIMPLE, pad_edge=False
    )
    for row in results["comparisons"]:
        a, b = cells[row["a"]], cells[row["b"]]
        if b["adapter"] is None or a["guidance_scale"] > 1 or row["metric"] not in _COMPARED:
            continue
        ends = f"{row['low']:.3g} to {row['high']:.3g}"
        name = results["metrics"][row["metric"]]["label"]
        table.add_row(f"{a['id']} less {b['id']}", name, f"{row['difference']:.3g}", ends, f"{row['p']:.3f}")
    if table.row_count:
        console.show(table)


def show_contract(results: Results) -> None:
    """Print the trigger contract, a line an adapter's cell, and its verdict; nothing without one."""
    contract = results.get("contract")
    if contract is None:
        return
    heads = {
        "strength": "strength", "leak": "leak", "leak_share": "share", "changed": "changed", "lost": "lost",
        "lost_elsewhere": "elsewhere",
    }  # fmt: skip
    table = console.Table(
        "trigger contract", *heads.values(), box=console.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0)
    )
    for row in contract["rows"]:
        figures = cast(Mapping[str, Interval | None], row)
        values = (figures[key] for key in heads)
        table.add_row(row["cell"], *("-" if each is None else f"{each['value']:.2f}" for each in values))
    console.show(table)
    about = f"of {contract['trigger']!r}" if contract["trigger"] else "without a trigger"
    console.say(f"trigger contract {about}: {contract['verdict']}")


def machine(device: str) -> dict[str, Any]:
    """What it ran on."""
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    return {"device": device, "name": name, "threads": torch.get_num_threads()}
