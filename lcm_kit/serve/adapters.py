"""The LoRAs of a server, found and checked before anything is loaded, and what each is best drawn with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lcm_kit import console
from lcm_kit.bases import BaseInfo, inspect_base
from lcm_kit.config.numbers import require_in_range
from lcm_kit.config.schema import Base
from lcm_kit.core.methods import DEFAULT, MethodInfo
from lcm_kit.drawing.made import Lora, Source, base_name
from lcm_kit.drawing.pictures import slug
from lcm_kit.errors import UserError
from lcm_kit.evaluation.recommended import Settings, method_of, of_adapter, settings
from lcm_kit.io.files import sha256_file
from lcm_kit.lora import convert, verify
from lcm_kit.lora.locate import adapter_file, called, named
from lcm_kit.lora.provenance import Recommended


@dataclass(frozen=True)
class Adapter:
    """A LoRA that may be asked for by `name`."""

    name: str
    given: str  # FILE, RUN, hub:... or asset:..., by which `lcm-kit sample` finds it too
    file: Path
    sha256: str
    weight: float  # where a request says none
    method: MethodInfo
    advice: Recommended | None  # what was measured for it

    def settings(self, **asked: Any) -> Settings:
        """What was asked for, by name; where that is None what serves this LoRA."""
        return settings(self.advice, self.method, **asked)


@dataclass(frozen=True)
class Served:
    """A base and its LoRAs, in the order in which they were given."""

    base: BaseInfo
    adapters: tuple[Adapter, ...]

    @classmethod
    def of(cls, base: Base, given: Sequence[str]) -> Served:
        """`given`: FILE, RUN, hub:... or asset:..., each with or without =WEIGHT.

        Raises `UserError` for a LoRA that is not whole, not for this base, or not one that diffusers loads.
        """
        info = inspect_base(base.path, revision=base.revision, variant=base.variant)
        against = verify.base_of(base.path, base.revision, base.variant)
        found: list[Adapter] = []
        for text in given:
            place, weight = parted(text)
            with console.working(f"checking {place}"):
                file = adapter_file(place)
                convert.require_diffusers(file, against)
                advice, method = of_adapter(Path(place), file), method_of(file)
            if weight is None:
                weight = settings(advice, method).lora_weight
            name = _free(place, {each.name for each in found})
            found.append(Adapter(name, place, file, sha256_file(file), weight, method, advice))
        return cls(info, tuple(found))

    def named(self, name: str) -> Adapter | None:
        """The LoRA of that name."""
        return next((each for each in self.adapters if each.name == name), None)

    @cached_property
    def source(self) -> Source:
        """What a picture says of the base and the LoRAs that drew it; looked up on the disk once."""
        loras = {each.name: Lora(called(each.given), each.sha256) for each in self.adapters}
        return Source(base_name(self.base.path), loras)

    def settings(self, first: Adapter | None, **asked: Any) -> Settings:
        """What is drawn with: by `first` of the LoRAs that are on, or as `lcm-kit sample` with none."""
        return settings(None, DEFAULT, **asked) if first is None else first.settings(**asked)


def parted(text: str) -> tuple[str, float | None]:
    """FILE=WEIGHT as both; a path that is there may hold a `=` itself. Raises `UserError` for no weight."""
    place, equals, number = text.rpartition("=")
    if not equals or (not named(text) and Path(text).exists()):
        return text, None
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if math.isnan(weight):
        raise UserError(f"--adapter {text}: {number!r} is no weight; write FILE=0.8, or FILE alone")
    require_in_range(weight=weight)
    return place, weight


def _free(place: str, taken: set[str]) -> str:
    """A name for the LoRA: its run's or file's, with a number where that is taken."""
    plain = slug(called(place))
    name, number = plain, 2
    while name in taken:
        name, number = f"{plain}-{number}", number + 1
    return name
