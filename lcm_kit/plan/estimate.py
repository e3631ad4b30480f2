"""Bytes by part and by phase. The peak is that of the highest phase: the phases' passing bytes never meet.

Passing bytes are the rehearsal's; what stays is counted here, in closed form. The model of kernels' own
workspaces is the only part that is measured instead (docs/plan.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from lcm_kit.config.schema import Distill
from lcm_kit.plan.rehearsal import Pass, Rehearsal, Stage, Weights, flops_of_step

FLOAT = 4  # bytes of a float32
GIB = 2**30
CONTEXT = 1.0  # GiB of a card that CUDA's context, its libraries and the desktop take
CARDS = (8, 12, 16, 24, 48, 80)  # GiB
# nf4: half a byte, the scale of 64 weights in one byte, that of 256 scales in four (double quantisation)
_NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
_ADAM8_SMALL = 4096  # tensors below keep float32 moments
_CUDA_ALLOWANCE = 128 * 2**20  # workspaces of cuBLAS and cuDNN: an allowance, not measured
_CPU_ALLOWANCE = 24 * 2**20  # objects of Python and primitives of oneDNN, measured (docs/plan.md)


@dataclass(frozen=True)
class Estimate:
    """What a config needs on one device."""

    config: Distill
    device: str  # cuda or cpu
    dtype: torch.dtype
    weights: Weights
    staying: Mapping[str, int]  # bytes by part, all through the run
    phases: Mapping[str, int]  # passing bytes by phase
    flops: Mapping[str, float]  # of an optimizer step, by part

    @property
    def phase(self) -> str:
        """The highest phase."""
        return max(self.phases, key=self.phases.__getitem__)

    @property
    def peak(self) -> int:
        """Bytes at the highest moment."""
        return sum(self.staying.values()) + self.phases[self.phase]

    def fits(self, card: float) -> bool:
        """Whether it fits into a card of `card` GiB, of which `CONTEXT` is taken."""
        return self.peak <= (card - CONTEXT) * GIB


def dtype_of(config: Distill, device: str) -> torch.dtype:
    """Of the frozen weights: `precision`, where auto is float32 on a CPU and float16 else."""
    auto = "float32" if device == "cpu" else "float16"
    return getattr(torch, auto if config.precision == "auto" else config.precision)


@dataclass
class Planner:
    """Estimates configs of one base; those that differ in numbers alone cost no new rehearsal."""

    stage: Stage
    device: str = "cuda"

    def __call__(self, config: Distill) -> Estimate:
        """The estimate of `config`, whose base is the stage's."""
        dtype, weights = dtype_of(config, self.device), self.weights(config)
        rehearsal = self.stage_of(config).rehearse(
            config.data.resolution, dtype, cuda=self.device == "cuda",
            checkpointing=config.gradient_checkpointing,
        )  # fmt: skip
        staying = _staying(config, weights, dtype)
        phases = _phases(config, rehearsal, weights, dtype, self.device)
        return Estimate(
            config, self.device, dtype, weights, staying, phases, flops_of_step(config, rehearsal)
        )

    def stage_of(self, config: Distill) -> Stage:
        """The stage; another one where the adapter is another."""
        if config.adapter != self.stage.adapter:
            self.stage = Stage(self.stage.subject, config.adapter)
        return self.stage

    def weights(self, config: Distill) -> Weights:
        """The numbers of weights."""
        return self.stage_of(config).weights


def base_bytes(config: Distill, weights: Weights, dtype: torch.dtype) -> int:
    """Of the frozen base: quantised linear layers, the rest in `dtype`."""
    kind = config.memory.quantize
    few = {"none": 0.0, "nf4": _NF4 * weights.quantizable, "int8": weights.quantizable + FLOAT * weights.rows}
    plain = weights.base - (weights.quantizable if kind != "none" else 0)
    return round(plain * dtype.itemsize + few[kind])


def moment_bytes(config: Distill, weights: Weights) -> int:
    """Of AdamW's two moments: float32, or 8 bits with a float32 scale for 256 of them."""
    if config.optimizer.name == "adamw":
        return 2 * FLOAT * sum(weights.lora)
    small = sum(n for n in weights.lora if n < _ADAM8_SMALL)
    large = sum(n for n in weights.lora if n >= _ADAM8_SMALL)
    return 2 * FLOAT * small + round(2 * large * (1 + FLOAT / 256))


def _staying(config: Distill, weights: Weights, dtype: torch.dtype) -> dict[str, int]:
    lora = FLOAT * sum(weights.lora)
    return {
        "base weights": base_bytes(config, weights, dtype),
        "LoRA weights": lora,
        "optimizer moments": moment_bytes(config, weights),
        "EMA of the LoRA": lora if config.ema else 0,
        # of the micro-batches before, through the passes of the next
        "accumulated gradients": lora if config.accumulation > 1 else 0,
    }


def _phases(
    config: Distill, rehearsal: Rehearsal, weights: Weights, dtype: torch.dtype, device: str
) -> dict[str, int]:
    """Passing bytes: activations, gradients that are not accumulated, workspaces."""
    alone = config.accumulation == 1
    workspace = _workspace(config, weights, dtype, device)

    def peak(of: Pass) -> int:
        return round(max(m.at(config.batch_size, gradients=alone) for m in of.moments)) + workspace

    gradients = FLOAT * sum(weights.lora) if alone else 0
    copies = 2 * FLOAT * max(weights.lora) if device == "cpu" else 0  # fused AdamW makes none
    return {
        "teacher pass": peak(rehearsal.teacher),
        "target pass": peak(rehearsal.target),
        "student pass": peak(rehearsal.student),
        "optimizer step": gradients + copies,
    }


def _workspace(config: Distill, weights: Weights, dtype: torch.dtype, device: str) -> int:
    """What kernels hold besides: a layer's weights, expanded from few bits or reordered by oneDNN."""
    expanded = weights.widest * dtype.itemsize if config.memory.quantize != "none" else 0
    if device == "cuda":
        return _CUDA_ALLOWANCE + expanded
    return _CPU_ALLOWANCE + max(expanded, weights.largest * dtype.itemsize)


# -- Disk ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Disk:
    """Bytes on disk."""

    record: int  # of the cache
    records: int | None  # None: cannot be counted here
    state: int  # a training state
    keep: int  # of them

    @property
    def cache(self) -> int | None:
        """The whole cache."""
        return None if self.records is None else self.record * self.records


def disk(config: Distill, planner: Planner) -> Disk:
    """What `encode` and `train` will write."""
    subject = planner.stage.subject
    side = config.data.resolution // subject.structure.factor
    numbers = 4 * side * side + subject.tokens * subject.structure.width
    numbers += subject.pooled + 6 if subject.pooled else 0
    weights = planner.weights(config)
    lora = FLOAT * sum(weights.lora)
    state = lora + moment_bytes(config, weights) + (lora if config.ema else 0)
    return Disk(FLOAT * numbers, _records(config), state, config.checkpoint.keep)


def _records(config: Distill) -> int | None:
    """Rows of the cache; None where the images are not here."""
    from lcm_kit.data.records import open_records
    from lcm_kit.errors import UserError

    data = config.data
    local = data.path.startswith(("asset:", "/", ".", "~")) or data.kind == "folder"
    try:
        found = open_records(data if local else replace(data, kind="folder"))[0]
    except UserError:
        return None
    return len(found) * (2 if data.flip else 1)
