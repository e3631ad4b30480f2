"""What evaluations share: samples kept by what made them, and the table of rows that a person reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lcm_kit.files import atomic_file


def kept(file: Path, make: Callable[[], tuple[Tensor, float]]) -> tuple[Tensor, float]:
    """What `make` gives (8-bit pictures, seconds an image), from `file` if it has been made before."""
    if not file.is_file():
        images, seconds = make()
        for old in file.parent.glob(f"{file.stem.rpartition('-')[0]}-{'?' * 12}.safetensors"):
            old.unlink()  # the same row from other inputs
        with atomic_file(file) as temporary:
            save_file({"images": images}, temporary, metadata={"seconds_per_image": repr(seconds)})
    with safe_open(file, "pt") as opened:
        return opened.get_tensor("images"), float(opened.metadata()["seconds_per_image"])


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
