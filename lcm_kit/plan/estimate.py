"""Bytes by part and by phase. The peak is that of the highest phase: the phases' passing bytes never meet.

Passing bytes are the dry run's; what stays is counted in closed form (`sizes.py`). The model of kernels'
own workspaces and that of the CPU's allocator are the only parts that are measured (docs/plan.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lcm_kit.adapter import roles
from lcm_kit.config.finetune import Finetune
from lcm_kit.config.schema import Adapter, Distill, Training
from lcm_kit.plan import encoding, evaluating, work
from lcm_kit.plan.dry_run import DryRun, MetaModel, Pass, Weights
from lcm_kit.plan.sizes import FLOAT, GIB, Parts, base_bytes, dtype_of, moment_bytes, workspace
from lcm_kit.plan.text import rank_of
from lcm_kit.plan.tracker import Held

CONTEXT = 1.0  # GiB that CUDA's context, its libraries and the desktop take, or Python and its libraries
MARGIN = 0.1  # of what is left of a card: for gaps between blocks, and for the estimate's own error
CARDS = (8, 12, 16, 24, 48, 80)  # GiB
# glibc's heap keeps blocks below 32 MiB that were freed: beyond what tensors hold, this share of the
# student's activations without checkpointing, even where it is on. Measured: 0.45 to 0.92 (docs/plan.md)
_GAPS = 0.62


def room(card: float) -> float:
    """GiB of a card of `card` GiB that a plan may fill."""
    return (card - CONTEXT) * (1 - MARGIN)


def largest_batch(sizes: Mapping[int, int], card: float) -> int:
    """The largest batch, of which `sizes` has the bytes, that fits into a card of `card` GiB; 0: none."""
    return max((n for n, size in sizes.items() if size <= room(card) * GIB), default=0)


@dataclass(frozen=True)
class Stage:
    """A process of its own, at its highest moment."""

    verb: str  # of the command line
    phase: str
    size: int  # bytes

    @property
    def name(self) -> str:
        """As `encode (pictures)`."""
        return f"{self.verb} ({self.phase})"

    def fits(self, card: float) -> bool:
        """Whether it fits into a card of `card` GiB, of which `CONTEXT` is taken."""
        return self.size <= room(card) * GIB


@dataclass(frozen=True)
class Estimate:
    """What a config needs on one device."""

    config: Training
    device: str  # cuda or cpu
    dtype: torch.dtype
    weights: Weights
    staying: Parts  # all through the run
    phases: Mapping[str, Parts]  # passing bytes of each phase, by part
    encode: Mapping[str, Parts]  # of `lcm-kit encode`, another process: each of its phases
    evaluate: Mapping[int, Parts]  # of `lcm-kit evaluate`, another process: by its batch size
    flops: Mapping[str, float]  # of an optimizer step, by part
    gaps: int = 0  # freed bytes that the CPU's allocator keeps while it trains

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
        phase = self.phases[self.phase]
        found = {part: self.staying.get(part, 0) + phase.get(part, 0) for part in {**self.staying, **phase}}
        return {part: size for part, size in found.items() if size}

    @property
    def peak(self) -> int:
        """Bytes at the highest moment of `lcm-kit train`."""
        return sum(self.staying.values()) + self.passing(self.phase)

    @property
    def resident(self) -> int:
        """The same with the gaps: what the system sees."""
        return self.peak + self.gaps

    @property
    def encode_phase(self) -> str:
        """The highest phase of `lcm-kit encode`."""
        return max(self.encode, key=lambda phase: sum(self.encode[phase].values()))

    @property
    def encode_peak(self) -> int:
        """Bytes at the highest moment of `lcm-kit encode`."""
        return sum(self.encode[self.encode_phase].values())

    @property
    def stages(self) -> tuple[Stage, ...]:
        """`encode` in each of its phases, `train`, and `evaluate`, which can draw one picture at a time."""
        return (
            *(Stage("encode", phase, sum(parts.values())) for phase, parts in self.encode.items()),
            Stage("train", self.phase, self.resident),
            Stage("evaluate", "batch_size=1", sum(self.evaluate[1].values())),
        )

    @property
    def largest(self) -> Stage:
        """The stage that needs most."""
        return max(self.stages, key=lambda stage: stage.size)

    def too_large(self, card: float) -> tuple[Stage, ...]:
        """The stages that do not fit into a card of `card` GiB."""
        return tuple(stage for stage in self.stages if not stage.fits(card))

    def fits(self, card: float) -> bool:
        """Whether every stage fits into a card of `card` GiB."""
        return not self.too_large(card)

    def train_fits(self, card: float) -> bool:
        """Whether training alone does."""
        return all(stage.verb != "train" for stage in self.too_large(card))

    def evaluate_at(self, card: float) -> int:
        """The largest `batch_size` with which an evaluation fits, up to its default; 0 for none."""
        return largest_batch({n: sum(parts.values()) for n, parts in self.evaluate.items()}, card)


@dataclass
class Planner:
    """Estimates configs of one base; those that differ in numbers alone cost no new dry run."""

    stage: MetaModel
    device: str = "cuda"
    returning: bool = False  # whether the CPU's allocator is told to give back what is freed

    def __call__(self, config: Training) -> Estimate:
        """The estimate of `config`, whose base is the stage's."""
        dtype, stage = dtype_of(config, self.device), self.stage_of(config)
        dry_run = self.rehearse(config)
        staying = _staying(config, stage, dtype)
        if self.device == "cpu" and config.memory.quantize != "none" and stage.subject.stored == dtype:
            # views of the file, which stays mapped as long as one of its layers is in use
            staying["base weights"] += stage.weights.quantizable * dtype.itemsize
        phases = _phases(config, dry_run, stage, dtype, self.device)
        if self.device == "cpu":
            phases |= _host(config, stage, dtype, staying)
        return Estimate(
            config, self.device, dtype, stage.weights, staying, phases,
            encoding.phases(config, stage, self.device), evaluating.by_batch(config, stage, self.device),
            work.flops_of_step(config, dry_run),
            0 if self.device == "cuda" or self.returning else self._gaps(config),
        )  # fmt: skip

    def rehearse(self, config: Training, *, checkpointing: bool | None = None) -> DryRun:
        """The passes of a step; `checkpointing` in place of the config's."""
        return self.stage_of(config).rehearse(
            config.data.resolution, dtype_of(config, self.device),
            checkpointing=config.gradient_checkpointing if checkpointing is None else checkpointing,
            pair=work.pairs(config),
        )  # fmt: skip

    def _gaps(self, config: Training) -> int:
        student, batch = self.rehearse(config, checkpointing=False).student, config.batch_size
        return round(_GAPS * student.highest(batch).at(batch))

    def stage_of(self, config: Training) -> MetaModel:
        """The stage; another one where what is trained is of another size."""
        wanted = (*_size(config.adapter), rank_of(config))
        if wanted != (*_size(self.stage.adapter), self.stage.text_rank):
            self.stage = MetaModel(self.stage.subject, config.adapter, self.stage.style, rank_of(config))
        return self.stage

    def weights(self, config: Training) -> Weights:
        """The numbers of weights."""
        return self.stage_of(config).weights


def _size(adapter: Adapter) -> tuple[int, str]:
    return adapter.rank, adapter.targets


def _staying(config: Training, stage: MetaModel, dtype: torch.dtype) -> dict[str, int]:
    weights = stage.weights
    lora = FLOAT * sum(weights.lora)
    return {
        "base weights": base_bytes(config, weights, dtype),
        **({"text encoders": FLOAT * stage.subject.text} if rank_of(config) else {}),
        "teacher's adapters": FLOAT * weights.style,
        "LoRA weights": lora,
        "optimizer moments": moment_bytes(config, weights),
        "EMA of the LoRA": lora if config.ema else 0,
        **({"LoRA of the stage before": lora} if config.stages else {}),
    }


def _phases(
    config: Training, dry_run: DryRun, stage: MetaModel, dtype: torch.dtype, device: str
) -> dict[str, Parts]:
    """What passes: activations, gradients, conditions, workspaces."""
    batch, alone, weights = config.batch_size, config.accumulation == 1, stage.weights
    lora, quantized = FLOAT * sum(weights.lora), config.memory.quantize != "none"
    workspaces = workspace(weights, dtype, device, expanded=quantized)

    def parts(held: Held, samples: int) -> dict[str, int]:
        # with accumulation the gradients of the micro-batches before are there besides
        return {
            "gradients": round(held.gradients) + (0 if alone else lora),
            "activations": round(held.at(samples, gradients=False)),
            "conditions": _conditions(config, stage, dtype, device, samples), "workspaces": workspaces,
        }  # fmt: skip

    found: dict[str, Parts] = {}
    rows = roles.Objective.of(config).rows["teacher"] * batch if isinstance(config, Distill) else batch
    if isinstance(config, Distill) and roles.passes(config)["teacher"]:
        found["teacher pass"] = parts(dry_run.teacher.highest(rows), rows)
    held = dry_run.student.highest(batch, gradients=True)
    found["student pass"] = parts(held, batch)
    found["optimizer step"] = {"gradients": lora}  # fused AdamW makes no copies
    if config.validation.held_out:
        guided = "teacher pass" in found
        plain, samples = (dry_run.teacher, rows) if guided else (_drawing(config, stage, dtype), batch)
        held_at = round(plain.highest(samples).at(samples))
        found["held-out loss"] = {"activations": held_at, "workspaces": workspaces}
    if config.validation.prompts is not None or config.validation.control is not None:
        found["validation"] = _validation(config, dry_run, stage, dtype, device)
    return found


def _conditions(config: Training, stage: MetaModel, dtype: torch.dtype, device: str, samples: int) -> int:
    """Embeddings of the captions: those of a pass, and on a CPU those of the whole step's batch."""
    subject, pair = stage.subject, 2 if work.pairs(config) else 1
    numbers = subject.tokens * subject.structure.width + subject.pooled
    size = samples * pair * numbers * dtype.itemsize
    if device == "cpu":
        size += FLOAT * config.batch_size * config.accumulation * pair * numbers
    return size


def _drawing(config: Training, stage: MetaModel, dtype: torch.dtype) -> Pass:
    return stage.drawing(config.data.resolution, dtype, lora=True)


def _host(config: Training, stage: MetaModel, dtype: torch.dtype, staying: Parts) -> dict[str, Parts]:
    """What costs the machine's memory and none of a GPU's: loading the base, copies of what is saved."""
    weights, stored = stage.weights, stage.subject.stored
    # all layers before the first is in few bits, and the file, if its numbers are others
    full = weights.base * (dtype.itemsize + (stored.itemsize if stored and stored != dtype else 0))
    return {
        "loading": {"weights in full": max(0, full - sum(staying.values()))},
        # the LoRA, and once more in the file's form as safetensors builds it and gives it back; the EMA
        "saving": {"copies of the LoRA": FLOAT * sum(weights.lora) * (4 if config.second_set else 3)},
    }


def _validation(
    config: Training, dry_run: DryRun, stage: MetaModel, dtype: torch.dtype, device: str
) -> Parts:
    """All pictures at once, with guidance: drawn by the teacher, a guided student or a style; decoded."""
    count, subject = config.validation.count, stage.subject
    with_lora = isinstance(config, Finetune) or work.student_guidance(config) > 1
    drawn = _drawing(config, stage, dtype) if with_lora else dry_run.teacher
    samples = count * work.guided(config.validation.guidance_scale)
    drawing = drawn.highest(samples).at(samples)
    vae, decoding = encoding.decoder(stage, config.data.resolution, count, dtype)
    # those that are trained are there already; a style's control prompts are encoded beside the pipeline
    each = 0 if rank_of(config) else dtype.itemsize
    each += FLOAT if isinstance(config, Finetune) and config.validation.control is not None else 0
    text = {"text encoders": subject.text * each} if each else {}
    return {
        **text,
        "VAE": round(vae),
        "activations": round(max(drawing, decoding)),
        "workspaces": workspace(
            stage.weights, dtype, device, expanded=config.memory.quantize != "none"
        ),
    }  # fmt: skip
