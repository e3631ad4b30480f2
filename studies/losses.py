"""What the distance and the choice of t are worth in a short run on tiny-sd (docs/training.md).

    OMP_NUM_THREADS=1 python -m studies.losses               # trains and judges what is not there yet
    OMP_NUM_THREADS=1 python -m studies.losses --table       # the tables, of what there is

`distill/tiny_quick` with half its steps and half its batch, one thing changed at a time, on three seeds:
right attributes and the Frechet distance to real renders at 1, 2 and 4 steps on 256 held-out prompts, from
the same noise, and the processor seconds of training. A seed is finished before the next begins; less than
two minutes of one core a run.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections import defaultdict
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from lcm_kit import assets, bases
from lcm_kit.config import shipped
from lcm_kit.config.load import load
from lcm_kit.config.schema import Distill
from lcm_kit.data import sources
from lcm_kit.evaluation.cells import Cell
from lcm_kit.evaluation.draw import Pipes, Samples, draw_all, repeated
from lcm_kit.evaluation.extract import FeatureExtractor
from lcm_kit.evaluation.metrics.features import PROBE
from lcm_kit.evaluation.metrics.frechet import frechet
from lcm_kit.evaluation.results import QUALITY
from lcm_kit.evaluation.swept_adapters import swept_adapters
from lcm_kit.export.run import export_run
from lcm_kit.lora import verify
from lcm_kit.quiet import quiet
from lcm_kit.share import ALONE
from lcm_kit.tiny import world
from train import distill

FOLDER = Path("runs/losses")
FILE = FOLDER / "results.jsonl"  # a line a run, as they are done
COMMON = [
    "steps=100", "batch_size=8", "data.cache=cache/tiny_quick", "validation.every=0",
    "validation.prompts=null", "validation.control=null",
]  # fmt: skip
FIRST = "huber, c 0.001"  # what the others are held against: the default
VARIANTS = {
    FIRST: [],
    "l2": ["loss.name=l2"],
    "cauchy, c 0.03": ["loss.name=cauchy", "loss.c=0.03"],
    "cauchy, c 0.03, adaptive": ["loss.name=cauchy", "loss.c=0.03", "loss.adaptive=true"],
    "huber, lognormal": ["grid.sampling=lognormal"],
    "huber, shifted by 3": ["grid.sampling=shifted"],
    "huber, interval weight": ["loss.weighting=interval"],
}
SEEDS, STEPS, PROMPTS = (0, 1, 2), (1, 2, 4), 256
Row = dict[str, Any]


def train(variant: str, seed: int) -> tuple[Path, float]:
    """The run of a variant and the processor seconds of its training."""
    run = FOLDER / f"{list(VARIANTS).index(variant)}-{seed}"
    shutil.rmtree(run, ignore_errors=True)  # one that was cut short: its seconds would be of a part
    config = load(
        shipped.find("distill/tiny_quick"), [*COMMON, f"seed={seed}", f"output={run}", *VARIANTS[variant]]
    )
    assert isinstance(config, Distill)
    sources.encode(config)
    started = time.process_time()
    distill.main(config)
    return run, time.process_time() - started


def judge(run: Path) -> dict[str, float]:
    """`right` and `frechet` at each number of steps."""
    base = bases.inspect_base("asset:tiny-sd")
    export_run(run)
    (found,) = swept_adapters([str(run)], verify.base_of(base.path, base.revision, base.variant))
    samples = Samples(repeated(assets.prompts("asset:tiny-sd"), PROMPTS), 1, 0, world.SIZE, 32, 0)
    look = FeatureExtractor.of(QUALITY, samples.prompts, world.SIZE, "cpu", features=PROBE)
    cells = [Cell("student", found.name, "lcm", steps, 1.0) for steps in STEPS]
    pipes = Pipes(base, {found.name: found}, samples)
    drawn = draw_all(cells, run / "study", pipes.get, samples, look, lambda cell: found.weights, ALONE)
    real = look.renders()
    figures = {}
    for cell, rows in drawn.items():
        figures[f"right at {cell.steps}"] = 100 * float(rows["adherence"].mean())
        figures[f"frechet at {cell.steps}"] = frechet(rows["features"], real)
    return figures


def done() -> list[Row]:
    """What was measured."""
    return [json.loads(line) for line in FILE.read_text().splitlines()] if FILE.is_file() else []


def table(rows: list[Row]) -> None:
    """Print means over seeds, and the paired differences to the first variant with their standard errors."""
    by = defaultdict(dict)
    for row in rows:
        by[row["variant"]][row["seed"]] = row
    keys = ["seconds", *(f"{name} at {steps}" for name in ("right", "frechet") for steps in STEPS)]
    for title, told in (("mean", _mean), (f"less {FIRST}", _difference)):
        print(f"\n| {title} | seeds |", *(f"{key} |" for key in keys))
        print("| --- |", *("--- |" for _ in (0, *keys)))
        for variant in VARIANTS:
            if mine := by[variant]:
                cells = (told(mine, by[FIRST], key) for key in keys)
                print(f"| {variant} | {len(mine)} |", *(f"{cell} |" for cell in cells))


def _mean(mine: dict[int, Row], first: dict[int, Row], key: str) -> str:
    return _figure(key, fmean(row[key] for row in mine.values()), "")


def _difference(mine: dict[int, Row], first: dict[int, Row], key: str) -> str:
    """The mean of the differences of a seed each, and the standard error of it where there are several."""
    each = [mine[seed][key] - first[seed][key] for seed in mine if seed in first]
    if not each:
        return "-"
    error = f" ({_figure(key, stdev(each) / len(each) ** 0.5, '')})" if len(each) > 1 else ""
    return _figure(key, fmean(each), "+") + error


def _figure(key: str, value: float, sign: str) -> str:
    digits = 0 if key == "seconds" else 1 if key.startswith("right") else 3
    return f"{value:{sign}.{digits}f}"


def main() -> None:
    """Train and judge what lacks, a line of the file each; then print the tables."""
    quiet()
    FOLDER.mkdir(parents=True, exist_ok=True)
    measured = {(row["variant"], row["seed"]) for row in done()}
    for seed, variant in product(SEEDS, VARIANTS):
        if "--table" in sys.argv or (variant, seed) in measured:
            continue
        run, seconds = train(variant, seed)
        row: Row = {"variant": variant, "seed": seed, "seconds": seconds, **judge(run)}
        with FILE.open("a") as file:
            file.write(json.dumps(row) + "\n")
    table(done())


if __name__ == "__main__":
    main()
