"""What a LoRA is and how it was made: one object, from the config of its training to the header of a file.

A run keeps it as `adapter/adapter.json` (`Trained`), a LoRA file in the strings of its header, which
`lcm_kit.lora.metadata` writes and `metadata_reading` reads back, of anybody's files too. What is not
known is None, and has no key. The types are strict: a key that this kit does not know is never dropped in
silence. Values are open, since a record must stay readable when a config's choices change.
`lcm_kit.lora.provenance_rules` has what a training, a conversion and a merge make of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, field, fields, is_dataclass, replace
from typing import (
    Any,
    NotRequired,  # typing's own, until Python 3.12, is not pydantic's
    cast,
)

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from typing_extensions import TypedDict

from lcm_kit import samplers
from lcm_kit.core import methods
from lcm_kit.core.methods import MethodInfo
from lcm_kit.lora.provenance_sections import (
    STRICT,
    Base,
    Data,
    Grid,
    Guidance,
    Layers,
    Lora,
    Loss,
    Method,
    Prior,
    Recommended,
    Rights,
    Teacher,
    TextEncoder,
    TrainedBase,
    read,
)

__all__ = [
    "Base", "Data", "Grid", "Guidance", "Layers", "Lora", "Loss", "Method", "Part", "Prior", "Provenance",
    "Recommended", "Rights", "Teacher", "TextEncoder", "Trained", "TrainedBase", "from_json", "trained",
]  # fmt: skip


@dataclass(frozen=True, config=STRICT)
class Part:
    """A file of a merged one."""

    file: str  # its name
    weight: float
    made: Provenance


# -- The whole -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, config=STRICT)
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
    guidance_scale: float | None = None  # that its student is drawn with; None: 1, since it is baked in
    teacher: Teacher | None = None
    start: tuple[Lora, ...] = ()  # that training started as the sum of
    text_encoder: TextEncoder | None = None
    prior: Prior | None = None
    caption_dropout: float | None = None
    data: Data = field(default_factory=Data)
    held_out_loss: float | None = None  # of the weights, as in metrics.jsonl
    control_loss: float | None = None
    control_distance: float | None = None
    diversity: float | None = None
    recommended: Recommended | None = None  # by a guidance sweep of these weights
    license: str | None = None  # that the maker of a file of others declares for it
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
        known = read if read and all(map(samplers.serves_adapter, read.samplers)) else None
        said = {"steps": self.method.steps} if self.method.steps else {}  # of some methods that is a key
        found = known or methods.info(self.method.name, {**said, **self.method.constants})
        return replace(found, guidance_scale=self.guidance_scale)

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


_MEASURED = ("step", "held_out_loss", "control_loss", "control_distance", "diversity")


class LoraConfig(TypedDict):
    """What peft needs to add the LoRA again; it says much more."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]

    r: int
    lora_alpha: float
    target_modules: list[str] | str
    alpha_pattern: NotRequired[dict[str, float] | None]


@dataclass(frozen=True, config=STRICT, kw_only=True)
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
    made: Provenance, lora_config: Mapping[str, Any], text_lora_config: Mapping[str, Any] | None = None
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


def from_json(content: Mapping[str, Any]) -> Provenance:
    """Back from `to_json`. Raises pydantic's `ValidationError` for other types and for other keys."""
    return read(Provenance, content)
