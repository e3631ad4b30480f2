"""The keys of `recipe: evaluation/brand`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from lcm_kit.config.choices import AdapterSampler
from lcm_kit.config.resolution import Resolution
from lcm_kit.config.schema import STRICT, BatchSizeOrAuto, Number, Place, Positive, Scale, Seed, Weight, Whole


@dataclass(frozen=True, config=STRICT)
class Brand:
    """`recipe: evaluation/brand`: does a few-step adapter draw in the style, and what has it unlearned?"""

    recipe: Literal["evaluation/brand"]
    run: Place  # the few-step adapter: a run or a .safetensors file
    style: Place | None = None  # of the styled teacher: a run or a .safetensors file; null: no such row
    brand: Place = "asset:brand"  # images of the style: folder or asset:NAME
    # images of other styles, which similarity is measured away from; null: what the base draws for `prompts`
    control: Place | None = None
    # of the style: file, one a line; folder, whose captions are the prompts; asset:NAME; null: the
    # captions of those pictures of `brand` that the run of `style` held out, or of all if it held none out
    prompts: Place | None = None
    control_prompts: Place = "asset:tiny-sd"  # as `prompts`, but not naming the style
    # the word or phrase that calls the style, which is put in front of prompts of the style that do not say
    # it; null: what `run` says of itself (`data.trigger` of its training)
    trigger: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    # measure what the trigger brings, what leaks without it and what is forgotten: the prompts of the style
    # are drawn without the trigger too, or where there is none the control prompts once more by the base
    contract: bool = True
    count: Annotated[Whole, Field(ge=3, le=1_000_000)] = 24  # prompts, from the top
    control_count: Annotated[Whole, Field(ge=3, le=1_000_000)] | None = (
        None  # of control prompts; null: `count`
    )
    images_per_prompt: Positive = 2  # of the style, each from its own noise; 2 or more for diversity
    output: Place | None = None  # folder of brand.json; null: the run's folder, or `brand` beside the file
    base: Place | None = None  # diffusers folder, hub id, asset:NAME; null: what `run` was made on
    revision: str | None = None  # hub revision
    variant: str | None = None  # file variant, as "fp16"
    seed: Seed = 0
    # pixels: of a side of squares, or [width, height]; null: the base's own
    resolution: Resolution | None = None
    batch_size: BatchSizeOrAuto = 32
    decoder: Place | None = None  # in the VAE's place: as in evaluation/quality
    tiling: bool = False  # as in evaluation/quality
    compile: bool = False  # as in evaluation/quality
    teacher_steps: Positive = 50  # of the base and of the styled teacher: DDIM
    teacher_guidance: Scale = 5.0
    # null: the sampler, or the steps, of the method which made the adapter
    sampler: AdapterSampler | None = None
    steps: Annotated[tuple[Positive, ...], Field(min_length=1)] | None = None
    # of the adapter; null: 1, or the teacher's where no guidance is baked in
    guidance_scale: Scale | None = None
    lora_weight: Weight = 1.0
    features: Place = "asset:probe"  # as in a guidance sweep
    text_features: Place | None = None
    confidence: Annotated[Number, Field(gt=0.5, lt=1)] = 0.95
    resamples: Annotated[Whole, Field(ge=100, le=1_000_000)] = 1000
    pictures: Positive = 6  # prompts whose pictures are kept, of each kind
