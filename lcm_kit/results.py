"""What evaluations share: samples kept by what made them, and the table of rows that a person reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lcm_kit.files import atomic_file
from lcm_kit.share import Share

Drawn = tuple[list[Tensor], float]  # batches of 8-bit pictures [B, 3, H, W], and seconds an image


def kept(file: Path, make: Callable[[], Drawn], share: Share) -> tuple[Tensor, float]:
    """What `make` gives, all pictures [N, 3, H, W], from `file` if it has been made before.

    Of several processes each makes its `share` of the batches; the first joins them, in order.
    """
    missing = not file.is_file()
    if missing:
        _write(_part(file, share.rank), *make())
    share.wait()
    if missing and share.first:
        parts = [_read(_part(file, rank)) for rank in range(share.world)]
        batches = [batch for turn in zip_longest(*(part[0] for part in parts)) for batch in turn]
        counts = [sum(map(len, part[0])) for part in parts]
        seconds = sum(part[1] * n for part, n in zip(parts, counts, strict=True)) / sum(counts)
        for old in file.parent.glob(f"{file.stem.rpartition('-')[0]}-{'?' * 12}.safetensors"):
            old.unlink()  # the same row from other inputs
        _write(file, [torch.cat([batch for batch in batches if batch is not None])], seconds)
        for rank in range(share.world):
            _part(file, rank).unlink()
    share.wait()
    (images,), seconds = _read(file)
    return images, seconds


def _part(file: Path, rank: int) -> Path:
    return file.with_name(f"{file.stem}.part{rank}.safetensors")


def _write(file: Path, batches: Sequence[Tensor], seconds: float) -> None:
    tensors = {"images" if len(batches) == 1 else f"{k:06d}": batch for k, batch in enumerate(batches)}
    with atomic_file(file) as temporary:
        save_file(tensors, temporary, metadata={"seconds_per_image": repr(seconds)})


def _read(file: Path) -> Drawn:
    with safe_open(file, "pt") as opened:
        return [opened.get_tensor(key) for key in sorted(opened.keys())], float(
            opened.metadata()["seconds_per_image"]
        )


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
    table = Table("", "steps", "CFG", "calls", *shown.values(), box=SIMPLE, pad_edge=False)
    for row in rows:
        figures = ("-" if row[key] is None else f"{row[key]:.3f}" for key in shown)
        cost = (str(row["steps"]), f"{row['guidance_scale']:g}", str(row["unet_calls"]))
        table.add_row(f"{row['name']} {row['solver']}", *cost, *figures)
    Console().print(table)
