"""What a LoRA is and how it was made: one object, from the config of its training to the header of a file.

A run keeps it as `adapter/adapter.json` (`Trained`), a LoRA file in the strings of its header, which
`lcm_kit.lora.metadata` writes and `metadata_reading` reads back, of anybody's files too. What is not
known is None, and has no key. The types are strict: a key that this kit does not know is never dropped in
silence. Values are open, since a record must stay readable when a config's choices change.
`lcm_kit.lora.provenance_rules` has what a training, a conversion and a merge make of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, field, fields, is_dataclass, replace
from functools import cache
from typing import (
    Any,
    NotRequired,  # typing's own, until Python 3.12, is not pydantic's
    TypeVar,
    cast,
)

from pydantic import ConfigDict, TypeAdapter, model_validator
from pydantic.dataclasses import dataclass
from typing_extensions import TypedDict

from lcm_kit import samplers
from lcm_kit.core import methods
from lcm_kit.core.methods import MethodInfo

_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
T = TypeVar("T")

# -- Sections ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, config=_STRICT)
class Base:
    """What it was trained on, or is for."""

    path: str | None = None  # as the user called it: a hub id, `asset:NAME` or a folder
    hash: str | None = None  # of all of it, `BaseInfo.base_hash`
    revision: str | None = None
    variant: str | None = None
    family: str | None = None  # sd, sdxl


@dataclass(frozen=True, config=_STRICT, kw_only=True)
class TrainedBase(Base):
    """The base of a run, which is always known."""

    path: str = field()  # without it the default would be inherited
    hash: str = field()


@dataclass(frozen=True, config=_STRICT)
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


@dataclass(frozen=True, config=_STRICT)
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
        return _read(cls, {**asdict(method), **told})


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


_OF_METHOD = ("name", "title", "samplers", "steps", "tags")


@dataclass(frozen=True, config=_STRICT)
class Grid:
    """The solver's, as `schema.Grid`."""

    steps: int
    steps_start: int | None = None


@dataclass(frozen=True, config=_STRICT)
class Loss:
    """As `schema.Loss` of a distillation, or `finetune.Denoising` of a style LoRA."""

    name: str | None = None
    c: float | None = None
    weighting: str | None = None
    min_snr_gamma: float | None = None
    noise_offset: float | None = None


@dataclass(frozen=True, config=_STRICT)
class Guidance:
    """Baked in: lowest and highest, as diffusers' guidance_scale."""

    min: float
    max: float


@dataclass(frozen=True, config=_STRICT)
class Lora:
    """A LoRA file that took part in a training, at its weight."""

    path: str
    sha256: str
    weight: float = 1.0


@dataclass(frozen=True, config=_STRICT)
class Teacher:
    """As `schema.Teacher`, with its files' hashes."""

    adapters: tuple[Lora, ...] = ()
    in_student: bool = False
    regularisation: str = "base"
    weight: float = 1.0


@dataclass(frozen=True, config=_STRICT)
class TextEncoder:
    """The text encoders' LoRA, as `finetune.TextEncoder`."""

    rank: int | None = None  # None: they were not trained
    alpha: float | None = None
    lr: float | None = None


@dataclass(frozen=True, config=_STRICT)
class Prior:
    """The base's own pictures beside the brand's, as `finetune.Prior`."""

    prompts: str | None = None  # None: no prior preservation
    weight: float = 1.0
    count: int = 0
    steps: int = 0
    guidance_scale: float = 1.0
    seed: int = 0


@dataclass(frozen=True, config=_STRICT)
class Data:
    """What was trained on."""

    fingerprint: str | None = None
    resolution: int | None = None  # pixels along one side
    source: str | None = None  # images, teacher, mix
    trigger: str | None = None  # what prompts say to get the look


@dataclass(frozen=True, config=_STRICT)
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


@dataclass(frozen=True, config=_STRICT)
class Part:
    """A file of a merged one."""

    file: str  # its name
    weight: float
    made: Provenance


# -- The whole -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, config=_STRICT)
class Provenance:
    """What a LoRA is and how it was made; None, empty or a section of Nones where nothing is known."""

    title: str = ""  # what the file is called; the folder's name says it of a run, so no JSON has it
    base: Base = field(default_factory=Base)
    kit_version: str | None = None  # that trained it
    recipe: str | None = None
    date: str | None = None  # ISO 8601
    prediction_type: str | None = None  # of the base: epsilon, v_prediction, sample
    steps: int | None = None  # optimizer steps of the run
    step: int | None = None  # after which the weights were taken; `optimizer_steps`
    adapter: Layers | None = None
    method: Method = field(default_factory=Method)
    solver: str | None = None
    grid: Grid | None = None
    loss: Loss | None = None
    guidance: Guidance | None = None
    teacher: Teacher | None = None
    start: tuple[Lora, ...] = ()  # that training started as the sum of
    text_encoder: TextEncoder | None = None
    prior: Prior | None = None
    caption_dropout: float | None = None
    data: Data = field(default_factory=Data)
    held_out_loss: float | None = None  # of the weights, as in metrics.jsonl
    control_loss: float | None = None
    control_distance: float | None = None
    recommended: Recommended | None = None  # by a guidance sweep of these weights
    parents: tuple[str, ...] = ()  # the files that it was merged or converted from, in words
    parts: tuple[Part, ...] = ()  # of a merged file: all of them, with what is known of each

    @property
    def optimizer_steps(self) -> int | None:
        """That the weights had: `step`, or of old runs, which kept the last, all steps of the run."""
        return self.steps if self.step is None else self.step

    @property
    def distilled(self) -> MethodInfo | None:
        """The method of few-step distillation; of one that is not the kit's, as the file says it."""
        if self.method.name is None:
            return None
        read = None if self.method.name in methods.METHODS else MethodInfo.read(asdict(self.method))
        known = read and set(read.samplers) <= set(samplers.for_adapter())
        return read if known else methods.info(self.method.name)

    @property
    def student(self) -> MethodInfo:
        """How it is drawn in few steps: what does not say how it was made is taken for an LCM-LoRA."""
        return self.distilled or methods.DEFAULT

    @property
    def teachers(self) -> tuple[Lora, ...]:
        """The teacher's LoRAs."""
        return self.teacher.adapters if self.teacher else ()

    @property
    def measured(self) -> dict[str, Any]:
        """Which weights they are and their figures, by field."""
        return {name: getattr(self, name) for name in _MEASURED}

    def of_weights(self, step: int, figures: Mapping[str, float]) -> Provenance:
        """That of the weights after `step` steps, of which the `figures` by field were measured."""
        changed: dict[str, Any] = {**figures, "step": step}
        return replace(self, **changed)

    def to_json(self) -> dict[str, Any]:
        """As JSON holds it, back by `from_json`; without the title."""
        return cast(dict[str, Any], _plain(self))


_MEASURED = ("step", "held_out_loss", "control_loss", "control_distance")


class LoraConfig(TypedDict):
    """What peft needs to add the LoRA again; it says much more."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]

    r: int
    lora_alpha: float
    target_modules: list[str] | str
    alpha_pattern: NotRequired[dict[str, float] | None]


@dataclass(frozen=True, config=_STRICT, kw_only=True)
class Trained(Provenance):
    """The content of adapter.json: what is always known of a run's adapter, and peft's configs."""

    base: TrainedBase = field()  # without it the default would be inherited
    steps: int = field()
    lora_config: LoraConfig = field()
    text_lora_config: dict[str, LoraConfig] = field(default_factory=dict)  # by part

    @property
    def optimizer_steps(self) -> int:
        """As of any, and always known."""
        return self.steps if self.step is None else self.step

    def of_file(self, title: str, date: str) -> Provenance:
        """What a file `title` that is made of it says; its layers have peft's configs in their own way."""
        content = {key: value for key, value in self.to_json().items() if key not in _OF_PEFT}
        return replace(from_json(content), title=title, date=date, step=self.optimizer_steps)


_OF_PEFT = ("lora_config", "text_lora_config")


def trained(
    made: Provenance, lora_config: Mapping[str, Any], text_lora_config: Mapping[str, Any]
) -> dict[str, Any]:
    """adapter.json of an adapter that was made so, with peft's configs."""
    texts = {"text_lora_config": dict(text_lora_config)} if text_lora_config else {}
    return {**made.to_json(), "lora_config": dict(lora_config), **texts}


def _plain(value: Any) -> Any:
    """As JSON, without what is None or holds nothing, since that is what a missing key says."""
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    if not is_dataclass(value):
        return value
    found = {each.name: _plain(getattr(value, each.name)) for each in fields(value)}
    constants = found.pop("constants", {}) if isinstance(value, Method) else {}
    if isinstance(value, Provenance):
        del found["title"]
    return {key: each for key, each in found.items() if each not in (None, [], {})} | constants


@cache
def _adapter_of(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _read(kind: type[T], content: Mapping[str, Any]) -> T:
    return cast(T, _adapter_of(cast(Any, kind)).validate_json(json.dumps(content), strict=True))


def from_json(content: Mapping[str, Any]) -> Provenance:
    """Back from `to_json`. Raises pydantic's `ValidationError` for other types and for other keys."""
    return _read(Provenance, content)
