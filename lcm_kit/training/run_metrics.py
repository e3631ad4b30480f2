"""What a training says of itself on its way: metrics.jsonl, accelerate's trackers and the bar."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from lcm_kit.config import schema
from lcm_kit.config.continued import flat
from lcm_kit.console import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TimeElapsedColumn,
    TimeRemainingColumn,
    Words,
)
from lcm_kit.io import own_files
from lcm_kit.training.run_files import METRICS, lines_of, metrics_of
from lcm_kit.training.runtime import main_does


@dataclass(frozen=True)
class Metrics:
    """`metrics.jsonl`, one object a line, and accelerate's trackers."""

    accelerator: Accelerator
    file: Path

    @classmethod
    def open(cls, config: schema.Training, accelerator: Accelerator, step: int) -> Metrics:
        """Continue the run's metrics after `step`: later lines, and one cut short by a kill, are dropped."""
        file = Path(config.output) / METRICS
        if accelerator.is_main_process:
            old = metrics_of(Path(config.output), step) if step else []
            own_files.write_lines(file, [line for line in old if line["step"] <= step])
        keys = {name: str(value) for name, value in flat(config).items()}
        accelerator.init_trackers(_name(config), config=keys if step == 0 else None)
        return cls(accelerator, file)

    def of(self, name: str) -> dict[int, float]:
        """What was logged under `name`, by step: the same on every process."""

        def look() -> dict[int, float]:
            return {int(line["step"]): line[name] for line in lines_of(self.file.parent) if name in line}

        return main_does(self.accelerator, look)

    def log(self, step: int, **values: float) -> None:
        """Append `values` for `step`, on the main process.

        Those that are not finite (the gradient norm of a step that float16's scaler skips) are left out: JSON
        has no word for them.
        """
        values = {name: value for name, value in values.items() if math.isfinite(value)}
        if not values:
            return
        if self.accelerator.is_main_process:
            own_files.append_line(self.file, {"step": step, **values})
        self.accelerator.log(values, step=step)


def _name(config: schema.Training) -> str:
    """The run's name for trackers; TensorBoard alone needs none and would make a folder of it."""
    alone = set(config.logging.trackers) <= {"tensorboard"}
    return "" if alone else Path(config.output).resolve().name


@contextmanager
def progress(accelerator: Accelerator, step: int, steps: int) -> Iterator[Any]:
    """A progress bar on the main process; yields `advance(loss, images, seconds) -> images a second`.

    The loss is the last that is known, on a GPU that of the step before. The speed is the mean over this
    process's steps, without the time that validation and saving take; since the host waits for each step
    before the next but one, and for the last before a line is logged, it is the device's speed there.
    """
    columns = (
        Words("training"), BarColumn(), MofNCompleteColumn(), Words("loss {task.fields[loss]:.4g}"),
        Words("{task.fields[speed]:.3g} images/s"), TimeElapsedColumn(), Words("left"),
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
