"""The one place that reads results: a file of this version or a sentence, and accessors of what is in it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from typing_extensions import TypedDict

from lcm_kit.errors import UserError
from lcm_kit.evaluation.result_shapes import (
    Cell,
    Comparison,
    ContractRow,
    Metric,
    Prompts,
    Results,
    Version,
)
from lcm_kit.io import own_files
from lcm_kit.io.own_shapes import Interval

VERSION = 2  # of the shape in `result_shapes`; 1 were files of three shapes
FILE = "results.json"  # in the folder of a run, of a sweep, of a pair
BRAND_FILE = "brand.json"  # beside a run's results.json
QUALITY, BRAND, SWEEP, COMPOSE = (
    f"evaluation/{name}" for name in ("quality", "brand", "guidance_sweep", "compose")
)
MAIN, CONTROL = "main", "control"  # lists of prompts
BARE = "bare"  # another: those of `MAIN`, without the trigger
CONTROL_ID = "control-"  # begins the id of a cell that draws the control prompts; so do others' with theirs


# -- Files ---------------------------------------------------------------------------------------------------


def read(file: Path) -> Results:
    """What the evaluation found that wrote `file`.

    Raises `UserError` if it is damaged, or of another version.
    """
    again = "evaluate again, which keeps what it drew"
    found = own_files.read_json(file, Version, again).get("version")
    if found != VERSION:
        which = "names no version" if found is None else f"has version {found}"
        raise UserError(f"{file} {which} of results, and this lcm-kit reads {VERSION}; {again}")
    return own_files.read_json(file, Results, again)


def decoded(results: Results) -> str | None:
    """What is said of pictures that another decoder decoded; None where the base's VAE did, whole."""
    if name := results.get("decoder"):
        previews = "" if name.startswith("ConsistencyDecoderVAE ") else "previews, "
        return f"{previews}decoded by {name} and not by the base's VAE"
    if results["settings"].get("tiling"):
        return "decoded in tiles, which is not exact"
    return None


def of_run(run: Path) -> Results | None:
    """What `evaluation/quality` found for `run`; None if it did not run, or another evaluation did."""
    return _of(run / FILE, QUALITY)


def of_brand(run: Path) -> Results | None:
    """What `evaluation/brand` found for `run`; None if it did not run, or there is no adapter in it."""
    found = _of(run / BRAND_FILE, BRAND)
    return found if found and compares_brand(found) else None


def of_sweep(folder: Path) -> Results | None:
    """What a guidance sweep found; None if there is no results.json. Raises `UserError` for another's."""
    file = folder / FILE
    if not file.is_file():
        return None
    found = read(file)
    if found["recipe"] != SWEEP:
        raise UserError(f"{file} is of {found['recipe']}, not a guidance sweep's; name a sweep's folder")
    return found


def is_sweep(folder: Path) -> bool:
    """Whether the folder's results.json is a guidance sweep's. Raises `UserError` if it cannot be read."""
    return _of(folder / FILE, SWEEP) is not None


def _of(file: Path, recipe: str) -> Results | None:
    if not file.is_file():
        return None
    found = read(file)
    return found if found["recipe"] == recipe else None


# -- What is in them -----------------------------------------------------------------------------------------


def cells_of(cells: Iterable[Cell], kind: str, adapter: bool | None = None, of: str = MAIN) -> list[Cell]:
    """Those of one kind on one list of prompts; `adapter`: only with one, or only without."""
    return [
        cell
        for cell in cells
        if (cell["kind"], cell["prompts"]) == (kind, of)
        and (adapter is None or adapter == (cell["adapter"] is not None))
    ]


def by_id(results: Results, name: str | None) -> Cell | None:
    """The cell of that id."""
    return next((cell for cell in results["cells"] if cell["id"] == name), None)


def reference(results: Results) -> Cell:
    """The teacher's cell that others are compared with."""
    found = by_id(results, results["reference"])
    if found is None:
        raise UserError(f"results of {results['name']} lack the cell {results['reference']}; evaluate again")
    return found


def figure(cell: Cell, metric: str) -> Interval | None:
    """A metric of a cell with its interval; None where it was not measured."""
    return cell["metrics"].get(metric)


def value(cell: Cell, metric: str) -> float | None:
    """A metric of a cell; None where it was not measured."""
    found = figure(cell, metric)
    return None if found is None else found["value"]


def prompts(results: Results, of: str = MAIN) -> Prompts:
    """A list of prompts; an empty one where there is none of that name."""
    return results["prompts"].get(of) or {"texts": [], "images_per_prompt": 1, "shown": []}


def prompt_of(results: Results, sample: int, of: str = MAIN) -> str:
    """The prompt of a sample."""
    asked = prompts(results, of)
    return asked["texts"][sample // asked["images_per_prompt"]]


def count(results: Results, of: str = MAIN) -> int:
    """Samples a cell."""
    asked = prompts(results, of)
    return len(asked["texts"]) * asked["images_per_prompt"]


def contract_row(results: Results, cell: str) -> ContractRow | None:
    """What the trigger contract says of the cell of that id; None where it was not measured."""
    contract = results.get("contract")
    rows = contract["rows"] if contract else []
    return next((row for row in rows if row["cell"] == cell), None)


def difference(results: Results, a: str, b: str, metric: str) -> Comparison | None:
    """Cell `a` less cell `b` in a metric; None where they were not compared in it."""
    wanted = (a, b, metric)
    found = (each for each in results["comparisons"] if (each["a"], each["b"], each["metric"]) == wanted)
    return next(found, None)


def best_plain(
    cells: Iterable[Cell], calls: int, by: Sequence[str], about: Mapping[str, Metric]
) -> Cell | None:
    """The base's best cell without an adapter at this number of UNet calls, by the first of the metrics `by`,
    then by the next; None if none ran. `about`: the results' own word on which way is better.
    """
    higher = {key for key, each in about.items() if each["better"] == "higher"}

    def rank(cell: Cell) -> tuple[float, ...]:
        values = ((value(cell, key), -1 if key in higher else 1) for key in by)
        return tuple(float("inf") if found is None else sign * found for found, sign in values)

    found = (cell for cell in cells_of(cells, "plain") if cell["unet_calls"] == calls)
    return min(found, key=rank, default=None)


# -- evaluation/brand: each way to draw on both lists --------------------------------------------------------


class BrandRow(TypedDict):
    """One way to draw, with its figures on the prompts of the style and on the control prompts."""

    id: str
    name: Literal["base", "styled", "adapter"]
    sampler: str
    steps: int
    guidance_scale: float
    unet_calls: int
    brand_similarity: Interval | None
    in_style: Interval | None  # share of prompts
    brand_adherence: Interval | None
    control_adherence: Interval | None
    diversity: Interval | None
    distance: Interval | None  # kernel distance to the styled teacher's pictures
    sharpness: Interval | None
    pictures: list[str]
    control_pictures: list[str]


def compares_brand(results: Results) -> bool:
    """Whether it has both the base and an adapter to hold against it."""
    return {"base", "adapter"} <= {row["name"] for row in brand_rows(results)}


def brand_rows(results: Results) -> list[BrandRow]:
    """A row for each cell on the prompts of the style, joined with that of the same settings on the control
    prompts: the base, the styled teacher if there is one, then the adapter by steps.
    """
    return [
        _brand_row(cell, by_id(results, CONTROL_ID + cell["id"]))
        for cell in results["cells"]
        if cell["prompts"] == MAIN
    ]


def _brand_row(cell: Cell, control: Cell | None) -> BrandRow:
    return {
        "id": cell["id"],
        "name": "adapter" if cell["kind"] == "student" else "styled" if cell["adapter"] else "base",
        "sampler": cell["sampler"], "steps": cell["steps"], "guidance_scale": cell["guidance_scale"],
        "unet_calls": cell["unet_calls"],
        "brand_similarity": figure(cell, "brand_similarity"), "in_style": figure(cell, "in_style"),
        "brand_adherence": figure(cell, "prompt_adherence"),
        "control_adherence": None if control is None else figure(control, "prompt_adherence"),
        "diversity": figure(cell, "diversity"), "distance": figure(cell, "kernel_teacher"),
        "sharpness": figure(cell, "sharpness"),
        "pictures": cell["pictures"], "control_pictures": [] if control is None else control["pictures"],
    }  # fmt: skip
