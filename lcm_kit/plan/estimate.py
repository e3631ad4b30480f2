"""Bytes by part and by phase. The peak is that of the highest phase: the phases' passing bytes never meet.

Passing bytes are the dry run's (`phases.py`); what stays is counted in closed form (`sizes.py`). The model of
kernels' own workspaces and that of the CPU's allocator are the only parts that are measured (docs/plan.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lcm_kit.config.resolution import Resolution
from lcm_kit.config.schema import Adapter, Training
from lcm_kit.plan import encoding, evaluating, phases, work
from lcm_kit.plan.dry_run import DryRun, MetaModel, Weights
from lcm_kit.plan.sizes import FLOAT, GIB, Parts, base_bytes, dtype_of, moment_bytes
from lcm_kit.plan.text import rank_of

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
        trained = encoding.trained_at(config, stage)
        dry_run = self.rehearse(config, at=trained)
        staying = _staying(config, stage, dtype)
        if self.device == "cpu" and config.memory.quantize != "none" and stage.subject.stored == dtype:
            # views of the file, which stays mapped as long as one of its layers is in use
            staying["base weights"] += stage.weights.quantizable * dtype.itemsize
        fake = self.rehearse(config, at=trained, fake=True) if config.matching else None
        passing = phases.of_training(config, dry_run, fake, stage, dtype, self.device)
        if self.device == "cpu":
            passing |= phases.on_the_host(config, stage, dtype, staying)
        return Estimate(
            config, self.device, dtype, stage.weights, staying, passing,
            encoding.phases(config, stage, self.device), evaluating.by_batch(config, stage, self.device),
            work.flops_of_step(
                config, self.rehearse(config), self.rehearse(config, fake=True) if config.matching else None
            ),
            0 if self.device == "cuda" or self.returning else self._gaps(config),
        )  # fmt: skip

    def rehearse(
        self,
        config: Training,
        *,
        at: Resolution | None = None,
        checkpointing: bool | None = None,
        fake: bool = False,
    ) -> DryRun:
        """The passes of a step, or those of the `fake` score; `checkpointing` in place of the config's.

        `at`: of this size, in place of squares, whose area that of all shapes is about.
        """
        return self.stage_of(config).rehearse(
            at or config.data.resolution, dtype_of(config, self.device),
            checkpointing=config.gradient_checkpointing if checkpointing is None else checkpointing,
            pair=not fake and work.graphs(config) == 2, fake=fake,
        )  # fmt: skip

    def _gaps(self, config: Training) -> int:
        student, batch = self.rehearse(config, checkpointing=False).student, config.batch_size
        return round(_GAPS * student.highest(batch).at(batch))

    def stage_of(self, config: Training) -> MetaModel:
        """The stage; another one where what is trained is of another size."""
        here, fake = self.stage, config.matching is not None
        wanted = (*_size(config.adapter), rank_of(config), fake)
        if wanted != (*_size(here.adapter), here.text_rank, here.fake):
            self.stage = MetaModel(here.subject, config.adapter, here.style, rank_of(config), fake)
        return self.stage

    def weights(self, config: Training) -> Weights:
        """The numbers of weights."""
        return self.stage_of(config).weights


def _size(adapter: Adapter) -> tuple[int, str]:
    return adapter.rank, adapter.targets


def _staying(config: Training, stage: MetaModel, dtype: torch.dtype) -> dict[str, int]:
    weights = stage.weights
    lora, moments = FLOAT * sum(weights.lora), moment_bytes(config, weights)
    fake = config.matching is not None
    return {
        "base weights": base_bytes(config, weights, dtype),
        **({"text encoders": FLOAT * stage.subject.text} if rank_of(config) else {}),
        "teacher's adapters": FLOAT * weights.style,
        "LoRA weights": lora,
        **({"fake score's LoRA": lora} if fake else {}),
        "optimizer moments": moments * (2 if fake else 1),
        "EMA of the LoRA": lora if config.ema else 0,
        **({"LoRA of the stage before": lora} if config.stages else {}),
    }
