"""What a sweep leaves on disk: results.json, results.csv, results.parquet, samples.parquet, pictures/."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from lcm_kit import console, own_files, sample
from lcm_kit.files import atomic_file, atomic_folder
from lcm_kit.results import Rows
from lcm_kit.sweep.cells import Cell
from lcm_kit.sweep.draw import Samples

C = TypeVar("C", bound=Cell)
_PER_SAMPLE = ("adherence", "chroma", "clipped", "sharpness", "seconds", "joules")


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
        for file, picture in zip(names[cell.id], sample.to_pil(table["pictures"] / 127.5 - 1), strict=True):
            picture.save(folder / file, optimize=True)
    return names


def write_results(folder: Path, results: Mapping[str, Any]) -> Path:
    """results.json, and its cells as results.csv and results.parquet, a row a cell."""
    from pyarrow import Table as Columns
    from pyarrow import csv, parquet

    table = Columns.from_pylist([_flat(cell) for cell in results["cells"]])
    with atomic_file(folder / "results.csv") as temporary:
        csv.write_csv(table, temporary)
    with atomic_file(folder / "results.parquet") as temporary:
        parquet.write_table(table, temporary)
    own_files.write_json(folder / "recommended.json", results["recommended"])
    own_files.write_json(folder / "results.json", results)
    return folder / "results.json"


def write_samples(folder: Path, tables: Mapping[C, Rows], samples: Samples) -> None:
    """samples.parquet: a row for each sample of each cell."""
    from pyarrow import Table as Columns
    from pyarrow import concat_tables, parquet

    texts, parts = samples.texts, []
    for cell, table in tables.items():
        known = {name: table[name].tolist() for name in _PER_SAMPLE if name in table}
        plain = {"cell": [cell.id] * len(texts), "sample": list(range(len(texts))), "prompt": texts}
        parts.append(Columns.from_pydict({**plain, **known}))
    with atomic_file(folder / "samples.parquet") as temporary:
        parquet.write_table(concat_tables(parts), temporary)


def _flat(cell: Mapping[str, Any]) -> dict[str, Any]:
    """A cell of results.json as one row: `metric`, `metric_low`, `metric_high`."""
    row = {key: value for key, value in cell.items() if key not in ("metrics", "pictures")}
    for key, figure in cell["metrics"].items():
        for part, name in (("value", key), ("low", f"{key}_low"), ("high", f"{key}_high")):
            row[name] = None if figure is None else figure[part]
    return row


_HEADS = {
    "prompt_adherence": "prompts", "kernel_teacher": "kernel", "effective_guidance": "guidance",
    "saturation": "colour", "sharpness": "sharp", "diversity": "diverse",
}  # fmt: skip


def show(cells: Sequence[Mapping[str, Any]]) -> None:
    """Print a line a cell, with the metrics that a person looks at first."""
    table = console.Table(
        "cell", "calls", *_HEADS.values(), box=console.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0)
    )
    for cell in cells:
        figures = [cell["metrics"][key] for key in _HEADS]
        words = ("-" if each is None else f"{each['value']:.2f}" for each in figures)
        table.add_row(cell["id"], str(cell["unet_calls"]), *words)
    console.show(table)


_COMPARED = ("prompt_adherence", "kernel_teacher", "brand_similarity", "saturation", "sharpness", "diversity")


def show_comparisons(results: Mapping[str, Any]) -> None:
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


def machine(device: str) -> dict[str, Any]:
    """What it ran on."""
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    return {"device": device, "name": name, "threads": torch.get_num_threads()}
