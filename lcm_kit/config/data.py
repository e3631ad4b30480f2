"""What is trained on (the block `data`), and the kinds of number that all blocks are made of."""

from __future__ import annotations

import os
from dataclasses import field, fields, replace
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError

from lcm_kit.config.choices import BaseSampler
from lcm_kit.config.resolution import Resolution

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False, str_min_length=1)


def _no_bool(given: Any) -> Any:
    if isinstance(given, bool):  # Python counts with them: `lr: true` would be 1
        raise PydanticCustomError("bool", "a truth value is no number")
    return given


Whole = Annotated[int, BeforeValidator(_no_bool)]
Number = Annotated[float, BeforeValidator(_no_bool)]
# The upper bounds are far above what makes sense: they stop slips, and numbers that no machine has room for
Positive = Annotated[Whole, Field(ge=1, le=10_000_000)]
NonNegative = Annotated[Whole, Field(ge=0, le=10_000_000)]
BatchSize = Annotated[Whole, Field(ge=1, le=100_000)]
# auto: what the device draws well at that size; either way half as many from where memory runs out
BatchSizeOrAuto = BatchSize | Literal["auto"]
Seed = Annotated[Whole, Field(ge=-(2**63), le=2**63 - 1)]
Rate = Annotated[Number, Field(gt=0, le=1e9)]
Fraction = Annotated[Number, Field(ge=0, lt=1)]
Scale = Annotated[Number, Field(ge=1, le=1000)]
Weight = Annotated[Number, Field(ge=-1000, le=1000)]  # of a LoRA
# A file or folder: `~` is written out, which no shell does in a file; hub ids and asset:NAME stay as they are
Place = Annotated[str, AfterValidator(os.path.expanduser)]


@dataclass(frozen=True, config=STRICT)
class Samples:
    """The teacher's own samples for a list of prompts, drawn once by `encode` (base and teacher.adapters)."""

    # text file, one prompt a line; or a folder of pictures, whose captions are the prompts; or an asset
    prompts: Place = "asset:general"
    count: Positive = 256  # samples: the prompts from the top, repeated with new noise if they are fewer
    sampler: BaseSampler = "ddim"
    steps: Annotated[Whole, Field(ge=1, le=1000)] = 50
    guidance_scale: Scale = 5.0
    seed: Seed = 0  # of their noise
    # pixels of the samples, each of a side of squares or [width, height], in turns; []: data.resolution
    resolutions: tuple[Resolution, ...] = ()
    share: Annotated[Number, Field(gt=0, lt=1)] = 0.5  # of the batches, with data.source mix


@dataclass(frozen=True, config=STRICT)
class Shapes:
    """What becomes of pictures of different shapes: the same area for all, or the square in their middle."""

    # buckets: each picture is cut to the shape of about `resolution` squared pixels that is nearest to its
    # own, and a batch is of one shape; square: the largest square of each
    kind: Literal["buckets", "square"] = "buckets"
    # pixels that widths and heights are multiples of; null: what the base's UNet halves without a remainder,
    # 64 for Stable Diffusion (8 fits pictures more closely, and is half a percent of the area off at most)
    multiple: Annotated[Whole, Field(ge=4, le=512)] | None = None
    longest: Annotated[Number, Field(ge=1, le=16)] = 4.0  # times as long as wide that a bucket is at most
    # what is kept of what lies outside of the shape: the middle; subject: where the picture's mask is, or
    # else what stands out of its ground; random: a place that each picture has to itself
    crop: Literal["center", "subject", "random"] = "center"
    crops: Annotated[Whole, Field(ge=1, le=64)] = 1  # rows of a picture, each with its own random crop
    # pictures with fewer pixels than their shape. upscale: made larger, which `encode` counts; keep: a shape
    # of their own pixels; drop: left out, which it names
    small: Literal["upscale", "keep", "drop"] = "upscale"

    @model_validator(mode="after")
    def _effect(self) -> Shapes:
        if self.crops > 1 and self.crop != "random":
            raise ValueError(
                f"crops {self.crops} with crop {self.crop} are the same picture again; set crop to random, "
                "or crops to 1"
            )
        if self.kind == "square":
            for key, given in (("multiple", self.multiple), ("longest", self.longest != 4.0)):
                if given:
                    raise ValueError(f"{key} is of buckets and has no effect on kind square; remove it")
        return self


@dataclass(frozen=True, config=STRICT)
class Masks:
    """What counts in a picture: how much the loss weighs each part of it."""

    # files: NAME.mask.png beside NAME.png, white where it counts; alpha: those, and where there is none the
    # picture's own transparency; none: all counts alike
    source: Literal["files", "alpha", "none"] = "files"
    # weight of what is black or transparent, of 1 for what is white or opaque
    background: Annotated[Number, Field(ge=0, le=1)] = 0.0

    @model_validator(mode="after")
    def _effect(self) -> Masks:
        if self.source == "none" and self.background:
            raise ValueError("background weighs what masks leave out, and source none has none; remove it")
        return self


@dataclass(frozen=True, config=STRICT)
class Captions:
    """How the captions of pictures are read, and what is made of them before they are encoded."""

    # what the names of subfolders say. kohya: `10_subject name` is 10 times each picture an epoch, and
    # `subject name` the caption of those that have none; plain: nothing; auto: kohya where every subfolder
    # with pictures is named so, by numbers up to 200 that neither count on (1_, 2_, ...) nor begin with 0
    layout: Literal["auto", "kohya", "plain"] = "auto"
    # a caption of several lines. joined: one caption; first: its first line; each: as many captions, of which
    # every step draws one, and so are the lines of a table that name one picture
    lines: Literal["joined", "first", "each"] = "joined"
    # other orders of a caption's tags (the parts between commas) that are encoded too; every step draws one
    shuffle_tags: Annotated[Whole, Field(ge=0, le=100)] = 0
    keep_tokens: Annotated[Whole, Field(ge=0, le=1000)] = 0  # tags that stay in front, with the trigger's
    # where a caption has it, the tags before it stay in front, those after a second one at the end, and
    # keep_tokens does not count, as in kohya's trainer, whose users write `|||`; null: none
    keep_separator: Annotated[str, Field(max_length=20)] | None = None
    trigger_in_front: bool = False  # put data.trigger before each caption of `path` that lacks it

    @model_validator(mode="after")
    def _effect(self) -> Captions:
        for key in ("keep_tokens", "keep_separator"):
            if getattr(self, key) and not self.shuffle_tags:
                raise ValueError(
                    f"{key} says which tags stay where they are while the others are shuffled, and "
                    "shuffle_tags is 0; set it to 1 or more, or remove it"
                )
        if self.keep_separator and ("," in self.keep_separator or not self.keep_separator.strip()):
            raise ValueError(
                f"keep_separator {self.keep_separator!r} cannot be told from what separates tags; take a "
                "sign that no tag has, as `|||`"
            )
        return self

    @property
    def unshuffled(self) -> Captions:
        """The same without other orders of tags."""
        return replace(self, shuffle_tags=0, keep_tokens=0, keep_separator=None)


@dataclass(frozen=True, config=STRICT)
class Data:
    """What is trained on, and where its latents and embeddings are cached."""

    # image folder, `datasets` data set (local or hub id), asset:NAME; or tar and parquet files, read as
    # streams: a file, a folder of them, an address (s3://, gs://, hf://, https://), or a pattern of these
    # with `*` or {000..123} (docs/scale.md)
    path: Place = "asset:brand"
    # images: those of `path`; train/distill only: teacher: its own samples, no images needed; mix: both;
    # prompts: those of `samples` alone, each once, for a method that makes its pictures itself (`dmd`)
    source: Literal["images", "teacher", "mix", "prompts"] = "images"
    samples: Samples = field(default_factory=Samples)  # cached in `cache`/teacher, prompts in `cache`/prompts
    # folder of general pictures with captions, added to the images: a narrow set alone narrows what the
    # adapter can still draw (docs/training.md)
    regularization: Place | None = None
    # share of the batches that these have; null: in proportion to their number
    regularization_share: Annotated[Number, Field(gt=0, lt=1)] | None = None
    # a run of train/finetune: what its validation held out is not trained on here either, so that there are
    # pictures of the style to judge by that no training saw (train/distill only, not of samples); null: none
    leave_out: Place | None = None
    # the word or phrase of the captions that stands for the style: `check` wants it in each of them, and the
    # exported file, its card and the report name it; null: none
    trigger: Annotated[str, Field(max_length=200)] | None = None
    captions: Captions = field(default_factory=Captions)  # how they are read, and shuffled
    # auto: a folder of images if there is one, streams of tar or parquet files where `path` is an address, a
    # pattern or a tar file, else `datasets`
    kind: Literal["auto", "folder", "datasets", "webdataset", "parquet"] = "auto"
    streaming: bool = False  # with `datasets`: rows as they come, nothing downloaded whole, no listing
    split: str = "train"  # datasets only
    image_column: str = "image"  # datasets and parquet; of webdataset the ending of the image, as hr.jpg
    # datasets, parquet, tables of a folder; of webdataset the ending of the caption's file or a key in .json
    caption_column: str = "text"
    cache: Place = "cache/brand"  # folder that `encode` writes and `train` reads
    # where `cache` is an address: folder of this machine for copies of its files, and the most that they
    # take, in GB of 10^9 bytes; null: $XDG_CACHE_HOME/lcm-kit/shards
    local_cache: Place | None = None
    local_cache_gb: Annotated[Number, Field(gt=0, le=1e6)] = 50.0
    # captions of more tokens than a text encoder reads (75) are read in up to so many chunks, as A1111 reads
    # them, and cut behind; 1: cut where diffusers' pipelines cut
    chunks: Annotated[Whole, Field(ge=1, le=8)] = 3
    # pixels, a multiple of 8: the side of a square; other shapes have about as many pixels (`shapes`)
    resolution: Annotated[Whole, Field(ge=8, le=4096)] = 64
    shapes: Shapes = field(default_factory=Shapes)
    masks: Masks = field(default_factory=Masks)
    flip: bool = False  # cache each image's mirror image as well
    # licences, by SPDX id, of which every picture must name one in its metadata, or `encode` stops and names
    # those that do not: ["CC0-1.0", "CC-BY-4.0"]; ["any"]: whichever (docs/provenance.md)
    require_license: tuple[str, ...] = ()
    skip_bad: bool = False  # leave out unreadable images and missing captions instead of stopping
    shard_size: BatchSize = 256  # records a safetensors shard
    # images a VAE pass while encoding, and samples of the teacher at once
    batch_size: BatchSizeOrAuto = 8
    # of the VAE while images are encoded. auto: float16, else bfloat16, on a GPU where the first picture
    # proves it near float32, float32 elsewhere; what a cache was begun in is kept
    vae_precision: Literal["auto", "float32", "float16", "bfloat16"] = "auto"

    @model_validator(mode="after")
    def _multiple(self) -> Data:
        if self.resolution % 8:
            near = self.resolution // 8 * 8
            raise ValueError(f"resolution {self.resolution} is not a multiple of 8; try {near or 8}")
        if self.flip and not self.has_images:
            raise ValueError(f"flip mirrors images, and with source {self.source} there are none; remove it")
        if self.regularization_share is not None and (self.regularization is None or self.source != "images"):
            raise ValueError(
                "regularization_share divides the batches between images and regularization; give "
                "regularization, and source images, or remove it"
            )
        if self.require_license and not self.has_images:
            raise ValueError(
                f"require_license asks it of images, and with source {self.source} there are none; remove it"
            )
        if self.source == "prompts":
            self._refuse_beside_prompts()
        self._refuse_without_effect()
        return self

    @model_validator(mode="after")
    def _of_captions(self) -> Data:
        if self.captions.trigger_in_front and self.trigger is None:
            raise ValueError(
                "captions.trigger_in_front puts trigger before captions; give trigger, or remove it"
            )
        if self.captions != Captions() and not self.has_images:
            raise ValueError(
                f"captions says how those of pictures are read, and with source {self.source} there are "
                "none; remove it"
            )
        if self.captions.layout == "kohya" and self.kind == "datasets":
            raise ValueError(
                "captions.layout kohya is of folders of pictures, and kind is datasets; remove one of them"
            )
        return self

    def _refuse_without_effect(self) -> None:
        if self.samples.resolutions and self.source == "images":
            raise ValueError(
                "samples.resolutions are sizes of what the teacher draws, and with source images it draws "
                "nothing to train on; remove it (pictures keep their shape by `shapes`)"
            )
        if self.streaming and self.kind not in ("auto", "datasets"):
            what = "reads a folder" if self.kind == "folder" else "streams anyway"
            raise ValueError(
                f"streaming is how `datasets` reads, and kind {self.kind} {what}; remove one of them"
            )
        if "://" not in self.cache and (self.local_cache is not None or self.local_cache_gb != 50.0):
            raise ValueError(
                f"local_cache is for copies of a cache at an address, and cache {self.cache!r} is a folder; "
                "remove it"
            )

    def _refuse_beside_prompts(self) -> None:
        drawn = [name.name for name in fields(Samples) if name.name not in ("prompts", "resolutions")]
        unused = {f"samples.{key}": getattr(self.samples, key) != getattr(Samples(), key) for key in drawn}
        unused |= {key: getattr(self, key) is not None for key in ("regularization", "leave_out")}
        for key in (key for key, given in unused.items() if given):
            raise ValueError(
                f"source prompts takes the prompts of samples.prompts alone, each once, so {key} has no "
                "effect; remove it"
            )

    @property
    def has_images(self) -> bool:
        """Whether images of `path` are trained on."""
        return self.source in ("images", "mix")

    @property
    def has_samples(self) -> bool:
        """Whether the teacher draws what is trained on, or some of it."""
        return self.source in ("teacher", "mix")
