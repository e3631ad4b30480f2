"""Around the training step: accelerator, the run's folder, state and resume, metrics, learning rate.

The only place besides the recipes that knows accelerate. A step's randomness is a function of (seed, step,
slot) and its learning rate one of (config, step), so a state is the weights and the optimizer's moments.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType, ProjectConfiguration, parse_flag_from_env
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor

from lcm_kit.adapter import FACTS, load_lora_state, lora_state
from lcm_kit.config import schema
from lcm_kit.config.load import dump
from lcm_kit.errors import UserError
from lcm_kit.files import atomic_folder, atomic_write

PRECISIONS = {"float32": "no", "float16": "fp16", "bfloat16": "bf16"}  # ours -> accelerate's
FREE = (
    "output",
    "steps",
    "validation",
    "checkpoint",
    "logging",
)  # keys that may change when a run is continued


# -- Accelerator ---------------------------------------------------------------------------------------------


def start(config: schema.Distill) -> Accelerator:
    """The accelerator of this process, with precision, accumulation and trackers as `config` says.

    Raises `UserError` for a tracker that accelerate does not know or that is not installed, and for float16
    on a CPU.
    """
    AcceleratorState._reset_state()  # an earlier run in this process may have had another precision
    device = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU")).device
    project = ProjectConfiguration(config.output, logging_dir=str(Path(config.output) / "trackers"))
    accelerator = Accelerator(
        mixed_precision=PRECISIONS[_precision(config.precision, device.type)],
        gradient_accumulation_steps=config.accumulation,
        log_with=_trackers(config.logging.trackers) or None,
        project_config=project,
    )
    if accelerator.is_main_process:
        _sweep(Path(config.output))
    return accelerator


def _precision(wanted: str, device: str) -> str:
    if wanted == "auto":
        return "float32" if device == "cpu" else "float16"
    if wanted == "float16" and device == "cpu":
        raise UserError("precision float16 does not train on a CPU; use auto, float32 or bfloat16")
    return wanted


def _trackers(names: tuple[str, ...]) -> list[str]:
    known = [str(name) for name in LoggerType.list() if str(name) != "all"]
    installed = {str(name) for name in get_available_trackers()}
    for name in names:
        if name not in known:
            raise UserError(
                f"logging.trackers: {name!r} is not a tracker of accelerate; choose from {', '.join(known)}"
            )
        if name not in installed:
            raise UserError(
                f"logging.trackers: {name!r} is not installed; `pip install {name}` or leave it out"
            )
    return list(names)


def dtype(accelerator: Accelerator) -> torch.dtype:
    """The dtype of the frozen base's weights; the LoRA's are float32 always."""
    return {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[accelerator.mixed_precision]


def _sweep(run: Path) -> None:
    """Remove what a killed process left half-written; nothing reads it."""
    for folder in (run, run / "state"):
        for leftover in folder.glob(".*.tmp"):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


# -- The run's folder ----------------------------------------------------------------------------------------


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


def claim(config: schema.Distill, accelerator: Accelerator) -> bool:
    """Make `config.output` this run's folder and write `config.yaml` there; False if the run is finished.

    Raises `UserError`, naming the key, if the folder holds a run that another config started: only how long
    it runs and what it logs, draws and saves may change. Raises it too if a finished run is to go on without
    its state.
    """
    run = Path(config.output)
    done, states = adapter_steps(run), _states(run)
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


def _same_run(file: Path, config: schema.Distill) -> None:
    old = flat(yaml.safe_load(file.read_text(encoding="utf-8"))) if file.is_file() else {}
    new = flat(config)
    for key in sorted(old.keys() | new.keys()):
        if key.split(".")[0] not in FREE and old.get(key) != new.get(key):
            raise UserError(
                f"{file.parent}: this run was started with {key} {old.get(key)!r} and the config says "
                f"{new.get(key)!r}; set it back to continue, or give another output"
            )


def adapter_steps(run: Path) -> int:
    """How many steps the run's finished adapter was trained for; 0 if there is none yet."""
    file = run / "adapter" / FACTS
    return int(json.loads(file.read_text(encoding="utf-8"))["steps"]) if file.is_file() else 0


# -- Training state ------------------------------------------------------------------------------------------


class State(NamedTuple):
    """What a checkpoint holds. Tensors are on the CPU, under the LoRA's raw peft keys."""

    step: int  # optimizer steps done
    lora: dict[str, Tensor]
    ema: dict[str, Tensor]  # empty without an EMA
    optimizer: dict[str, Any]
    scaler: dict[str, Any] | None  # of float16's gradients
    window: list[float]  # losses since the last logged line


def _states(run: Path) -> list[Path]:
    """The complete checkpoints of `run`, oldest first."""
    return sorted((run / "state").glob("step-*"), key=lambda folder: int(folder.name.removeprefix("step-")))


def newest_state(run: Path) -> State | None:
    """The last checkpoint of `run`, if there is one. Raises `UserError` if its files are damaged."""
    from safetensors.torch import load_file

    if not (folders := _states(run)):
        return None
    try:
        rest = torch.load(folders[-1] / "training.pt", map_location="cpu", weights_only=True)
        return State(
            lora=load_file(folders[-1] / "lora.safetensors"),
            ema=load_file(folders[-1] / "ema.safetensors"),
            **rest,
        )
    except Exception as error:  # torch, zip and safetensors raise kinds of their own
        raise UserError(
            f"{folders[-1]}: this state cannot be read ({error}); remove it to continue from an earlier one"
        ) from error


def capture(
    accelerator: Accelerator,
    step: int,
    unet: Any,
    ema: Sequence[Tensor],
    optimizer: Any,
    window: Sequence[float],
) -> State:
    """The training's state after `step` optimizer steps, copied to the CPU."""
    lora = lora_state(unet)
    averages = {name: t.cpu().clone() for name, t in zip(lora, ema, strict=True)} if ema else {}
    scaler = accelerator.scaler.state_dict() if accelerator.scaler else None
    return State(step, lora, averages, optimizer.state_dict(), scaler, list(window))


def restore(accelerator: Accelerator, state: State, unet: Any, ema: Sequence[Tensor], optimizer: Any) -> None:
    """Put `state` back into the LoRA, its EMA and the optimizer, in place."""
    load_lora_state(unet, state.lora)
    if ema:
        for average, key in zip(ema, lora_state(unet), strict=True):  # by key: a file has an order of its own
            average.copy_(state.ema[key])
    optimizer.load_state_dict(state.optimizer)
    if accelerator.scaler and state.scaler:
        accelerator.scaler.load_state_dict(state.scaler)


def save_state(run: Path, state: State, keep: int) -> None:
    """Write `state/step-NNNNNN/` whole or not at all, then remove all but the `keep` newest."""
    from safetensors.torch import save_file

    rest = state._asdict()
    with atomic_folder(run / "state" / f"step-{state.step:06d}") as folder:
        save_file(rest.pop("lora"), folder / "lora.safetensors")
        save_file(rest.pop("ema"), folder / "ema.safetensors")
        with (folder / "training.pt").open("wb") as handle:  # given a path, torch hides that the disk is full
            torch.save(rest, handle)
    for old in _states(run)[:-keep]:
        shutil.rmtree(old)


# -- Metrics -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Metrics:
    """`metrics.jsonl`, one object a line, and accelerate's trackers."""

    accelerator: Accelerator
    file: Path

    @classmethod
    def open(cls, config: schema.Distill, accelerator: Accelerator, step: int) -> Metrics:
        """Continue the run's metrics after `step`: later lines, and one cut short by a kill, are dropped."""
        file = Path(config.output) / "metrics.jsonl"
        if accelerator.is_main_process:
            old = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
            atomic_write(file, "".join(f"{line}\n" for line in old if _step(line) <= step))
        accelerator.init_trackers(
            "", config={k: str(v) for k, v in flat(config).items()} if step == 0 else None
        )
        return cls(accelerator, file)

    def log(self, step: int, **values: float) -> None:
        """Append `values` for `step`, on the main process.

        Those that are not finite (the gradient norm of a step that float16's scaler skips) are left out: JSON
        has no word for them.
        """
        values = {name: value for name, value in values.items() if math.isfinite(value)}
        if self.accelerator.is_main_process:
            with self.file.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps({"step": step, **values}) + "\n")
        self.accelerator.log(values, step=step)


def _step(line: str) -> float:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


@contextmanager
def progress(accelerator: Accelerator, step: int, steps: int) -> Iterator[Any]:
    """A progress bar on the main process; yields `advance(loss, images, seconds) -> images a second`.

    The speed is the mean over this process's steps, without the time that validation and saving take.
    """
    columns = (
        TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.4g}"),
        TextColumn("{task.fields[speed]:.3g} images/s"), TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, disable=not accelerator.is_main_process) as bar:
        task = bar.add_task("", total=steps, completed=step, loss=math.nan, speed=0.0)
        seen, spent = 0, 0.0

        def advance(loss: float, images: int, seconds: float) -> float:
            nonlocal seen, spent
            seen, spent = seen + images, spent + seconds
            bar.update(task, advance=1, loss=loss, speed=seen / spent)
            return seen / spent

        yield advance


# -- Learning rate -------------------------------------------------------------------------------------------


def learning_rate(config: schema.Optimizer, step: int, steps: int) -> float:
    """The rate of `step` (from 0) of `steps`: a linear warm-up, then as `schedule` says."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(steps - config.warmup_steps, 1)
    factor = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}
    return config.lr * factor[config.schedule]


def finite(loss: Tensor, step: int) -> float:
    """The loss as a number. Raises `UserError` if it is none: the last state is still good."""
    if not math.isfinite(value := float(loss)):
        raise UserError(
            f"the loss is {value} at step {step}, training diverged; lower optimizer.lr, or raise "
            "optimizer.warmup_steps, or with precision float16 try bfloat16"
        )
    return value
