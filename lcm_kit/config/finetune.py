"""The keys of `recipe: train/finetune`: a style LoRA."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from lcm_kit.config.resolution import Resolution
from lcm_kit.config.schema import (
    STRICT,
    Fraction,
    Number,
    Place,
    Positive,
    Rate,
    Scale,
    Seed,
    Training,
    Validation,
    Whole,
)


@dataclass(frozen=True, config=STRICT)
class Denoising:
    """The denoising loss: squared distance between what the UNet outputs and what it should, weighted."""

    # weight min(snr, gamma) / snr of each sample, / (snr + 1) for v (arXiv:2303.09556); null: all weigh 1
    min_snr_gamma: Rate | None = 5.0
    # an error in x0 counts at least this, however noisy the time (1 in arXiv:2202.00512, truncated SNR): the
    # noisiest times, where grounds are decided, else say next to nothing; for styles unlike the base's own
    snr_floor: Annotated[Number, Field(ge=0, le=100)] = 0.0
    # share of a random constant, one a channel, in the noise: learns darker and brighter pictures
    noise_offset: Annotated[Number, Field(ge=0, le=1)] = 0.0

    @model_validator(mode="after")
    def _room(self) -> Denoising:
        if self.min_snr_gamma is not None and self.snr_floor > self.min_snr_gamma:
            raise ValueError(
                f"snr_floor {self.snr_floor:g} is above min_snr_gamma {self.min_snr_gamma:g}; set it to that "
                "or less"
            )
        return self


@dataclass(frozen=True, config=STRICT)
class Prior:
    """Prior preservation (DreamBooth, arXiv:2208.12242): pictures of the base's own beside the brand's.

    `lcm-kit encode` draws them once, into `<data.cache>-prior`; in every step as many of them as brand
    pictures are trained on, which keeps what the base can draw and costs as much again.
    """

    # text file, one prompt a line; a folder of pictures, whose captions are the prompts; an asset; null: no
    # prior preservation
    prompts: Place | None = None
    weight: Rate = 1.0  # of their loss; a brand picture's is 1
    count: Positive = 200  # pictures: the prompts from the top, repeated with new noise if they are fewer
    steps: Annotated[Whole, Field(ge=1, le=1000)] = 30  # of DDIM
    guidance_scale: Scale = 5.0
    seed: Seed = 0  # of their noise
    # pixels of the pictures, in turns: each a side of squares or [width, height], one of the shapes that
    # data.shapes trains at (docs/shapes.md); []: data.resolution
    resolutions: tuple[Resolution, ...] = ()


@dataclass(frozen=True, config=STRICT)
class TextEncoder:
    """A LoRA on the base's text encoders (SDXL: both), trained with the UNet's and saved beside it.

    Captions are then encoded in every step. It lets a word of the captions get a new meaning.
    """

    rank: Annotated[Whole, Field(ge=1, le=1024)] | None = None  # null: the text encoders are not trained
    alpha: Rate | None = None  # null: rank, which is strength 1
    lr: Rate | None = None  # null: optimizer.lr; follows the same warm-up and schedule

    @model_validator(mode="after")
    def _effect(self) -> TextEncoder:
        if self.rank is None and (self.alpha is not None or self.lr is not None):
            key = "lr" if self.alpha is None else "alpha"
            raise ValueError(f"{key} has no effect without rank; set rank, as 8, or remove it")
        return self


@dataclass(frozen=True, config=STRICT)
class StyleValidation(Validation):
    """What is drawn and measured while it trains: base beside base with LoRA, and the held-out loss."""

    # as in Validation, but on unless it is set to 0: a style LoRA is soon learned by heart
    held_out: Annotated[Number, Field(ge=0, le=0.5)] = 0.1


@dataclass(frozen=True, config=STRICT)
class Finetune(Training):
    """`recipe: train/finetune`: a style LoRA by the denoising loss, from a cache by `lcm-kit encode`."""

    recipe: Literal["train/finetune"]
    # decay of an EMA of the LoRA weights, which is then what is measured and saved; 0: the weights themselves
    ema: Fraction = 0.0
    loss: Denoising = field(default_factory=Denoising)
    # share of captions that are replaced by the empty one, which guidance is drawn away from
    caption_dropout: Fraction = 0.1
    prior: Prior = field(default_factory=Prior)
    text_encoder: TextEncoder = field(default_factory=TextEncoder)
    validation: StyleValidation = field(default_factory=StyleValidation)

    @model_validator(mode="after")
    def _images(self) -> Finetune:
        if self.data.source != "images":
            raise ValueError(f"data.source {self.data.source} is for train/distill; a style is in images")
        if self.data.leave_out is not None:
            raise ValueError("data.leave_out is for train/distill, which has validation.held_out; remove it")
        if self.validation.diversity:
            raise ValueError(
                "validation.diversity is for train/distill, which draws in few steps; set it to 0"
            )
        if self.adapter.start:
            raise ValueError("adapter.start is for train/distill; remove it")
        return self
