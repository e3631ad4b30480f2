"""What a training leaves in its run's folder for others to read: config, metrics, what its states are of."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lcm_kit.config.continued import fixed, flat
from lcm_kit.config.load import load
from lcm_kit.config.renamed import current
from lcm_kit.io import own_files, own_shapes

METRICS = "metrics.jsonl"
MANIFEST = "manifest.json"  # of a state
_STATE = "remove that state, and training goes on from the one before"


def config_of(run: Path) -> dict[str, Any]:
    """What `config.yaml` says that the run was trained with; nothing where there is none.

    Anybody may edit that file, as where base and data lie now. Raises `UserError` if it is no config of this
    kit, or if it says other than the newest state of what a run keeps.
    """
    file = run / "config.yaml"
    if not file.is_file():
        return {}
    config, state = asdict(load(file)), _state(run)
    told, kept = flat(config), fixed(state.get("config", {})) if state else {}
    for key in sorted(told.keys() & kept.keys()):
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


def folders(run: Path) -> list[Path]:
    """The states of `run`, oldest first; none of them was written in part, but any may be damaged since."""
    return sorted((run / "state").glob("step-*"), key=step_of)


def step_of(folder: Path) -> int:
    """After how many steps the state in `folder` was written, as its name says."""
    return int(folder.name.removeprefix("step-"))


def manifest(folder: Path) -> own_shapes.State | None:
    """What a state's manifest says; None for a state of a kit that wrote none. Raises `own_files.Damaged`."""
    file = folder / MANIFEST
    if not file.is_file():
        return None
    found = own_files.read_json(file, own_shapes.State, _STATE)
    return {**found, "config": current(found["config"])} if "config" in found else found


def manifests(states: Sequence[Path]) -> list[own_shapes.State]:
    """What can be read of the manifests of `states`; a damaged state is told of where it is passed over."""
    found = []
    for folder in states:
        with contextlib.suppress(own_files.Damaged):
            found.append(manifest(folder))
    return [each for each in found if each]


def _state(run: Path, step: int | None = None) -> own_shapes.State | None:
    """What is said of the run's state after `step`, or of its newest."""
    found = manifests(folders(run))
    return next((each for each in reversed(found) if step in (None, each["step"])), None)
