"""The sections of a record of how a LoRA was made (`lcm_kit.lora.provenance`); what is not known is None.

The types are strict, and the values open, since a record must stay readable when a config's choices change.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, field, fields
from functools import cache
from typing import Annotated, Any, TypeVar, cast

from pydantic import AliasChoices, ConfigDict, Field, TypeAdapter, model_validator
from pydantic.dataclasses import dataclass

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
_REGULARIZATION = AliasChoices("regularization", "regularisation")  # as it was written once
_SHAPE = r"^[1-9][0-9]{0,8}x[1-9][0-9]{0,8}$"
T = TypeVar("T")


@cache
def _adapter_of(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def read(kind: type[T], content: Mapping[str, Any]) -> T:
    """A section, or a whole record, from JSON's values. Raises pydantic's `ValidationError`."""
    return cast(T, _adapter_of(cast(Any, kind)).validate_json(json.dumps(content), strict=True))


@dataclass(frozen=True, config=STRICT)
class Base:
    """What it was trained on, or is for."""

    path: str | None = None  # as the user called it: a hub id, `asset:NAME` or a folder
    hash: str | None = None  # of all of it, `BaseInfo.base_hash`
    revision: str | None = None
    variant: str | None = None
    family: str | None = None  # sd, sdxl
    license: str | None = None  # as it was declared, `licenses.normal`


@dataclass(frozen=True, config=STRICT, kw_only=True)
class TrainedBase(Base):
    """The base of a run, which is always known."""

    path: str = field()  # without it the default would be inherited
    hash: str = field()


@dataclass(frozen=True, config=STRICT)
class Layers:
    """The LoRA as it was trained; a file that was reduced or merged has ranks of its own."""

    rank: int
    alpha: float
    targets: str  # lcm, attention

    @model_validator(mode="before")
    @classmethod
    def _once(cls, given: Any) -> Any:
        """Without `start`, which was written here too once, and less of it than Provenance.start says."""
        return {k: v for k, v in given.items() if k != "start"} if isinstance(given, dict) else given


@dataclass(frozen=True, config=STRICT)
class Method:
    """The method of few-step distillation. In JSON the constants stand beside the name.

    Nothing of a custom method's code is needed to read it back.
    """

    name: str | None = None  # None: the LoRA is not made for few steps
    title: str | None = None  # for people
    samplers: tuple[str, ...] = ()  # that its student draws with, the one that it is judged by first
    steps: tuple[int, ...] = ()  # the numbers of steps that it serves
    tags: tuple[str, ...] = ()  # of its card
    constants: dict[str, Any] = field(default_factory=dict)  # its other settings, as JSON holds them

    @model_validator(mode="before")
    @classmethod
    def _constants(cls, given: Any) -> Any:
        """Gather from a JSON object what is no field."""
        if not isinstance(given, dict):
            return given
        own = {key: _tupled(given[key]) for key in _OF_METHOD if key in given}
        return {**own, "constants": {key: value for key, value in given.items() if key not in own}}

    @classmethod
    def of(cls, method: Any) -> Method:
        """Of a config's method; title, samplers, steps and tags its class may say without a setting."""
        told = {key: getattr(method, key) for key in _OF_METHOD if hasattr(method, key)}
        return read(cls, {**asdict(method), **told})


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


_OF_METHOD = tuple(each.name for each in fields(Method) if each.name != "constants")


@dataclass(frozen=True, config=STRICT)
class Grid:
    """The solver's, as `schema.Grid`."""

    steps: int
    steps_start: int | None = None
    sampling: str | None = None  # None: uniform
    log_mean: float | None = None
    log_std: float | None = None
    shift: float | None = None


@dataclass(frozen=True, config=STRICT)
class Loss:
    """As `schema.Loss` of a distillation, or `finetune.Denoising` of a style LoRA."""

    name: str | None = None
    c: float | None = None
    weighting: str | None = None
    adaptive: bool | None = None
    min_snr_gamma: float | None = None
    snr_floor: float | None = None
    noise_offset: float | None = None


@dataclass(frozen=True, config=STRICT)
class Guidance:
    """Baked in: lowest and highest, as diffusers' guidance_scale."""

    min: float
    max: float


@dataclass(frozen=True, config=STRICT)
class Lora:
    """A LoRA file that took part in a training, at its weight."""

    path: str
    sha256: str
    weight: float = 1.0
    license: str | None = None  # that its header, or the README.md beside it, declares


@dataclass(frozen=True, config=STRICT)
class Teacher:
    """As `schema.Teacher`, with its files' hashes."""

    adapters: tuple[Lora, ...] = ()
    in_student: bool = False
    regularization: str = Field(default="base", validation_alias=_REGULARIZATION)
    weight: float = 1.0
    reuse: int = 1  # steps that one answer of it served


@dataclass(frozen=True, config=STRICT)
class TextEncoder:
    """The text encoders' LoRA, as `finetune.TextEncoder`."""

    rank: int | None = None  # None: they were not trained
    alpha: float | None = None
    lr: float | None = None


@dataclass(frozen=True, config=STRICT)
class Prior:
    """The base's own pictures beside the brand's, as `finetune.Prior`."""

    prompts: str | None = None  # None: no prior preservation
    weight: float = 1.0
    count: int = 0
    steps: int = 0
    guidance_scale: float = 1.0
    seed: int = 0
    resolutions: tuple[int | tuple[int, int], ...] = ()  # of them, in turn; none: squares of data.resolution


@dataclass(frozen=True, config=STRICT)
class Rights:
    """What metadata says of the pictures, in numbers, as `own_shapes.Rights`."""

    pictures: int
    licenses: dict[str, int] = field(default_factory=dict)
    source: int = 0
    consent: int = 0
    refused: int = 0
    author: int = 0


@dataclass(frozen=True, config=STRICT)
class Data:
    """What was trained on."""

    fingerprint: str | None = None
    # pixels along one side; (width, height) of a file of others that says so
    resolution: int | tuple[int, int] | None = None
    source: str | None = None  # images, teacher, mix, prompts
    trigger: str | None = None  # what prompts say to get the style
    rights: Rights | None = None  # None: no metadata says any
    # pictures by the shape that they were cut to, as "768x512", width first; empty: squares of `resolution`
    shapes: dict[Annotated[str, Field(pattern=_SHAPE)], int] = field(default_factory=dict)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """`shapes` as (width, height), from the narrowest to the widest."""
        return sorted(
            (int(width), int(height)) for width, _, height in (k.partition("x") for k in self.shapes)
        )


@dataclass(frozen=True, config=STRICT)
class Recommended:
    """Settings that were measured to serve best; all None where none can be recommended."""

    sentence: str
    sampler: str | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    lora_weight: float | None = None
    reasons: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    part: str | None = None  # of a merged file what was measured, alone; None: the file itself
    at: str | None = None  # how large the pictures were, `768 × 512`; None: squares
