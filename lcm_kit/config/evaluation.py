"""The keys of `recipe: evaluation/quality` and `recipe: evaluation/speed`."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from lcm_kit.config.choices import BaseSampler, Structure
from lcm_kit.config.resolution import Resolution
from lcm_kit.config.schema import (
    STRICT,
    BatchSize,
    BatchSizeOrAuto,
    Memory,
    NonNegative,
    Number,
    Place,
    Positive,
    Scale,
    Seed,
    Weight,
    Whole,
)


@dataclass(frozen=True, config=STRICT)
class Quality:
    """`recipe: evaluation/quality`: teacher, plain samplers and student on the same prompts and noise."""

    recipe: Literal["evaluation/quality"]
    # the run's folder: its adapter is the student, its base the teacher; results.json is written there
    run: Place
    # a base (as base.path of a run) to evaluate alone, without a student; `run` is then just where results go
    base: Place | None = None
    seed: Seed = 0
    prompts: Place = "asset:tiny-sd"  # text file, one prompt a line, or an asset
    # prompts, taken from the top of the file and repeated with new noise where it is shorter
    count: Positive = 128
    # pixels: of a side of squares, or [width, height]; null: what the run was trained at (data.resolution),
    # of a base alone its own
    resolution: Resolution | None = None
    # pictures at once: a number, or auto, by device and size; half as many from where memory runs out
    batch_size: BatchSizeOrAuto = 32
    # folder, hub id or asset:NAME of a diffusers AutoencoderTiny (previews) or ConsistencyDecoderVAE that
    # decodes in the VAE's place, and whose figures are kept apart from the VAE's; null: the VAE
    decoder: Place | None = None
    tiling: bool = False  # decode what is larger than the VAE was made for in tiles, which is not exact
    compile: bool = False  # torch.compile of the UNet: minutes at the start, faster pictures on a GPU
    guidance_scale: Scale = 5.0  # of teacher, plain samplers with guidance, and a student with none baked in
    teacher_steps: Positive = 50
    student_steps: tuple[Positive, ...] | None = None  # null: those that the run's method serves
    # budgets of the plain samplers; guidance costs two calls a step
    unet_calls: tuple[Positive, ...] = (2, 4, 8)
    samplers: tuple[BaseSampler, ...] = ("ddim", "dpmpp_2m")
    lora_weight: Weight = 1.0
    reference_count: Positive = 1024  # held-out real renders (tiny-sd) behind the Frechet distance
    confidence: Annotated[Number, Field(gt=0.5, lt=1)] = 0.95  # of the intervals
    resamples: Annotated[Whole, Field(ge=100, le=1_000_000)] = 1000  # bootstrap rounds
    pictures: Positive = 16  # prompts whose pictures are kept for the report


@dataclass(frozen=True, config=STRICT)
class Speed:
    """`recipe: evaluation/speed`: a training step of ours beside a straight-line one, on random weights."""

    recipe: Literal["evaluation/speed"]
    output: Place = "runs/speed"  # folder of results.json
    seed: Seed = 0
    structure: Structure = "sd1"  # the base whose blocks are built
    # share of the channels and heads of its UNet, VAE and text encoders: 1, 0.5, 0.25 or 0.125
    width: Annotated[Number, Field(gt=0, le=1)] = 1.0
    resolution: Resolution = 512  # pixels: of a side of squares, or [width, height]
    batch_size: BatchSize = 4
    rank: Annotated[Whole, Field(ge=1, le=1024)] = 64  # of the LoRA, on every layer that LCM-LoRA adapts
    # of both sides; auto: float32 on CPU, else float16
    precision: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    gradient_checkpointing: bool = False  # of both sides
    memory: Memory = field(default_factory=Memory)  # of our side, as in train/distill
    steps: Positive = 10  # timed steps of each side, in turns
    warmup: NonNegative = 2  # steps of each side before them

    @model_validator(mode="after")
    def _sizes(self) -> Speed:
        if self.width not in (1.0, 0.5, 0.25, 0.125):
            raise ValueError(f"width {self.width} does not divide the channels; choose 1, 0.5, 0.25 or 0.125")
        if self.structure == "tiny" and self.width != 1.0:
            raise ValueError(f"width {self.width} is for the large structures; leave it at 1 for tiny")
        return self
