"""The shapes of the kit's own JSON files, as `own_files.read_json` holds them against: what readers count on.

Files may say more; docs/contract.md has all of it. A key that is not `Required` was not always written.
"""

from __future__ import annotations

from typing import (
    Annotated,
    Any,
    Literal,
    NotRequired,  # typing's own, until Python 3.12, is not pydantic's
)

from pydantic import AfterValidator
from typing_extensions import TypedDict


def _of_a_step(line: dict[str, float]) -> dict[str, float]:
    if "step" not in line:
        raise ValueError("it has no step")
    return line


Line = Annotated[dict[str, float], AfterValidator(_of_a_step)]
"""Of metrics.jsonl: a step's figures by name, and `step`."""


class Interval(TypedDict):
    """A figure with its interval."""

    value: float
    low: float
    high: float


class Base(TypedDict):
    """Which base, and the hash of all of it."""

    path: str
    hash: str
    revision: NotRequired[str | None]
    variant: NotRequired[str | None]


class File(TypedDict):
    """A file by its hash."""

    sha256: str


# -- state/step-NNNNNN/manifest.json -------------------------------------------------------------------------


class State(TypedDict):
    """What a training state is of, and its files."""

    step: int
    unet: str
    data: str
    teacher: list[str]
    batch: int
    world: int
    files: dict[str, File]
    base: NotRequired[str]
    config: NotRequired[dict[str, Any]]  # by dotted key: what may not change
    lines: NotRequired[int]  # of metrics.jsonl


# -- cache/manifest.json -------------------------------------------------------------------------------------


class Shard(TypedDict):
    """A file of rows."""

    file: str
    content: str
    rows: int
    size: NotRequired[list[int]]  # width, height in pixels; without: the square of data.resolution


class Skipped(TypedDict):
    """A record that was left out."""

    id: str
    reason: str


class Record(TypedDict):
    """A row."""

    id: str
    caption: str
    image: str
    text: str
    mirrored: bool
    size: NotRequired[list[int]]
    crop: NotRequired[str]
    weights: NotRequired[str]
    captions: NotRequired[list[list[Any]]]  # several, each with its weight
    repeats: NotRequired[int]


class Rights(TypedDict):
    """What metadata says of the pictures: of how many it says what."""

    pictures: int  # all of them
    licenses: dict[str, int]
    source: int
    consent: int
    refused: int  # that there is no consent
    author: int


class Cache(TypedDict):
    """What a cache holds."""

    settings: dict[str, Any]
    shards: list[Shard]
    skipped: list[Skipped]
    records: list[Record]
    rights: NotRequired[Rights]  # where metadata says any


class Lost(TypedDict):
    """What encoding took from pictures: `data.lost.Lost`. Lists of [id, number], the largest first."""

    shapes: list[list[int]]  # [width, height, pictures]
    cropped: int
    most_cropped: list[list[Any]]
    enlarged: int
    most_enlarged: list[list[Any]]
    worst: list[list[Any]]
    cut_captions: int
    longest: list[list[Any]]
    room: int


class Part(TypedDict):
    """What a source shard became: part.json of a cache of a stream."""

    source: str
    identity: str  # of the source shard when it was read
    made_by: str  # hash of the settings
    rows: int
    runs: list[list[Any]]  # [rows, [width, height]], in order; [] is the square of data.resolution
    shards: list[Shard]
    skipped: int
    pictures: int
    rights: NotRequired[Rights]  # what metadata says of them, if anything
    several: bool  # whether a row has several captions
    weighted: bool  # whether a row has a mask
    lost: NotRequired[Lost]


class PartRecords(TypedDict):
    """The rows of a part: records.json beside it."""

    records: list[Record]
    skipped: list[Skipped]


class Parts(TypedDict):
    """What a cache of a stream holds: parts.json."""

    settings: dict[str, Any]
    parts: list[Part]


class VaePrecision(TypedDict):
    """In which precision a VAE, by its hash, encodes the rows of a cache: vae.json beside the manifest."""

    vae: str
    precision: Literal["float16", "bfloat16"]


# -- <cache>-prior/pictures/drawn.json -----------------------------------------------------------------------


class Prior(TypedDict):
    """What the base's own pictures were drawn from."""

    base: str
    prompts: list[str]
    steps: int
    guidance_scale: float
    seed: int
    resolution: int
    resolutions: NotRequired[list[int | list[int]]]


# -- export/verified.json ------------------------------------------------------------------------------------


class Row(TypedDict):
    """What an app makes of a file."""

    modules: int
    loaded: int
    verdict: str
    output_error: float | None


class Exported(TypedDict):
    """A file that was checked."""

    format: str
    sha256: str
    apps: dict[str, Row]
    weights: NotRequired[str]  # what it was made from: `own_files.hash_of_tensors` of the run's LoRA


class Verified(TypedDict):
    """The proof beside the files, by name."""

    files: dict[str, Exported]


# -- reconstruction/reconstruction.json ----------------------------------------------------------------------


class ReconstructedPicture(TypedDict):
    """What the base's VAE made of a picture (`data/reconstruction.py`)."""

    id: str
    psnr: float
    moved: float
    ink: str
    becomes: str
    lost: float


class Reconstructed(TypedDict):
    """What it made of a folder's, the worst first; `of`: how many there are in all."""

    of: int
    resolution: int
    pictures: list[ReconstructedPicture]
