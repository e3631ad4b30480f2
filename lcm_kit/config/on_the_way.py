"""What a training does on its way, besides training: pictures and measures, states, logs."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from lcm_kit.config.data import STRICT, NonNegative, Number, Place, Positive, Scale, Seed, Whole
from lcm_kit.config.resolution import Resolution


@dataclass(frozen=True, config=STRICT)
class Validation:
    """What is drawn and measured while it trains: teacher beside student, from the same noise every time."""

    every: NonNegative = 0  # steps; 0: only at the end
    prompts: Place | None = "asset:tiny-sd"  # text file, one prompt a line, or an asset; null: no pictures
    count: Positive = 4
    # pixels of what is drawn: of a side of squares, or [width, height]; null: data.resolution
    resolution: Resolution | None = None
    guidance_scale: Scale = 5.0  # of the teacher's sample
    seed: Seed = 1234
    # prompts that do not name the style, to notice when they are forgotten: text file or asset; null: off
    control: Place | None = None
    control_count: Positive = 8
    # share of the images of data.path that are kept out of training, to measure the loss on; at least one of
    # them, and 0: none
    held_out: Annotated[Number, Field(ge=0, le=0.5)] = 0.0
    # prompts of `prompts` of which four pictures each are drawn, to notice when a method draws them ever more
    # alike (train/distill only); 0: off
    diversity: Annotated[Whole, Field(ge=0, le=1000)] = 0

    @model_validator(mode="after")
    def _drawn_of(self) -> Validation:
        if self.diversity and self.prompts is None:
            raise ValueError("diversity is of the pictures of prompts, and these are null; set it to 0")
        return self


@dataclass(frozen=True, config=STRICT)
class Checkpoint:
    """Training state on disk."""

    every: Positive = 500  # steps; the last step is always saved
    keep: Positive = 2  # newest states kept


@dataclass(frozen=True, config=STRICT)
class Logging:
    """metrics.jsonl is always written; trackers are accelerate's, by name."""

    every: Positive = 10  # steps
    trackers: tuple[str, ...] = ("tensorboard",)
