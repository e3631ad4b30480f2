"""What a training leaves in its run's folder for others to read: its config and its metrics."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from lcm_kit import own_files, own_shapes
from lcm_kit.config.load import load

METRICS = "metrics.jsonl"


def config_of(run: Path) -> dict[str, Any]:
    """What `config.yaml` says that the run was trained with; nothing where there is none.

    Raises `UserError` if it is no config of this kit.
    """
    file = run / "config.yaml"
    return asdict(load(file)) if file.is_file() else {}


def metrics_of(run: Path) -> list[own_shapes.Line]:
    """The lines of the run's `metrics.jsonl`; none where there are none. Raises `own_files.Damaged`."""
    again = "remove that line, and the run goes on without its figures"
    return own_files.read_lines(run / METRICS, own_shapes.Line, again)
