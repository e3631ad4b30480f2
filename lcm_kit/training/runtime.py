"""Around the training step: accelerator, processes, resume and save, metrics, learning rate.

A step's randomness is a function of (seed, step, slot) and its learning rate one of (config, step), so a
state is the weights and the optimizer's moments. Beside this stand `run_folder.py` (whose folder it is),
`checkpoints.py` (a state's files), `stepping.py` (a step's gradients), `stopping.py` (signals) and
`release.py` (a run that is over holds nothing).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, LoggerType, ProjectConfiguration
from torch import Tensor

from lcm_kit.adapter.adapted_unet import AdaptedUNet
from lcm_kit.adapter.folder import save_adapter
from lcm_kit.bases.out_of_memory import out_of_memory
from lcm_kit.config import schema
from lcm_kit.config.continued import bound, common
from lcm_kit.config.finetune import Finetune
from lcm_kit.errors import UserError
from lcm_kit.lora.provenance import Provenance
from lcm_kit.training import checkpoints, processes, run_files
from lcm_kit.training.checkpoints import Origin, State
from lcm_kit.training.processes import say
from lcm_kit.training.run_files import lines_of
from lcm_kit.training.run_folder import write_config

T = TypeVar("T")

PRECISIONS = {"float32": "no", "float16": "fp16", "bfloat16": "bf16"}  # ours -> accelerate's


# -- Accelerator ---------------------------------------------------------------------------------------------


def start(config: schema.Training) -> Accelerator:
    """The accelerator of this process, with precision and trackers as `config` says.

    It knows nothing of accumulation, which can change on the way (`stepping.Passes`). Raises `UserError` for
    a tracker that accelerate does not know or that is not installed, for float16 on a CPU, and for a way to
    share a model over devices that does not work here.
    """
    AcceleratorState._reset_state()  # an earlier run in this process may have had another precision
    device = processes.state().device
    project = ProjectConfiguration(config.output, logging_dir=str(Path(config.output) / "trackers"))
    accelerator = Accelerator(
        mixed_precision=PRECISIONS[_precision(config.precision, device.type)],
        log_with=_trackers(config.logging.trackers) or None,
        project_config=project,
    )
    _check_sharing(config, accelerator)
    return accelerator


def _check_sharing(config: schema.Training, accelerator: Accelerator) -> None:
    kind = accelerator.distributed_type
    if kind == DistributedType.DEEPSPEED:
        raise UserError(
            "accelerate is set to DeepSpeed, which does not train an adapter here; choose FSDP with "
            "fsdp_version 2, which shards the frozen base as ZeRO-3 does, or plain multi-GPU"
        )
    if kind == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise UserError("accelerate is set to FSDP 1, which flattens the adapter away; set fsdp_version to 2")
    if sharded(accelerator) and isinstance(config, Finetune) and config.text_encoder.rank:
        raise UserError(
            f"text_encoder.rank {config.text_encoder.rank} does not work where FSDP shards the weights; set "
            "it to null, or use plain multi-GPU"
        )
    if sharded(accelerator) and config.matching:
        raise UserError(
            f"method {config.matching.name} trains two LoRAs in turn, which does not work where FSDP shards "
            "the weights; use plain multi-GPU"
        )
    if sharded(accelerator) and config.second_set:
        what, instead = (
            (f"ema {config.ema}", "set it to 0")
            if config.ema
            else ("a method in stages", "use plain multi-GPU")
        )
        raise UserError(f"{what} does not work where FSDP shards the weights; {instead}")


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


# -- Processes -----------------------------------------------------------------------------------------------


def sharded(accelerator: Accelerator) -> bool:
    """Whether each process holds a part of every weight (FSDP), so that all must call the model together."""
    return accelerator.distributed_type == DistributedType.FSDP


def prepare(accelerator: Accelerator, adapted: AdaptedUNet, *optimizers: Any) -> tuple[Any, ...]:
    """The UNet and the optimizers for this accelerator: our fast path, or sharding where it is asked for.

    After all that is trained was added. There is no DistributedDataParallel: `stepping.Passes` averages the
    gradients. Where the UNet has no fast path (its weights are sharded, or are trained themselves) it is
    called under autocast.
    """
    if sharded(accelerator):
        return accelerator.prepare(adapted.unet, *optimizers)
    prepared = map(accelerator.prepare_optimizer, optimizers)
    if adapted.make_fast():
        return adapted.unet, *prepared
    return accelerator.prepare_model(adapted.unet, evaluation_mode=True), *prepared


def any_of(accelerator: Accelerator, flag: bool) -> bool:
    """Whether `flag` is true on any process."""
    if accelerator.num_processes == 1:
        return flag
    return processes.largest(int(flag)) > 0


def gathered(accelerator: Accelerator, items: list[T]) -> list[T]:
    """The items of all processes, in their order."""
    if accelerator.num_processes == 1:
        return items
    parts: list[Any] = [None] * accelerator.num_processes
    torch.distributed.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def main_does(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """What `work` returns on the main process, on every process; a `UserError` of its is raised by all."""
    if accelerator.num_processes == 1:
        return work()
    said: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            said[0] = work()
        except UserError as error:
            said[1] = error
    torch.distributed.broadcast_object_list(said)
    if said[1] is not None:
        raise said[1]
    return said[0]


# -- Training state ------------------------------------------------------------------------------------------


def resume(
    accelerator: Accelerator,
    config: schema.Training,
    *,
    unet: str,
    data: str,
    teacher: Sequence[str] = (),
    base: str = "",
) -> tuple[Origin, State | None]:
    """What this run must keep, and its newest good state if there is one: the same on every process.

    `unet`, `data`, `teacher`, `base`: hashes of the base's UNet, the cached data, the teacher's adapters, the
    whole base. A damaged state is passed over with a warning. Raises `UserError` if none is good, if it was
    made with another base, teacher or other data, if its batches cannot be shared equally by the processes
    that there are now, or if one of these has another config, base or data than the others.
    """
    found = {"base's UNet": unet, "cache": data, "teacher": tuple(teacher), "base": base}
    processes.require_same({**common(config), **found})
    run, world = Path(config.output), accelerator.num_processes
    batch = config.batch_size * config.accumulation * world
    folder = main_does(accelerator, lambda: checkpoints.newest(run, partial(say, accelerator)))
    if folder is None:
        return Origin(unet, data, tuple(teacher), batch, world, base), None
    batch = (run_files.manifest(folder) or {"batch": batch})["batch"]
    if batch % world:
        raise UserError(
            f"{run}: a step of this run sees {batch} images, which {world} processes cannot share equally; "
            f"start as many as divide {batch}"
        )
    origin = Origin(unet, data, tuple(teacher), batch, world, base)
    checkpoints.check_origin(folder, origin)
    return origin, checkpoints.read(folder)


@dataclass(frozen=True)
class Saver:
    """Writes the states of a run. All processes call it, since each may hold a part."""

    accelerator: Accelerator
    config: schema.Training
    origin: Origin
    adapted: AdaptedUNet
    ema: Mapping[str, Sequence[Tensor]]  # by name of what is trained; none of what has no average
    optimizers: Mapping[str, Any]  # by name of what is trained, all of it

    @property
    def run(self) -> Path:
        """The run's folder."""
        return Path(self.config.output)

    def save(self, step: int, window: Sequence[float]) -> None:
        """Write the state after `step` steps, and its config; returns when both lie there."""

        def write() -> None:
            lines = len(lines_of(self.run))
            checkpoints.write(
                self.run, state, self.origin, self.config.checkpoint.keep, bound(self.config), lines
            )
            write_config(self.config)  # which a finished run's stays until there is something of the new one

        if self.accelerator.is_main_process or sharded(self.accelerator):
            scaler = self.accelerator.scaler
            state = checkpoints.capture(step, self.adapted, self.ema, self.optimizers, window, scaler)
        main_does(self.accelerator, write)

    def restore(self, state: State) -> None:
        """Put `state` back, in place; older ones go that a run which ended could not remove any more."""
        run, keep, scaler = self.run, self.config.checkpoint.keep, self.accelerator.scaler
        checkpoints.restore(run, state, self.adapted, self.ema, self.optimizers, scaler)
        main_does(self.accelerator, lambda: checkpoints.prune(run, state.step, keep))

    def adapter(self, facts: Provenance, name: str = "adapter") -> None:
        """Write the weights as they are now into the folder `name` of the run, as `save_adapter`."""
        weights = self.adapted.state() if sharded(self.accelerator) else None  # by all processes
        main_does(self.accelerator, lambda: save_adapter(self.run / name, self.adapted, facts, weights))


def validate(
    accelerator: Accelerator, measure: Callable[[], float], name: str = "one_step_distance"
) -> dict[str, float]:
    """What `measure` returns under its name, measured by the main process, or by all if weights are sharded.

    The same on every process. Empty where memory does not suffice: that is said and stops no training.
    """
    found: dict[str, float] = {}
    if accelerator.is_main_process or sharded(accelerator):
        try:
            found[name] = measure()
        except RuntimeError as error:
            if not out_of_memory(error) or sharded(accelerator):
                raise
            warning = "out of memory while drawing for validation, left out; lower validation.count"
            say(accelerator, f"warning: {warning}")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the VAE and the text encoders are gone again
    return main_does(accelerator, lambda: found)


# -- Metrics -------------------------------------------------------------------------------------------------


def learning_rate(config: schema.Optimizer, step: int, steps: int) -> float:
    """The rate of `step` (from 0) of `steps`: a linear warm-up, then as `schedule` says."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(steps - config.warmup_steps, 1)
    factor = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}
    return config.lr * factor[config.schedule]
