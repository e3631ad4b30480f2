"""A run's folder: which config started it, whether it is finished, what may change when it goes on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from lcm_kit.adapter.folder import FACTS, WEIGHTS, read_provenance
from lcm_kit.config import schema
from lcm_kit.config.continued import BASE, BATCH, CODE, DATA, LORAS, TOLD, flat, is_free
from lcm_kit.config.load import dump, load, read
from lcm_kit.data.findings import number
from lcm_kit.errors import UserError
from lcm_kit.io.files import atomic_write, require_writable
from lcm_kit.training import run_files
from lcm_kit.training.processes import require_shared, say


def claim(config: schema.Training, accelerator: Accelerator) -> bool:
    """Whether there is anything to do in `config.output`; False, and said, if the run is finished.

    Nothing is written there yet. Raises `UserError`, naming the key and both values, if the folder holds a
    run that another config started: only what leaves the result as it is may change, how long it runs, what
    it logs, draws and saves, and what helps a run that diverged, which is said. Raises it too if a finished
    run is to go on without its state, if nothing can be written, and if a process has another folder there.
    """
    run = Path(config.output)
    require_shared(run)
    done, states = adapter_steps(run), run_files.folders(run)
    if done or states:
        for change in _changes(run / "config.yaml", config, states):
            say(accelerator, f"{run}: {change} from here on")
    if done >= config.steps:
        say(accelerator, f"{run}: finished, {done} of {number(config.steps, 'step')}; nothing to do")
        return False
    if done and not states:
        raise UserError(
            f"{run}: its adapter has {done} steps but state/ is gone, so it cannot go on; give another output"
        )
    if accelerator.is_main_process:
        require_writable(run)
    return True


def begin(config: schema.Training, accelerator: Accelerator) -> None:
    """Write `config.yaml`, now that nothing is left that could refuse the run.

    Where a finished run goes on, its own stays until there is a state of the new one (`write_config`).
    """
    accelerator.wait_for_everyone()  # every process has read the old file
    run = Path(config.output)
    done, states = adapter_steps(run), run_files.folders(run)
    started = not done or any(run_files.step_of(state) > done for state in states)
    if started and accelerator.is_main_process:
        write_config(config)


def write_config(config: schema.Training) -> None:
    """Make `config.yaml` of the run say what it is trained with now."""
    file, text = Path(config.output) / "config.yaml", dump(config)
    if not file.is_file() or file.read_text(encoding="utf-8") != text:
        atomic_write(file, text)


def say_finished(accelerator: Accelerator, run: Path, done: int) -> None:
    """Say that a run has made all its steps, and what comes next."""
    say(accelerator, f"{run}: finished, {number(done, 'step')}; next: lcm-kit export {run}")


def _changes(file: Path, config: schema.Training, states: Sequence[Path]) -> list[str]:
    """In words what of `TOLD` is another value now. Raises `UserError` for another change."""
    hashed = any(known.get("base") for known in run_files.manifests(states))
    staged = bool(config.stages)
    old, new = (_kept(keys, hashed, staged) for keys in (_started_with(file, config, states), flat(config)))
    changed = []
    for key in sorted(new):
        before, now = old.get(key, (None, None)), new[key]
        if before[0] == now[0]:
            continue
        if key in TOLD:
            changed.append(f"{key} was {before[1]} and is {now[1]}")
        else:
            if key == "method.sha256":  # nobody wrote that key: it is the file's
                raise UserError(
                    f"{file.parent}: the Python file of the method changed since this run was started; put "
                    "it back to continue, or give another output"
                )
            raise UserError(
                f"{file.parent}: this run was started with {key} {before[1]} and the config says {now[1]}; "
                "set it back to continue, or give another output"
            )
    return changed


def _kept(keys: Mapping[str, Any], base_is_hashed: bool, staged: bool) -> dict[str, tuple[Any, str]]:
    """What a continued run must keep: by key what must be equal, and how it is written."""
    kept = {
        key: (_essence(key, value), repr(value))
        for key, value in keys.items()
        if not is_free(key, staged=staged) and key not in BATCH and not (base_is_hashed and key in BASE)
    }
    sizes = [keys.get(key, 1) for key in BATCH]
    return {**kept, " x ".join(BATCH): (math.prod(sizes), " x ".join(map(str, sizes)))}


def _essence(key: str, value: Any) -> Any:
    """What of a value must stay: of what is hashed whether it is there, of a run's folder which it is."""
    if key in DATA:
        return value is None
    if key in CODE:
        return str(value).rpartition(":")[2]
    if key in LORAS:
        return [entry.get("weight", 1.0) for entry in map(dict, schema.listed(value))]
    if key == "data.leave_out" and value is not None:
        return str(Path(value).resolve())
    return value


def _started_with(file: Path, config: schema.Training, states: Sequence[Path]) -> dict[str, Any]:
    """The keys that a run was started with, and the defaults of those that there were not at the time.

    A state has them with a hash; `config.yaml`, which anybody may edit, counts where there is none.
    """
    defaults = flat(type(config)(config.recipe, config.output))
    known = [each["config"] for each in run_files.manifests(states) if "config" in each]
    if known:
        return {**defaults, **known[-1]}
    if not file.is_file():
        return {}
    try:
        return flat(load(file))
    except UserError:  # a key of then that this kit does not know any more
        return {**defaults, **flat(read(file))}


def adapter_steps(run: Path) -> int:
    """How many steps the run's finished adapter was trained for; 0 if there is none yet."""
    folder = run / "adapter"
    there = all((folder / name).is_file() for name in (FACTS, WEIGHTS))
    return read_provenance(folder).steps if there else 0
