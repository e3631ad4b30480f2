"""The one shape of what evaluations write (results.json, brand.json), as in `own_shapes`."""

from __future__ import annotations

from typing import Annotated, Any, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from lcm_kit.io.own_shapes import Base, Interval


class Version(TypedDict):
    """What is read first: which version of this shape a file has, and which recipe wrote it."""

    version: NotRequired[int]
    recipe: NotRequired[str]


class Adapter(TypedDict):
    """An adapter that was evaluated."""

    name: str
    file: str
    sha256: str
    weights: str
    layers: int
    fault: str | None


class Settings(TypedDict):
    """The config that it ran with; other keys are the recipe's own."""

    seed: int
    batch_size: int | str  # or "auto"
    confidence: float
    brand: NotRequired[str | None]
    control: NotRequired[str | None]
    cost: NotRequired[dict[str, Any] | None]
    features: NotRequired[str]
    lora_weight: NotRequired[float]
    real: NotRequired[str | None]
    reference_count: NotRequired[int]
    tiling: NotRequired[bool]


class Prompts(TypedDict):
    """A list of prompts: sample i has text i // images_per_prompt and the noise of (seed, i)."""

    texts: list[str]
    images_per_prompt: int
    shown: list[int]


class Metric(TypedDict):
    """What a metric is."""

    label: str
    unit: str
    better: str | None
    help: str


class Cell(TypedDict):
    """One way to draw one list of prompts, measured."""

    id: str
    kind: str
    adapter: str | None
    sampler: str
    steps: int
    guidance_scale: float
    lora_weight: float
    style_weight: NotRequired[float]
    unet_calls: int
    prompts: str
    metrics: dict[str, Interval | None]
    pictures: list[str]


class Comparison(TypedDict):
    """Cell `a` less cell `b` in a metric, on the same resamples of prompts and noise."""

    a: str
    b: str
    metric: str
    difference: float
    low: float
    high: float
    p: float


class Warned(TypedDict):
    """What is to be said of an adapter."""

    adapter: str
    kind: str
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
    style_weight: NotRequired[float]
    reasons: list[str]
    warnings: list[Warned]


class Break(TypedDict):
    """From where guidance hurts."""

    sampler: str
    steps: int
    lora_weight: float
    guidance_scale: float
    sentence: str


class TakenFrom(Base):
    """The base, and what it predicts."""

    prediction_type: str


class ContractRow(TypedDict):
    """What an adapter's trigger brings and costs; None: not measured."""

    cell: str  # its id on the prompts with the trigger
    strength: Interval | None
    leak: Interval | None
    leak_share: Interval | None
    changed: Interval | None
    lost: Interval | None
    lost_elsewhere: Interval | None


class Contract(TypedDict):
    """The trigger contract, a row for each cell with an adapter; `trigger` None: what is forgotten alone."""

    trigger: str | None
    verdict: str | None
    rows: list[ContractRow]


class Results(TypedDict):
    """What an evaluation found; what only some recipes have is not required."""

    version: int
    recipe: str
    name: str
    base: TakenFrom
    adapters: list[Adapter]
    settings: Settings
    resolution: int | Annotated[list[int], Field(min_length=2, max_length=2)]  # `config.resolution.plain`
    adherence: str
    prompts: dict[str, Prompts]
    metrics: dict[str, Metric]
    reference: str
    cells: list[Cell]
    comparisons: list[Comparison]
    verdict: str | None
    recommended: Recommended | None
    machine: dict[str, Any]
    versions: dict[str, str]
    breaks: NotRequired[dict[str, list[Break]]]
    brand_pictures: NotRequired[list[str | None]]
    contract: NotRequired[Contract]
    decoder: NotRequired[str | None]  # its class, name and hash; None: the base's VAE
    seen: NotRequired[str]  # what models that compare pictures see of theirs, where that is not all of them
    brand_own: NotRequired[float | None]  # None: one picture alone
    frechet_floor: NotRequired[float | None]
