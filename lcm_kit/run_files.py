"""What a training leaves in its run's folder for others to read: its config and its metrics."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from lcm_kit import checkpoints, own_files, own_shapes
from lcm_kit.config.continued import TOLD, flat
from lcm_kit.config.load import load

METRICS = "metrics.jsonl"


def config_of(run: Path) -> dict[str, Any]:
    """What `config.yaml` says that the run was trained with; nothing where there is none.

    Anybody may edit that file. Raises `UserError` if it is no config of this kit, or if it says other than
    the newest state of what a run keeps.
    """
    file = run / "config.yaml"
    if not file.is_file():
        return {}
    config, state = asdict(load(file)), _state(run)
    told, kept = flat(config), state.get("config", {}) if state else {}
    for key in sorted((told.keys() & kept.keys()).difference(TOLD)):
        if told[key] != kept[key]:
            why = f"{key} is {told[key]!r}, and the run was trained with {kept[key]!r}"
            raise own_files.damaged(file, why, "set it back")
    return config


def lines_of(run: Path) -> list[own_shapes.Line]:
    """The lines of the run's `metrics.jsonl`; none where there are none. Raises `own_files.Damaged`."""
    again = "remove that line, and the run goes on without its figures"
    return own_files.read_lines(run / METRICS, own_shapes.Line, again)


def metrics_of(run: Path, step: int | None = None) -> list[own_shapes.Line]:
    """As `lines_of`, and none is lost: as many as the state after `step`, or the newest, counted.

    None where somebody removed the file. Raises `own_files.Damaged`.
    """
    file, lines, state = run / METRICS, lines_of(run), _state(run, step)
    if state and file.is_file():
        wanted, there = state.get("lines", 0), sum(line["step"] <= state["step"] for line in lines)
        if there < wanted:
            why = f"of its {wanted} lines until step {state['step']} {there} are there"
            again = "put them back; or remove the file, and the run goes on without their figures"
            raise own_files.damaged(file, why, again)
    return lines


def _state(run: Path, step: int | None = None) -> own_shapes.State | None:
    """What is said of the run's state after `step`, or of its newest."""
    found = checkpoints.manifests(checkpoints.folders(run))
    return next((each for each in reversed(found) if step in (None, each["step"])), None)
