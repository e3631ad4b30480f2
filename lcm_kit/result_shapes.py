"""The shapes of what evaluations write (results.json, brand.json), as in `own_shapes`."""

from __future__ import annotations

from typing import Any, NotRequired

from typing_extensions import TypedDict

from lcm_kit.own_shapes import Base, Interval

# -- results.json of a run -----------------------------------------------------------------------------------


class Kind(TypedDict):
    """Which evaluation a results.json is of: none is named by that of a run."""

    kind: NotRequired[str]
    schema: NotRequired[int]
    rows: NotRequired[list[dict[str, Any]]]


class QualityRow(TypedDict):
    """One way to draw."""

    name: str
    solver: str
    steps: int
    guidance_scale: float
    unet_calls: int
    seconds_per_image: float
    distance_to_teacher: float
    attribute_accuracy: float | None
    frechet: float | None
    saturation: float
    pictures: list[str]


class Quality(TypedDict):
    """What `evaluation/quality` found."""

    rows: list[QualityRow]
    n: int
    prompts: list[str]
    base: Base
    frechet_floor: float | None


# -- brand.json ----------------------------------------------------------------------------------------------


class BrandRow(TypedDict):
    """One way to draw, held against the brand."""

    name: str
    sampler: str
    steps: int
    guidance_scale: float
    brand_similarity: Interval | None
    brand_adherence: Interval | None
    control_adherence: Interval | None
    diversity: Interval | None
    pictures: list[str]
    control_pictures: list[str]


class Difference(TypedDict):
    """The adapter less another, on the same prompts and noise."""

    steps: int
    less: str
    brand_similarity: dict[str, float] | None


class Brand(TypedDict):
    """What `evaluation/brand` found."""

    base: Base
    prompts: list[str]
    brand_pictures: list[str | None]
    rows: list[BrandRow]
    differences: list[Difference]
    adherence: NotRequired[str | None]
    confidence: NotRequired[float]
    brand: NotRequired[str | None]
    control_prompts: NotRequired[list[str]]


# -- results.json of a guidance sweep ------------------------------------------------------------------------


class Swept(TypedDict):
    """An adapter of a sweep."""

    name: str
    file: str
    weights: str


class Warned(TypedDict):
    """What is to be said of an adapter."""

    adapter: str
    sentence: str


class Recommended(TypedDict):
    """Settings, or None where none can be recommended."""

    sentence: str
    adapter: str | None
    cell: str | None
    sampler: str | None
    steps: int | None
    guidance_scale: float | None
    lora_weight: float | None
    reasons: list[str]
    warnings: list[Warned]


class TeacherCell(TypedDict):
    """The cell that all others are compared with."""

    sampler: str
    steps: int
    guidance_scale: float
    cell: str


class Cell(TypedDict):
    """One way to draw, measured."""

    id: str
    kind: str
    adapter: str | None
    sampler: str
    steps: int
    guidance_scale: float
    lora_weight: float
    unet_calls: int
    metrics: dict[str, Interval | None]
    pictures: list[str]


class Sweep(TypedDict):
    """What `evaluation/guidance_sweep` found."""

    schema: int
    kind: str
    name: str
    base: Base
    adapters: list[Swept]
    prompts: list[str]
    images_per_prompt: int
    count: int
    seed: int
    resolution: int
    shown: list[int]
    teacher: TeacherCell
    extractor: str
    confidence: float
    metrics: dict[str, dict[str, Any]]
    cells: list[Cell]
    recommended: Recommended
