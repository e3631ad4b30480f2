"""What evaluations share: results.json, samples kept by what made them, the table that a person reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcm_kit import console, own_files, result_shapes
from lcm_kit.errors import UserError
from lcm_kit.files import discard
from lcm_kit.share import Share

Rows = dict[str, Tensor]  # every tensor [N, ...]: a row a sample
FILE = "results.json"  # in the folder of a run, of a sweep, of a pair
SWEEP = "guidance_sweep"  # `kind` in it; that of a run names none
SCHEMA = 1  # of a sweep's: docs/contract.md


def of_run(run: Path) -> result_shapes.Quality | None:
    """What `evaluation/quality` found for `run`; None if it did not run, or another evaluation did."""
    file, again = run / FILE, f"run `lcm-kit evaluate evaluation/quality run={run}` again"
    if not file.is_file() or "rows" not in own_files.read_json(file, result_shapes.Kind, again):
        return None
    return own_files.read_json(file, result_shapes.Quality, again)


def is_sweep(folder: Path) -> bool:
    """Whether the folder's results.json is a guidance sweep's. Raises `UserError` if it cannot be read."""
    file, again = folder / FILE, "run the evaluation that it is of again"
    return file.is_file() and own_files.read_json(file, result_shapes.Kind, again).get("kind") == SWEEP


def of_sweep(folder: Path) -> result_shapes.Sweep | None:
    """What a guidance sweep found; None if there is no results.json.

    Raises `UserError` if it is not a sweep's, or of another version.
    """
    file, again = (
        folder / FILE,
        "run the guidance sweep again, which keeps what it drew",
    )
    if not file.is_file():
        return None
    said = own_files.read_json(file, result_shapes.Kind, again)
    if said.get("kind") != SWEEP:
        raise UserError(f"{file} is not a guidance sweep's; `lcm-kit report` makes a run's report of it")
    if said.get("schema") != SCHEMA:
        raise UserError(
            f"{file} has schema {said.get('schema')}, and this lcm-kit reads {SCHEMA}; run the sweep again"
        )
    return own_files.read_json(file, result_shapes.Sweep, again)


def kept(file: Path, make: Callable[[], Sequence[Rows]], share: Share) -> Rows:
    """The table of a cell: from `file` if it is there, else what `make` gives, written to `file`.

    `make` returns this process's batches, which are its share of all, every `share.world`-th; the first
    process joins those of all processes in order. `file` is named `CELL-KEY.safetensors`; other keys of the
    same cell are from other inputs and are removed. A damaged one is drawn again.
    """
    missing = not own_files.is_whole(file)
    share.wait()  # nobody may see what another writes
    try:
        if missing:
            tensors = {
                f"{k:06d}/{name}": value for k, rows in enumerate(make()) for name, value in rows.items()
            }
            own_files.write_tensors(_part(file, share.rank), tensors)
        share.wait()
        if missing and share.first:
            _join(file, share.world)
    except BaseException:
        with suppress(UserError):  # the one that is raised says more
            discard(_part(file, share.rank))
        raise
    if share.first:
        for rank in range(share.world):  # a killed process may have left some
            discard(_part(file, rank))
    share.wait()
    return own_files.read_tensors(file, "evaluate again, which draws it anew")


def _join(file: Path, world: int) -> None:
    """Write `file` of the parts of all processes, and remove what is of other inputs."""
    turns = zip_longest(*(_batches(_part(file, rank)) for rank in range(world)))
    batches = [batch for turn in turns for batch in turn if batch is not None]
    cell = file.stem.rpartition("-")[0]
    for old in file.parent.glob(f"{cell}-{'?' * 12}.safetensors"):
        discard(old)
    own_files.write_tensors(
        file, {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    )


def _part(file: Path, rank: int) -> Path:
    return file.with_name(f"{file.stem}.part{rank}.safetensors")


def _batches(file: Path) -> list[Rows]:
    found: dict[str, Rows] = {}
    for key, tensor in own_files.read_tensors(file, "evaluate again").items():
        batch, _, name = key.partition("/")
        found.setdefault(batch, {})[name] = tensor
    return list(found.values())


def best_plain(rows: Sequence[Mapping[str, Any]], calls: int) -> Mapping[str, Any] | None:
    """The base's best row at `calls` UNet calls: most pictures right, then Frechet, then distance."""
    found = [row for row in rows if row["name"] == "base" and row["unet_calls"] == calls]

    def rank(row: Mapping[str, Any]) -> tuple[float, float, float]:
        return -(row["attribute_accuracy"] or 0), row["frechet"] or 0, row["distance_to_teacher"]

    return min(found, key=rank, default=None)


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the rows as a table."""
    shown = {
        "attribute_accuracy": "right", "frechet": "Frechet", "distance_to_teacher": "distance",
        "saturation": "colour", "seconds_per_image": "s/image",
    }  # fmt: skip
    table = console.Table("", "steps", "CFG", "calls", *shown.values(), box=console.SIMPLE, pad_edge=False)
    for row in rows:
        figures = ("-" if row[key] is None else f"{row[key]:.3f}" for key in shown)
        cost = (str(row["steps"]), f"{row['guidance_scale']:g}", str(row["unet_calls"]))
        table.add_row(f"{row['name']} {row['solver']}", *cost, *figures)
    console.show(table)
