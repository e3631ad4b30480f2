"""A run's folder: which config started it, whether it is finished, what may change when it goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator

from lcm_kit import checkpoints
from lcm_kit.adapter import FACTS
from lcm_kit.config import schema
from lcm_kit.config.load import dump, load
from lcm_kit.errors import UserError
from lcm_kit.files import atomic_write

FREE = (  # keys, or blocks of keys, that may change when a run is continued
    "output", "steps", "validation", "checkpoint", "logging", "non_finite", "gradient_checkpointing",
    "memory.compile", "memory.channels_last", "memory.tf32",
)  # fmt: skip
FIXED = ("validation.held_out",)  # in such a block, but it says what is trained on


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """A config (or its dictionary) as {"optimizer.lr": 1e-4, ...}, values as YAML would hold them."""
    if hasattr(value, "__dataclass_fields__"):
        value = asdict(value)
    if not isinstance(value, Mapping):
        return {path: list(value) if isinstance(value, tuple) else value}
    return {
        k: v
        for name, part in value.items()
        for k, v in flat(part, f"{path}.{name}" if path else name).items()
    }


def claim(config: schema.Training, accelerator: Accelerator) -> bool:
    """Make `config.output` this run's folder and write `config.yaml` there; False if the run is finished.

    Raises `UserError`, naming the key, if the folder holds a run that another config started: only how long
    it runs and what it logs, draws and saves may change. Raises it too if a finished run is to go on without
    its state.
    """
    run = Path(config.output)
    done, states = adapter_steps(run), checkpoints.folders(run)
    if done or states:
        _same_run(run / "config.yaml", config)
    if done >= config.steps:
        accelerator.print(f"{run}: finished, {done} steps of {config.steps}; nothing to do")
        return False
    if done and not states:
        raise UserError(
            f"{run}: its adapter has {done} steps but state/ is gone, so it cannot go on; give another output"
        )
    accelerator.wait_for_everyone()  # every process has read the old file
    if accelerator.is_main_process:
        atomic_write(run / "config.yaml", dump(config))
    return True


def _same_run(file: Path, config: schema.Training) -> None:
    old, new = _started_with(file, config), flat(config)
    for key in sorted(new):
        free = key not in FIXED and any(key == name or key.startswith(f"{name}.") for name in FREE)
        if not free and old.get(key) != new[key]:
            raise UserError(
                f"{file.parent}: this run was started with {key} {old.get(key)!r} and the config says "
                f"{new[key]!r}; set it back to continue, or give another output"
            )


def _started_with(file: Path, config: schema.Training) -> dict[str, Any]:
    """The keys that a run was started with, and the defaults of those that there were not at the time."""
    if not file.is_file():
        return {}
    try:
        return flat(load(file))
    except UserError:  # a key of then that this kit does not know any more
        raw = yaml.safe_load(file.read_text(encoding="utf-8"))
        return {**flat(type(config)(config.recipe, "")), **flat(raw)}


def adapter_steps(run: Path) -> int:
    """How many steps the run's finished adapter was trained for; 0 if there is none yet."""
    file = run / "adapter" / FACTS
    return int(json.loads(file.read_text(encoding="utf-8"))["steps"]) if file.is_file() else 0
