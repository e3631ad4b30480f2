"""Every key of every YAML file, with its default, its range and what it does.

The objects are frozen pydantic dataclasses: what `load.py` validates is what the recipes hold in their hands.
Guidance is everywhere diffusers' `guidance_scale` (1 = none); the LCM paper's w is `guidance_scale - 1`
(`lcm_kit/core/guidance.py`).
"""

from __future__ import annotations

from dataclasses import field, replace
from operator import attrgetter
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator
from pydantic.dataclasses import dataclass

from lcm_kit.config.data import (
    STRICT,
    BatchSize,
    BatchSizeOrAuto,
    Data,
    Fraction,
    NonNegative,
    Number,
    Place,
    Positive,
    Rate,
    Samples,
    Scale,
    Seed,
    Shapes,
    Weight,
    Whole,
)
from lcm_kit.config.methods import AnyMethod, info_of, needs_pictures
from lcm_kit.config.objective import Grid, Guidance, Loss, both
from lcm_kit.config.on_the_way import Checkpoint, Logging, Validation
from lcm_kit.config.resolution import Resolution
from lcm_kit.core.methods import DMD, LCM, MethodInfo, Progressive, Stage

__all__ = [
    "STRICT", "BatchSize", "BatchSizeOrAuto", "Checkpoint", "Data", "Fraction", "Grid", "Guidance", "Logging",
    "Loss", "NonNegative", "Number", "Place", "Positive", "Rate", "Samples", "Scale", "Seed", "Shapes",
    "Validation",
    "Weight", "Whole",
]  # fmt: skip


@dataclass(frozen=True, config=STRICT)
class Base:
    """The Stable Diffusion base: a diffusers folder, a hub id, or `asset:NAME` for one that the kit ships."""

    path: Place = "asset:tiny-sd"
    revision: str | None = None  # hub revision
    variant: str | None = None  # file variant, as "fp16"
    # its licence, told in the files and the card of what is trained on it; null: what its README.md declares
    license: Annotated[str, Field(max_length=200)] | None = None


@dataclass(frozen=True, config=STRICT)
class Weighted:
    """A LoRA to use at a weight; where the weight is 1 its path alone may stand in its place."""

    # a file in any style that `lcm-kit convert` reads, a run's folder, asset:NAME, or hub:OWNER/NAME[/FILE]
    path: Place
    weight: Weight = 1.0


def listed(given: Any) -> Any:
    """One path as a list of one, null as a list of none, and a path within a list as an entry."""
    entries = given if isinstance(given, list | tuple) else [] if given is None else [given]
    return tuple({"path": entry} if isinstance(entry, str) else entry for entry in entries)


Loras = Annotated[tuple[Weighted, ...], BeforeValidator(listed)]


@dataclass(frozen=True, config=STRICT)
class Adapter:
    """The LoRA that is trained. Its strength is alpha / rank."""

    rank: Annotated[Whole, Field(ge=1, le=1024)] = 64
    alpha: Rate = 64.0
    # lcm: every layer that LCM-LoRA adapts; attention: q, k, v, out only
    targets: Literal["lcm", "attention"] = "lcm"
    # LoRAs that training starts as the sum of, within these targets and, their ranks together, this rank
    start: Loras = ()


@dataclass(frozen=True, config=STRICT)
class Teacher:
    """What the teacher is besides the base: a style LoRA, or several."""

    adapters: Loras = ()
    # true: the student has them too, and its own adapter learns speed alone (use both when sampling);
    # false: its adapter learns style and speed together
    in_student: bool = False
    # who teaches the pictures of data.regularization. base: the base alone, so that what does not name the
    # style is drawn as before; adapters: the base with them, as it always is with in_student
    regularization: Literal["base", "adapters"] = "base"
    # share of the loss that follows the teacher's ODE step; the rest goes back with the noise that is in x_t,
    # which needs no teacher (consistency training). 1: distillation; 0: latent consistency fine-tuning
    weight: Annotated[Number, Field(ge=0, le=1)] = 1.0
    # steps in a row that one answer of the teacher serves: the same pictures, noise and times, each time with
    # new guidance, which is linear in it. Its passes fall to a share of 1 / reuse
    reuse: Annotated[Whole, Field(ge=1, le=1000)] = 1


@dataclass(frozen=True, config=STRICT)
class Memory:
    """How the frozen UNet is held and run; the LoRA and the mathematics are float32 whatever is set here."""

    # of its linear layers: nf4 (4 bits) or int8, by bitsandbytes; convolutions keep `precision`
    quantize: Literal["none", "nf4", "int8"] = "none"
    # torch.compile of the transformer blocks: most of a minute at the start, then faster steps on a GPU;
    # auto: on a GPU, for runs of 1000 steps or more
    compile: Literal["auto"] | bool = "auto"
    channels_last: bool = False  # memory format of convolutions: faster on a GPU, slower on a CPU
    tf32: bool = True  # TensorFloat-32 for float32 matrices on a GPU that has it


@dataclass(frozen=True, config=STRICT)
class Optimizer:
    """AdamW on the LoRA weights (float32)."""

    # adamw8bit: its moments in 8 bits, by bitsandbytes
    name: Literal["adamw", "adamw8bit"] = "adamw"
    lr: Rate = 1e-4
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: Rate = 1e-8
    weight_decay: Annotated[Number, Field(ge=0, le=1000)] = 0.0
    # after the warm-up; linear and cosine end at 0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: NonNegative = 0
    grad_clip: Rate = 1.0  # L2 norm over all LoRA weights


@dataclass(frozen=True, config=STRICT)
class Training:
    """What every recipe that trains a LoRA on a cache made by `lcm-kit encode` takes."""

    recipe: str
    output: Place  # the run's folder
    seed: Seed = 0
    steps: Positive = 1000  # optimizer steps
    batch_size: BatchSize = 8  # samples a forward, on each process
    accumulation: Positive = 1  # forwards an optimizer step
    # of the UNet; auto: float32 on CPU, else float16
    precision: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    gradient_checkpointing: bool = False
    # a loss that is NaN or Inf: stop, or leave that step's update out and go on
    non_finite: Literal["stop", "skip"] = "stop"
    # decay of an EMA of the LoRA weights, 0: none; each recipe says what it is for
    ema: Fraction = 0.0
    base: Base = field(default_factory=Base)
    data: Data = field(default_factory=Data)
    memory: Memory = field(default_factory=Memory)
    adapter: Adapter = field(default_factory=Adapter)
    optimizer: Optimizer = field(default_factory=Optimizer)
    validation: Validation = field(default_factory=Validation)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    logging: Logging = field(default_factory=Logging)

    @model_validator(mode="after")
    def _warmup(self) -> Training:
        if self.optimizer.warmup_steps > self.steps:
            warmup = self.optimizer.warmup_steps
            raise ValueError(f"optimizer.warmup_steps {warmup} is larger than steps {self.steps}; lower it")
        return self

    @property
    def drawn_at(self) -> Resolution:
        """Pixels of what is drawn and measured while it trains."""
        return self.validation.resolution or self.data.resolution

    @property
    def second_set(self) -> bool:
        """Whether the weights that are trained are held a second time: their average, or a teacher's."""
        return bool(self.ema)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Parts of the run with a teacher and a task of their own; none: it is of one piece."""
        return ()

    @property
    def matching(self) -> DMD | None:
        """The method, where it trains a fake score beside the student."""
        return None


@dataclass(frozen=True, config=STRICT)
class Distill(Training):
    """`recipe: train/distill`: LCM-LoRA distillation from a cache made by `lcm-kit encode`."""

    recipe: Literal["train/distill"]
    # decay of an EMA of the LoRA weights that gives the target; 0: the student itself, no gradient
    ema: Fraction = 0.0
    teacher: Teacher = field(default_factory=Teacher)
    method: AnyMethod = field(default_factory=LCM)
    solver: Literal["ddim", "dpmpp_2s", "heun"] = "ddim"
    grid: Grid = field(default_factory=Grid)
    guidance: Annotated[Guidance, BeforeValidator(both)] = field(default_factory=Guidance)
    # share of captions that are replaced by the empty one, which guidance is drawn away from: for guidance 1
    caption_dropout: Fraction = 0.0
    loss: Loss = field(default_factory=Loss)

    @model_validator(mode="after")
    def _effect(self) -> Distill:
        unused = {
            "solver": self.solver != "ddim",
            "guidance": self.guidance != Guidance(),
            "teacher.adapters": bool(self.teacher.adapters)
            and not self.teacher.in_student
            and self.data.source == "images",
            "teacher.reuse": self.teacher.reuse > 1,
        }
        for key in (key for key, given in unused.items() if given and self.teacher.weight == 0):
            raise ValueError(f"teacher.weight 0 leaves the teacher out, so {key} has no effect; remove it")
        if self.teacher.reuse > 1 and self.solver != "ddim":
            raise ValueError(
                f"teacher.reuse {self.teacher.reuse} keeps the teacher's answer at one point, and solver "
                f"{self.solver} asks it at a second one that guidance moves; set solver to ddim or reuse to 1"
            )
        if self.data.source == "prompts" and needs_pictures(self.method):
            raise ValueError(
                f"data.source prompts has no pictures, and method {self.method.name} learns from some; set "
                "data.source to images or teacher, or take a method that makes its own"
            )
        if self.data.source == "prompts" and self.teacher.weight < 1:
            raise ValueError(
                f"teacher.weight {self.teacher.weight:g} goes back to pictures with the noise that is in "
                "them, and with data.source prompts there are none; set it to 1"
            )
        if self.caption_dropout and self.student_guidance is None:
            baked = self.baked_guidance()
            if self.teacher.weight:
                why = f"guidance of {baked.min:g} to {baked.max:g} is baked into this one; set guidance to 1"
            else:
                why = "without a teacher (teacher.weight 0) this one is drawn without guidance"
            raise ValueError(
                f"caption_dropout {self.caption_dropout:g} is for a student that is drawn with guidance, and "
                f"{why}, or caption_dropout to 0"
            )
        if self.validation.held_out and self.data.source != "images":
            raise ValueError(
                f"validation.held_out is of images, and data.source is {self.data.source}; set it to 0"
            )
        return self

    @model_validator(mode="after")
    def _method(self) -> Distill:
        for key, why in getattr(self.method, "refuses", {}).items():
            if attrgetter(key)(self) != attrgetter(key)(Distill(self.recipe, self.output)):
                raise ValueError(f"{key} has no place in method {self.method.name}: {why}; remove it")
        if self.loss.adaptive and self.grid.steps_start in (None, self.grid.steps):
            raise ValueError(
                "loss.adaptive has no effect on a grid that stays the same; set grid.steps_start below "
                "grid.steps, or loss.adaptive to false"
            )
        warmup = self.optimizer.warmup_steps
        for stage in (stage for stage in self.stages if stage.steps < warmup):
            raise ValueError(
                f"optimizer.warmup_steps {warmup} is larger than a stage of {stage.steps} steps, and the "
                "learning rate begins anew in each; lower it"
            )
        return self

    @property
    def second_set(self) -> bool:
        """As `Training.second_set`: in stages the teacher is the student as the one before left it."""
        return bool(self.ema or self.stages)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """As `Training.stages`: those of progressive distillation."""
        return self.method.stages(self.steps) if isinstance(self.method, Progressive) else ()

    @property
    def matching(self) -> DMD | None:
        """As `Training.matching`."""
        return self.method if isinstance(self.method, DMD) else None

    def baked_guidance(self) -> Guidance:
        """The lowest and highest guidance_scale that the loss teaches the student to draw with alone.

        The teacher's step teaches its own; the same-noise step that of the data: 1 for images, since they are
        drawn from no guidance, and for the teacher's samples what they were drawn with.
        """
        scales = [self.guidance.min, self.guidance.max] if self.teacher.weight else []
        if self.teacher.weight < 1:
            scales += [1.0] if self.data.has_images else []
            scales += [self.data.samples.guidance_scale] if self.data.has_samples else []
        return Guidance(min(scales), max(scales))

    @property
    def student_guidance(self) -> float | None:
        """The guidance_scale that the student is drawn with, as validation does; None: 1, it is baked in.

        A student of the data alone is drawn without guidance too: pictures have none.
        """
        keeps = self.teacher.weight > 0 and self.baked_guidance().max == 1
        return self.validation.guidance_scale if keeps else None

    def student(self) -> MethodInfo:
        """How what it distils is drawn. Raises `UserError` as `methods.imported`."""
        return replace(info_of(self.method), guidance_scale=self.student_guidance)
