"""The list of what the study of methods compares, as studies/methods.yaml has it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from lcm_kit.config import load
from lcm_kit.config.schema import STRICT, Positive, Scale
from lcm_kit.errors import UserError, first_line

TEACHER = "teacher"  # drawn beside the entries
DONE = "done"  # a file in the folder of a cell, with what its figures need to know of it
CLOCK = "clock.jsonl"  # beside it, of its training


@dataclass(frozen=True, config=STRICT)
class Entry:
    """A method with its settings: how it is trained, or whose adapters it draws, and how."""

    label: str
    config: str | None = None
    set: dict[str, Any] = field(default_factory=dict)
    steps: tuple[Positive, ...] | None = None  # drawn at; None: what the method serves
    sampler: str | None = None  # None: the method's own
    guidance: Scale | None = None  # of its pictures; None: the teacher's where none is baked in, else 1
    start: str | None = None
    drawn_from: str | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Entry:
        if (self.config is None) == (self.drawn_from is None):
            raise ValueError("give either config or drawn_from")
        if self.drawn_from is not None and (self.set or self.start):
            raise ValueError("an entry with drawn_from trains nothing, so set and start do nothing")
        return self


@dataclass(frozen=True, config=STRICT)
class Curve:
    """How a training is followed."""

    points: Positive = 8
    prompts: Positive = 192
    steps: tuple[Positive, ...] = (1, 4)


@dataclass(frozen=True, config=STRICT)
class Spread:
    """What diversity is measured on."""

    prompts: Positive = 32
    images: Positive = 4


@dataclass(frozen=True, config=STRICT)
class TeacherOf:
    """The base: DDIM, trailing timesteps; `guidances`: what the effective guidance is looked for among."""

    steps: Positive = 50
    guidance: Scale = 5.0
    guidances: tuple[Scale, ...] = (1.0, 3.0, 5.0, 8.0)


@dataclass(frozen=True, config=STRICT)
class Plan:
    """The whole list."""

    entries: dict[str, Entry]
    seeds: tuple[int, ...] = (0, 1, 2)
    prompts: Positive = 512
    curve: Curve = field(default_factory=Curve)
    diversity: Spread = field(default_factory=Spread)
    negative: Positive = 64
    guidance_prompts: Positive = 64
    teacher: TeacherOf = field(default_factory=TeacherOf)

    @model_validator(mode="after")
    def _names(self) -> Plan:
        for name, entry in self.entries.items():
            for other in (entry.start, entry.drawn_from):
                if other is not None and (other not in self.entries or other == name):
                    raise ValueError(f"entry {name} names {other}, which is no other entry")
            if entry.drawn_from and self.entries[entry.drawn_from].config is None:
                raise ValueError(f"entry {name} is drawn from {entry.drawn_from}, which trains nothing")
        if max(self.curve.prompts, self.guidance_prompts) > self.prompts:
            raise ValueError("curve.prompts and guidance_prompts are of the prompts, so at most as many")
        return self

    def every(self, steps: int) -> int:
        """Steps between states: as many as `curve.points` asks for, and the last step has one anyhow."""
        return max(1, steps // self.curve.points)


def read(file: Path) -> Plan:
    """The list in `file`. Raises `UserError` naming what is wrong."""
    try:
        return TypeAdapter(Plan).validate_python(load.read(file))
    except ValidationError as error:
        found = error.errors()[0]
        place = ".".join(map(str, found["loc"])) or "the list"
        raise UserError(f"{file}: {place}: {first_line(ValueError(found['msg']))}") from error


def cells(plan: Plan) -> Iterator[tuple[str, int]]:
    """Entry and seed of every cell, all entries of a seed before the next seed."""
    for seed in plan.seeds:
        for name in plan.entries:
            yield name, seed
