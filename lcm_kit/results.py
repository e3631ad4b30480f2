"""What evaluations share: samples kept by what made them, and the table of rows that a person reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lcm_kit import console
from lcm_kit.files import atomic_file
from lcm_kit.share import Share

Rows = dict[str, Tensor]  # every tensor [N, ...]: a row a sample


def kept(file: Path, make: Callable[[], Sequence[Rows]], share: Share) -> Rows:
    """The table of a cell: from `file` if it is there, else what `make` gives, written to `file`.

    `make` returns this process's batches, which are its share of all, every `share.world`-th; the first
    process joins those of all processes in order. `file` is named `CELL-KEY.safetensors`; other keys of the
    same cell are from other inputs and are removed.
    """
    missing = not file.is_file()
    share.wait()  # nobody may see what another writes
    if missing:
        tensors = {f"{k:06d}/{name}": value for k, rows in enumerate(make()) for name, value in rows.items()}
        _save(_part(file, share.rank), tensors)
    share.wait()
    if missing and share.first:
        parts = [_part(file, rank) for rank in range(share.world)]
        turns = zip_longest(*(_batches(part) for part in parts))
        batches = [batch for turn in turns for batch in turn if batch is not None]
        cell = file.stem.rpartition("-")[0]
        for old in file.parent.glob(f"{cell}-{'?' * 12}.safetensors"):
            old.unlink()
        _save(file, {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]})
        for part in parts:
            part.unlink()
    share.wait()
    with safe_open(file, "pt") as opened:
        return {name: opened.get_tensor(name) for name in sorted(opened.keys())}


def _part(file: Path, rank: int) -> Path:
    return file.with_name(f"{file.stem}.part{rank}.safetensors")


def _save(file: Path, tensors: Mapping[str, Tensor]) -> None:
    with atomic_file(file) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)


def _batches(file: Path) -> list[Rows]:
    found: dict[str, Rows] = {}
    with safe_open(file, "pt") as opened:
        for key in sorted(opened.keys()):
            batch, _, name = key.partition("/")
            found.setdefault(batch, {})[name] = opened.get_tensor(key)
    return list(found.values())


def best_plain(rows: Sequence[dict[str, Any]], calls: int) -> dict[str, Any] | None:
    """The base's best row at `calls` UNet calls: most pictures right, then Frechet, then distance."""
    found = [row for row in rows if row["name"] == "base" and row["unet_calls"] == calls]

    def rank(row: dict[str, Any]) -> tuple[float, float, float]:
        return -(row["attribute_accuracy"] or 0), row["frechet"] or 0, row["distance_to_teacher"]

    return min(found, key=rank, default=None)


def show(rows: Sequence[dict[str, Any]]) -> None:
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
