"""The keys of `recipe: evaluation/guidance_sweep`.

Guidance is diffusers' `guidance_scale` (1 = none): the teacher's is what a sample of the base is drawn with,
the student's is what is asked of the pipeline with the adapter on, beyond what is baked in.
"""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from lcm_kit.config.choices import AdapterSampler, BaseSampler
from lcm_kit.config.resolution import Resolution
from lcm_kit.config.schema import (
    STRICT,
    BatchSizeOrAuto,
    Number,
    Place,
    Positive,
    Rate,
    Scale,
    Seed,
    Weight,
    Whole,
)

Some = Annotated[tuple[Positive, ...], Field(min_length=1)]
Scales = Annotated[tuple[Scale, ...], Field(min_length=1)]


@dataclass(frozen=True, config=STRICT)
class SweptTeacher:
    """The base without the adapter: DDIM, trailing timesteps."""

    steps: Positive = 50
    guidance_scales: Scales = (
        1.0,
        2.0,
        3.0,
        5.0,
        7.0,
        10.0,
    )  # what the effective guidance is looked for among
    guidance_scale: Scale = 5.0  # of the samples that the student's are compared with


@dataclass(frozen=True, config=STRICT)
class SweptStudent:
    """A grid of settings for each adapter: every combination is a cell."""

    # null: the sampler, or the steps, of the adapter's own method
    samplers: Annotated[tuple[AdapterSampler, ...], Field(min_length=1)] | None = None
    steps: Some | None = None
    # null: 1 and 1.5, or the teacher's where no guidance is baked into the adapter
    guidance_scales: Scales | None = None
    lora_weights: Annotated[tuple[Weight, ...], Field(min_length=1)] = (1.0,)


@dataclass(frozen=True, config=STRICT)
class SweptPlain:
    """The base with few-step samplers that need no training, at the same number of UNet calls."""

    samplers: tuple[BaseSampler, ...] = ("ddim", "dpmpp_2m")
    unet_calls: tuple[Positive, ...] = (4, 8)  # guidance costs two a step
    guidance_scales: Scales = (1.0, 5.0)


@dataclass(frozen=True, config=STRICT)
class Cost:
    """What a machine costs, for the cost of 1,000 pictures."""

    price_per_hour: Rate = 1.0
    currency: str = "USD"


@dataclass(frozen=True, config=STRICT)
class GuidanceSweep:
    """`recipe: evaluation/guidance_sweep`: which guidance, how many steps, what weight, and how we know."""

    recipe: Literal["evaluation/guidance_sweep"]
    # runs (their export is taken) or .safetensors files of any maker
    adapters: Annotated[tuple[Place, ...], Field(min_length=1)]
    # folder of results.json, report.html and the rest; null: `sweep` in the first adapter's run
    output: Place | None = None
    # diffusers folder, hub id, asset:NAME; null: what the first adapter was made on
    base: Place | None = None
    revision: str | None = None  # hub revision
    variant: str | None = None  # file variant, as "fp16"
    seed: Seed = 0
    prompts: Place = "asset:tiny-sd"  # text file, one prompt a line, or an asset
    count: Annotated[Whole, Field(ge=3, le=1_000_000)] = 24  # prompts, from the top of the file
    images_per_prompt: Positive = 2  # each from its own noise; 2 or more for diversity
    # pixels: of a side of squares, or [width, height]; null: the base's own
    resolution: Resolution | None = None
    batch_size: BatchSizeOrAuto = 32
    decoder: Place | None = None  # in the VAE's place: as in evaluation/quality
    tiling: bool = False  # as in evaluation/quality
    compile: bool = False  # as in evaluation/quality
    teacher: SweptTeacher = field(default_factory=SweptTeacher)
    student: Annotated[tuple[SweptStudent, ...], Field(min_length=1)] = (SweptStudent(),)
    plain: SweptPlain = field(default_factory=SweptPlain)
    # of the pictures: asset:probe, or a folder or hub id of a CLIP, SigLIP or DINOv2 model, or inception
    features: Place = "asset:probe"
    # of prompt adherence, as `features`: CLIP or SigLIP; null: `features` if it reads text, the probe's
    # attributes with asset:probe
    text_features: Place | None = None
    # images for the Frechet and kernel distances: folder or asset:NAME; null: renders of tiny-sd's world
    # where the prompts are of it, else none
    real: Place | None = None
    brand: Place | None = None  # images of the style: folder or asset:NAME; null: no brand similarity
    control: Place | None = None  # images of other styles, to compare with; needed with `brand`
    confidence: Annotated[Number, Field(gt=0.5, lt=1)] = 0.95  # of the intervals
    resamples: Annotated[Whole, Field(ge=100, le=1_000_000)] = 1000  # bootstrap rounds
    cost: Cost | None = None
    pictures: Positive = 6  # samples whose pictures the report shows, at most one a prompt

    @model_validator(mode="after")
    def _pairs(self) -> GuidanceSweep:
        if (self.brand is None) != (self.control is None):
            raise ValueError("brand and control need each other; give both or neither")
        if len(set(self.adapters)) < len(self.adapters):
            raise ValueError("adapters: one of them is there twice; name each once")
        return self


Weights = Annotated[tuple[Annotated[Number, Field(ge=0, le=1000)], ...], Field(min_length=1)]


@dataclass(frozen=True, config=STRICT)
class Compose:
    """`recipe: evaluation/compose`: at which weights do a style and an acceleration LoRA work together?"""

    recipe: Literal["evaluation/compose"]
    style: Place  # a run or a .safetensors file
    speed: Place  # as `style`: what makes sampling short
    output: Place = "runs/compose"  # folder of results.json, the merged file, map.png and the rest
    base: Place | None = None  # diffusers folder, hub id, asset:NAME; null: what `speed` was made on
    revision: str | None = None  # hub revision
    variant: str | None = None  # file variant, as "fp16"
    seed: Seed = 0
    prompts: Place = "asset:tiny-sd"  # text file, one prompt a line, or an asset
    count: Annotated[Whole, Field(ge=3, le=1_000_000)] = 16  # prompts, from the top of the file
    images_per_prompt: Positive = 2
    # pixels: of a side of squares, or [width, height]; null: the base's own
    resolution: Resolution | None = None
    batch_size: BatchSizeOrAuto = 32
    decoder: Place | None = None  # in the VAE's place: as in evaluation/quality
    tiling: bool = False  # as in evaluation/quality
    compile: bool = False  # as in evaluation/quality
    teacher_steps: Positive = 50  # of the styled teacher: the base with the style at `teacher_weight`
    teacher_guidance: Scale = 5.0
    teacher_weight: Weight = 1.0  # of the style in the teacher
    sampler: AdapterSampler | None = None  # null: that of the method which made `speed`
    steps: Positive = 4
    guidance_scale: Scale | None = None  # null: 1, or the teacher's where none is baked into `speed`
    style_weights: Weights = (0.8, 1.0, 1.1, 1.2, 1.4)
    speed_weights: Weights = (0.6, 0.8, 1.0, 1.2)
    features: Place = "asset:probe"  # as in a guidance sweep
    text_features: Place | None = None
    brand: Place | None = None  # images of the style: folder or asset:NAME; null: no brand similarity
    control: Place | None = None  # images of other styles; needed with `brand`
    rank: Annotated[Whole, Field(ge=1, le=65_536)] | None = (
        None  # of the merged file; null: exact, the ranks add up
    )
    confidence: Annotated[Number, Field(gt=0.5, lt=1)] = 0.95
    resamples: Annotated[Whole, Field(ge=100, le=1_000_000)] = 1000
    pictures: Positive = 6

    @model_validator(mode="after")
    def _pairs(self) -> Compose:
        if (self.brand is None) != (self.control is None):
            raise ValueError("brand and control need each other; give both or neither")
        return self
