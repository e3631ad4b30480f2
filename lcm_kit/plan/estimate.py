"""Bytes by part and by phase. The peak is that of the highest phase: the phases' passing bytes never meet.

Passing bytes are the rehearsal's; what stays is counted here, in closed form. The model of kernels' own
workspaces is the only part that is measured instead (docs/plan.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from lcm_kit.config.schema import Distill
from lcm_kit.plan.rehearsal import Rehearsal, Stage, Weights, flops_of_step
from lcm_kit.plan.tracker import Held

FLOAT = 4  # bytes of a float32
GIB = 2**30
CONTEXT = 1.0  # GiB that CUDA's context, its libraries and the desktop take, or Python and its libraries
MARGIN = 0.1  # of what is left of a card: for gaps between blocks, and for the estimate's own error
CARDS = (8, 12, 16, 24, 48, 80)  # GiB
# nf4: half a byte, the scale of 64 weights in one byte, that of 256 scales in four (double quantisation)
_NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
_ADAM8_SMALL = 4096  # tensors below keep float32 moments
_CUDA_ALLOWANCE = 128 * 2**20  # workspaces of cuBLAS and cuDNN: an allowance, not measured
_CPU_ALLOWANCE = 24 * 2**20  # objects of Python and primitives of oneDNN, measured (docs/plan.md)

Parts = Mapping[str, int]  # bytes by what they are for


def room(card: float) -> float:
    """GiB of a card of `card` GiB that a plan may fill."""
    return (card - CONTEXT) * (1 - MARGIN)


@dataclass(frozen=True)
class Estimate:
    """What a config needs on one device."""

    config: Distill
    device: str  # cuda or cpu
    dtype: torch.dtype
    weights: Weights
    staying: Parts  # all through the run
    phases: Mapping[str, Parts]  # passing bytes of each phase, by part
    encode: Parts  # of `lcm-kit encode`, another process
    flops: Mapping[str, float]  # of an optimizer step, by part

    @property
    def phase(self) -> str:
        """The highest phase."""
        return max(self.phases, key=self.passing)

    def passing(self, phase: str) -> int:
        """Bytes of a phase."""
        return sum(self.phases[phase].values())

    @property
    def parts(self) -> Parts:
        """Bytes by part at the highest moment."""
        return {part: size for part, size in {**self.staying, **self.phases[self.phase]}.items() if size}

    @property
    def peak(self) -> int:
        """Bytes at the highest moment of `lcm-kit train`."""
        return sum(self.staying.values()) + self.passing(self.phase)

    @property
    def encode_peak(self) -> int:
        """Bytes at the highest moment of `lcm-kit encode`."""
        return sum(self.encode.values())

    def fits(self, card: float) -> bool:
        """Whether training fits into a card of `card` GiB, of which `CONTEXT` is taken."""
        return self.peak <= room(card) * GIB

    def encode_fits(self, card: float) -> bool:
        """Whether encoding does."""
        return self.encode_peak <= room(card) * GIB


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
        dtype, stage = dtype_of(config, self.device), self.stage_of(config)
        rehearsal = stage.rehearse(
            config.data.resolution, dtype, cuda=self.device == "cuda",
            checkpointing=config.gradient_checkpointing,
        )  # fmt: skip
        staying = _staying(config, stage.weights, dtype)
        if self.device == "cpu" and config.memory.quantize != "none" and stage.subject.stored == dtype:
            # views of the file, which stays mapped as long as one of its layers is in use
            staying["base weights"] += stage.weights.quantizable * dtype.itemsize
        phases = _phases(config, rehearsal, stage.weights, dtype, self.device)
        if config.validation.prompts is not None or config.validation.control is not None:
            phases["validation"] = _validation(config, rehearsal, stage, dtype, self.device)
        if self.device == "cpu":
            phases |= _host(config, stage, dtype, staying)
        return Estimate(
            config, self.device, dtype, stage.weights, staying, phases, _encode(config, stage, self.device),
            flops_of_step(config, rehearsal),
        )  # fmt: skip

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
    }


def _phases(
    config: Distill, rehearsal: Rehearsal, weights: Weights, dtype: torch.dtype, device: str
) -> dict[str, Parts]:
    """What passes: activations, gradients, workspaces."""
    batch, alone = config.batch_size, config.accumulation == 1
    lora = FLOAT * sum(weights.lora)
    workspaces = _workspace(config, weights, dtype, device)
    teacher, student = (of.highest(batch, gradients=alone) for of in (rehearsal.teacher, rehearsal.student))

    def parts(held: Held) -> dict[str, int]:
        # with accumulation the gradients of the micro-batches before are there from the start
        return {
            "gradients": round(held.gradients) if alone else lora,
            "activations": round(held.at(batch, gradients=False)), "workspaces": workspaces,
        }  # fmt: skip

    return {
        "teacher pass": parts(teacher),
        "student pass": parts(student),
        # fused AdamW makes no copies
        "optimizer step": {
            "gradients": lora, "workspaces": 2 * FLOAT * max(weights.lora) if device == "cpu" else 0,
        },
    }  # fmt: skip


def _host(config: Distill, stage: Stage, dtype: torch.dtype, staying: Parts) -> dict[str, Parts]:
    """What costs the machine's memory and none of a GPU's: loading the base, copies of what is saved."""
    weights, stored = stage.weights, stage.subject.stored
    # all layers before the first is in few bits, and the file, if its numbers are others
    full = weights.base * (dtype.itemsize + (stored.itemsize if stored and stored != dtype else 0))
    return {
        "loading": {"weights in full": max(0, full - sum(staying.values()))},
        # the LoRA, and once more in the file's form as safetensors builds it and gives it back; the EMA
        "saving": {"copies of the LoRA": FLOAT * sum(weights.lora) * (4 if config.ema else 3)},
    }


def _validation(
    config: Distill, rehearsal: Rehearsal, stage: Stage, dtype: torch.dtype, device: str
) -> Parts:
    """All pictures at once: the teacher draws with guidance, then the VAE decodes."""
    count, subject = config.validation.count, stage.subject
    # float16 overflows in SDXL's VAE (`sample.pipeline`)
    upcast = dtype == torch.float16 and subject.pooled
    vae_dtype = torch.float32 if upcast else dtype
    pictures = stage.pictures(config.data.resolution, vae_dtype)
    drawing, decoding = (of.highest(count).at(count) for of in (rehearsal.teacher, pictures.decode))
    return {
        "text encoders": subject.text * dtype.itemsize,
        "VAE": pictures.weights * vae_dtype.itemsize,
        "activations": round(max(drawing, decoding)),
        "workspaces": _workspace(config, stage.weights, dtype, device),
    }


def _encode(config: Distill, stage: Stage, device: str) -> Parts:
    """`lcm-kit encode`: text encoders and VAE in float32."""
    pictures, batch = stage.pictures(config.data.resolution, torch.float32), config.data.batch_size
    return {
        "text encoders": stage.subject.text * FLOAT,
        "VAE": pictures.weights * FLOAT,
        "activations": round(pictures.encode.highest(batch).at(batch)),
        "workspaces": _CUDA_ALLOWANCE if device == "cuda" else _CPU_ALLOWANCE,
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
