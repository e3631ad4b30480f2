"""Is the student as good as the teacher, and better than plain solvers at equal cost?

    lcm-kit evaluate configs/evaluation/quality.yaml
    lcm-kit evaluate configs/evaluation/tiny_base.yaml     # a base alone
    accelerate launch --num_processes 4 -m lcm_kit evaluate configs/evaluation/quality.yaml

The same prompts are drawn from the same noise by the teacher (the base, many steps, guidance), by the base
under plain solvers at each budget of UNet calls (with guidance, at half the steps, and without), and by the
student at each number of steps. All of it is plain diffusers with the exported file: what users run. Writes
`results.json` and `pictures/` into the run's folder. Samples are kept in `evaluation/`, so that a second
evaluation with the same inputs only measures again. Copy this file and change it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lcm_kit import __version__, assets, families, lora_file, own_files, processes, sample
from lcm_kit.adapter import base_of, read_facts
from lcm_kit.config.evaluation import Quality
from lcm_kit.console import BarColumn, Progress, TimeElapsedColumn, TimeRemainingColumn, Words
from lcm_kit.errors import UserError
from lcm_kit.files import atomic_folder, sha256_bytes, sha256_file
from lcm_kit.locks import alone
from lcm_kit.methods import DEFAULT, MethodInfo
from lcm_kit.metrics.distance import distance_to_teacher
from lcm_kit.metrics.judge import ABSENT, FLOOR_SEED, REFERENCE_SEED, judge_for
from lcm_kit.metrics.saturation import saturation
from lcm_kit.results import Rows, kept, show
from lcm_kit.run_files import config_of
from lcm_kit.share import Share

LIBRARIES = ("torch", "diffusers", "peft", "transformers")


class Row(NamedTuple):
    """One way to draw all prompts."""

    name: str  # teacher, base or student
    solver: str
    steps: int
    guidance_scale: float

    @property
    def unet_calls(self) -> int:
        """UNet passes for one image."""
        return sample.unet_calls(self.steps, self.guidance_scale)

    @property
    def slug(self) -> str:
        """The row as a file name."""
        return f"{self.name}-{self.solver}-{self.steps}-g{self.guidance_scale:g}"


def plan(config: Quality, method: MethodInfo = DEFAULT) -> list[Row]:
    """The teacher first, then plain solvers by budget (guidance needs an even one), then any student.

    `method`: what made the student, which says how it draws.
    """
    rows = [Row("teacher", "ddim", config.teacher_steps, config.guidance_scale)]
    for calls in config.unet_calls:
        for solver in config.solvers:
            if calls % 2 == 0 and config.guidance_scale > 1:
                rows.append(Row("base", solver, calls // 2, config.guidance_scale))
            rows.append(Row("base", solver, calls, 1.0))
    steps = method.judged_steps if config.student_steps is None else config.student_steps
    return rows + [Row("student", method.sampler, n, 1.0) for n in (() if config.base else steps)]


def draw(
    pipe: Any,
    row: Row,
    prompts: Sequence[str],
    config: Quality,
    size: int,
    share: Share,
    advance: Callable[[int], None],
) -> list[Rows]:
    """This process's batches: `images` [B, 3, H, W], 8 bits, and `seconds` [B] each: text, UNet and VAE."""
    tables = []
    for first in share.of(range(0, len(prompts), config.batch_size)):
        batch = prompts[first : first + config.batch_size]
        start = time.perf_counter()
        pixels = sample.sample(
            pipe, batch, sampler=row.solver, steps=row.steps, guidance_scale=row.guidance_scale,
            seed=config.seed, first=first, size=size,
        )  # fmt: skip
        seconds = torch.full((len(batch),), (time.perf_counter() - start) / len(batch), dtype=torch.float64)
        tables.append({"images": ((pixels + 1) * 127.5).round().to(torch.uint8), "seconds": seconds})
        advance(row.unet_calls * len(batch))
    return tables


def to_pixels(images: Tensor) -> Tensor:
    """8-bit [N, 3, H, W] as pixels in [-1, 1], float32."""
    return images / 127.5 - 1


@alone("evaluation/quality", lambda config: config.run)
def main(config: Quality) -> Path:
    """Evaluate a run; returns the path of its `results.json`."""
    # -- Parts: the run, its base, its exported file ---------------------------------------------------------
    run, share = Path(config.run), processes.share()
    if config.base is not None:
        base = families.inspect_base(config.base)
        size, adapter, method = base.sample_size * base.factor, None, DEFAULT
    elif not (run / "config.yaml").is_file():
        raise UserError(f"run {config.run!r} is not a run's folder (no config.yaml); train it first")
    else:
        size = int(config_of(run)["data"]["resolution"])
        facts = read_facts(run / "adapter")
        base, method = families.inspect_base(**base_of(facts)), facts.student
        adapter = lora_file.adapter_file(run)
    adapter_hash = sha256_file(adapter) if adapter else None

    # -- Prompts, rows and the judge -------------------------------------------------------------------------
    prompts = list(islice(cycle(assets.prompts(config.prompts)), config.count))
    rows = plan(config, method)
    judge = judge_for(prompts, size, config.reference_count)
    versions = {"lcm_kit": __version__, **{name: version(name) for name in LIBRARIES}}

    # -- Draw: the base's rows first, then with the adapter on -----------------------------------------------
    inputs = [base.base_hash, prompts, config.seed, size, versions]
    pipes: dict[bool, Any] = {}  # by whether the adapter is on; opened only if there is something to draw

    def pipe(adapted: bool) -> Any:
        if adapted not in pipes:
            pipes.clear()
            pipes[adapted] = sample.pipeline(
                base.path, revision=base.revision, variant=base.variant, **sample.placement()
            )
            if adapted and adapter:
                sample.load_adapter(pipes[adapted], adapter, config.lora_weight)
            sample.sample(
                pipes[adapted], prompts[:1], sampler="ddim", steps=1, size=size
            )  # warm up the clock
        return pipes[adapted]

    drawn: list[Rows] = []
    total = 0  # UNet calls
    columns = (Words("{task.description:<32}"), BarColumn(), TimeElapsedColumn(), Words("left"))
    with Progress(*columns, TimeRemainingColumn(), disable=not share.first) as bar:
        task = bar.add_task("", total=sum(row.unet_calls for row in rows) * len(prompts))
        for row in rows:
            label = f"{row.name} {row.solver}, {row.unet_calls} UNet calls"
            bar.update(task, description=label, completed=total)
            own = [adapter_hash, config.lora_weight] if row.name == "student" else []
            key = sha256_bytes(json.dumps([inputs, row, own]).encode())[:12]

            def make(row: Row = row) -> list[Rows]:
                advance = partial(bar.advance, task)
                return draw(pipe(row.name == "student"), row, prompts, config, size, share, advance)

            drawn.append(kept(run / "evaluation" / f"{row.slug}-{key}.safetensors", make, share))
            total += row.unet_calls * len(prompts)
        bar.update(task, completed=total)
    if not share.first:
        return run / "results.json"

    # -- Measure ---------------------------------------------------------------------------------------------
    teacher = to_pixels(drawn[0]["images"])
    measured: list[dict[str, Any]] = []
    for row, table in zip(rows, drawn, strict=True):
        pixels, seconds = to_pixels(table["images"]), float(table["seconds"].mean())
        figures = {"distance_to_teacher": distance_to_teacher(pixels, teacher), **saturation(pixels, teacher)}
        pictures = [f"pictures/{row.slug}-{i:03d}.png" for i in range(min(config.pictures, len(prompts)))]
        measured.append(
            {**row._asdict(), "unet_calls": row.unet_calls, "seconds_per_image": seconds, **figures,
             **(judge(pixels) if judge else ABSENT), "pictures": pictures}
        )  # fmt: skip

    # -- Write -----------------------------------------------------------------------------------------------
    with atomic_folder(run / "pictures") as folder:
        for result, table in zip(measured, drawn, strict=True):
            names = result["pictures"]
            images = to_pixels(table["images"][: len(names)])
            for name, picture in zip(names, sample.to_pil(images), strict=True):
                picture.save(folder / Path(name).name, optimize=True)
    results = {
        "rows": measured,
        "n": len(prompts),
        "frechet_floor": judge.floor if judge else None,
        "reference_count": config.reference_count if judge else None,
        "lora_weight": config.lora_weight,
        "batch_size": config.batch_size,
        "resolution": size,
        "base": {"path": base.path, "revision": base.revision, "hash": base.base_hash},
        "adapter": {"file": lora_file.ADAPTER_FILE, "sha256": adapter_hash} if adapter else None,
        "seeds": {"noise": config.seed, "reference": REFERENCE_SEED, "floor": FLOOR_SEED},
        "versions": versions,
        "machine": {"device": sample.placement()["device"], "threads": torch.get_num_threads()},
        "prompts": prompts,
    }
    own_files.write_json(run / "results.json", results)
    show(measured)
    return run / "results.json"
