"""Figures of the study of methods from the rows that it keeps: by the kit's table of metrics, with intervals.

A figure of a method is the mean over its seeds. Its error has two parts, which add as squares: of the prompts
(all methods and seeds share them, so what varies with them cancels in differences), by the metric's own
resampling of the seeds' mean; and of the seeds, their standard deviation over the root of their number. The
interval is Student's t, its degrees of freedom by Welch and Satterthwaite: a bootstrap of three seeds would
be a fifth too narrow. Where there is one seed only its prompts speak, and the figure is marked.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, variance
from typing import Any

import torch
from torch import Tensor

from lcm_kit.evaluation import metric_table
from lcm_kit.evaluation.cells import Cell
from lcm_kit.evaluation.kept import Rows
from lcm_kit.evaluation.measure import Drawn, Figure, Ruler
from lcm_kit.evaluation.metrics.bootstrap import Resamples
from lcm_kit.evaluation.metrics.frechet import frechet_jackknife
from lcm_kit.evaluation.metrics.jackknife import Jackknife
from lcm_kit.evaluation.results import QUALITY
from studies.methods_draw import CURVE, GUIDED, MAIN, SPREAD, Studio
from studies.methods_plan import CLOCK, DONE, TEACHER, Plan

CONFIDENCE = 0.95
ROUNDS = 1000
FRECHET = ("frechet_real", "frechet_teacher")
KEYS = (
    "prompt_adherence", "object_accuracy", "colour_accuracy", "pattern_accuracy", *FRECHET, "kernel_real",
    "kernel_teacher", "feature_distance", "saturation", "clipped", "sharpness",
)  # fmt: skip
SHARES = ("prompt_adherence", "object_accuracy", "colour_accuracy", "pattern_accuracy", "obeyed", "unsaid")


@dataclass(frozen=True)
class Known:
    """A figure and what it is in every resample of prompts, or without each group of them."""

    value: float
    resampled: Tensor | None = None  # [rounds]
    left_out: Jackknife | None = None

    @property
    def error(self) -> float:
        """Its standard error over prompts."""
        if self.left_out is not None:
            return self.left_out.error
        if self.resampled is None:
            return 0.0
        # rounds in which the statistic is not defined (one prompt again and again) are left out
        return float(self.resampled[~self.resampled.isnan()].std())

    @property
    def freedom(self) -> float:
        """Degrees of freedom of that error."""
        return len(self.left_out.left) - 1 if self.left_out is not None else 1e9

    def minus(self, other: Known) -> Known:
        """The difference on the same resamples: paired by prompt."""
        a, b, jack = self.resampled, other.resampled, None
        if self.left_out is not None and other.left_out is not None:
            jack = self.left_out.minus(other.left_out)
        return Known(self.value - other.value, None if a is None or b is None else a - b, jack)


def mean_of(found: Sequence[Known]) -> Known:
    """The mean over seeds, resample by resample."""
    parts = [each.resampled for each in found]
    jacks = [each.left_out for each in found]
    return Known(
        mean(each.value for each in found),
        None if any(part is None for part in parts) else torch.stack(parts).mean(0),  # type: ignore[arg-type]
        Jackknife(
            mean(each.whole for each in jacks if each), torch.stack([j.left for j in jacks if j]).mean(0),
            jacks[0].shares,
        ) if all(jacks) and jacks[0] else None,
    )  # fmt: skip


def interval(found: Sequence[Known]) -> tuple[float, float, float]:
    """Mean over seeds and its interval, as the module says."""
    from scipy.stats import t

    both = mean_of(found)
    parts = [(both.error**2, both.freedom)]
    if len(found) > 1:
        parts.append((variance(each.value for each in found) / len(found), len(found) - 1))
    total = sum(square for square, _ in parts)
    if total == 0 or not math.isfinite(total):
        return both.value, both.value, both.value
    freedom = total**2 / sum(square**2 / n for square, n in parts)
    half = float(t.ppf((1 + CONFIDENCE) / 2, freedom)) * total**0.5
    return both.value, both.value - half, both.value + half


@dataclass(frozen=True)
class Measured:
    """What one training of an entry (or the teacher) draws at one number of steps, at one of its states."""

    entry: str
    seed: int
    step: int  # optimizer steps done
    samples: int  # pictures seen
    seconds: float  # of one core, for training so far
    steps: int  # of the sampler
    sampler: str
    guidance: float
    final: bool  # False: the curve, on its prompts
    prompts: int
    figures: Mapping[str, Known]


@dataclass(frozen=True)
class Cost:
    """What a training costs."""

    seconds_a_step: float
    peak_mib: float
    steps: int
    samples_a_step: int


@dataclass(frozen=True)
class Study:
    """All that tables are made of."""

    rows: list[Measured]
    costs: Mapping[tuple[str, int], Cost] = field(default_factory=dict)  # by entry and seed
    bounds: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # the teacher's, 95%

    def final(self, entry: str, steps: int | None = None) -> list[Measured]:
        """What the entry's trainings end as, by seed; `steps` None: at any."""
        return [r for r in self.rows if r.entry == entry and r.final and steps in (None, r.steps)]

    def curve(self, entry: str, steps: int) -> dict[int, list[Measured]]:
        """Its states by optimizer steps done, on the curve's prompts, a row a seed."""
        mine = [r for r in self.rows if r.entry == entry and not r.final and r.steps == steps]
        return {step: [r for r in mine if r.step == step] for step in sorted({r.step for r in mine})}

    @property
    def teacher(self) -> Mapping[str, Known]:
        """Its figures."""
        return self.final(TEACHER)[0].figures


# -- Rows into figures ---------------------------------------------------------------------------------------


def figures(cell: Cell, rows: Rows, ruler: Ruler) -> dict[str, Known]:
    """The metrics of `KEYS` that the cell has, as the table of metrics has them."""
    drawn = Drawn(cell, rows, ruler)
    table = metric_table.metrics_of(QUALITY)
    found: dict[str, Known] = {}
    for key in KEYS:
        figure = table[key].measure(drawn)
        if figure is None or not math.isfinite(figure.value):
            continue
        jack = None
        if key in FRECHET:
            real = key == "frechet_real"
            other = ruler.real if real else ruler.reference["features"]
            assert other is not None
            jack = frechet_jackknife(rows["features"], other, 1, paired=not real)
        found[key] = Known(figure.value, figure.resampled, jack)
    return found


def first(rows: Rows, count: int) -> Rows:
    """The first samples' rows; without pictures, of which few are kept."""
    return {name: value[:count] for name, value in rows.items() if name != "pictures"}


def known(figure: Figure) -> Known:
    """A figure of the kit's without a jackknife."""
    return Known(figure.value, figure.resampled)


def seconds_a_step(lines: Sequence[Mapping[str, Any]]) -> float:
    """Processor seconds an optimizer step, from a training's clock.

    Between the first and the last state of each process: what it takes to start is left out. Raises
    `ValueError` where no process wrote two states.
    """
    spent, done = 0.0, 0
    for process in dict.fromkeys(line["process"] for line in lines):
        mine = [line for line in lines if line["process"] == process]
        spent += mine[-1]["seconds"] - mine[0]["seconds"]
        done += mine[-1]["step"] - mine[0]["step"]
    if done <= 0:
        raise ValueError("no process of this training wrote two states, so its speed is not known")
    return float(spent / done)


class _Rulers:
    """The teacher's rows, and what all others are measured with, by set."""

    def __init__(self, studio: Studio) -> None:
        plan, self.studio, self.cell = studio.plan, studio, studio.teacher()
        self.main = studio.rows(MAIN, self.cell)
        self.real = studio.look.renders()
        self.whole = self._ruler(self.main, self.real)
        self.curve = self._ruler(first(self.main, plan.curve.prompts), self.real)
        few = first(self.main, plan.guidance_prompts)
        scales = {scale: studio.rows(GUIDED, studio.teacher(scale)) for scale in plan.teacher.guidances
                  if scale != plan.teacher.guidance}  # fmt: skip
        scales[plan.teacher.guidance] = few
        self.guided = self._ruler(few, None, {scale: scales[scale] for scale in sorted(scales)})
        self.spread = studio.rows(SPREAD, self.cell)
        images = plan.diversity.images
        resamples = Resamples.draw(plan.diversity.prompts, images, ROUNDS, 0)
        self.spreads = Ruler(resamples, self.spread, CONFIDENCE)

    @staticmethod
    def _ruler(rows: Rows, real: Tensor | None, teachers: Mapping[float, Rows] | None = None) -> Ruler:
        resamples = Resamples.draw(len(rows["latents"]), 1, ROUNDS, 0)
        return Ruler(resamples, rows, CONFIDENCE, teachers=teachers or {}, real=real)

    def diversity(self, cell: Cell, rows: Rows) -> Known:
        """Over the teacher's, on the same prompts and noise."""
        measure = metric_table.METRICS["diversity"].measure
        mine = measure(Drawn(cell, rows, self.spreads))
        other = measure(Drawn(self.cell, self.spread, self.spreads))
        assert mine is not None and other is not None
        assert mine.resampled is not None and other.resampled is not None
        return Known(mine.value / other.value, mine.resampled / other.resampled)

    def guidance(self, cell: Cell, rows: Rows) -> dict[str, Known]:
        """The effective guidance, and how far from the teacher's line."""
        drawn = Drawn(cell, first(rows, self.studio.plan.guidance_prompts), self.guided)
        found = {}
        for key in ("effective_guidance", "guidance_misfit"):
            if (figure := metric_table.METRICS[key].measure(drawn)) is not None:
                found[key] = known(figure)
        return found

    def negative(self, cell: Cell) -> dict[str, Known]:
        """`unsaid`: share of grey grounds where no colour is asked for; `obeyed`: of those the share that is
        not grey with `grey` as the negative prompt; `object_kept`: right objects with it.
        """
        rows = self.studio.negative_rows(cell)
        resamples = Resamples.draw(len(rows["plain"]), 1, ROUNDS, 0)
        ruler = Ruler(resamples, rows, CONFIDENCE)
        drawn = Drawn(cell, rows, ruler)
        gone = rows["plain"] * (1 - rows["negative"])
        found = {
            "unsaid": drawn.mean(rows["plain"]), "object_kept": drawn.mean(rows["object_negative"]),
            "obeyed": drawn.ratio(gone, rows["plain"]) if rows["plain"].sum() else None,
        }  # fmt: skip
        return {key: known(figure) for key, figure in found.items() if figure is not None}

    def final(self, cell: Cell, rows: Rows) -> dict[str, Known]:
        """Everything of what a training ends as."""
        found = figures(cell, rows, self.whole)
        found["diversity"] = self.diversity(cell, self.studio.rows(SPREAD, cell))
        found |= self.guidance(cell, rows)
        return found | (self.negative(cell) if cell.guidance_scale > 1 else {})


def _bounds(rulers: _Rulers) -> dict[str, tuple[float, float]]:
    """The teacher's interval of each metric: the error of its own prompts, in ratios to itself too."""
    teacher = Drawn(rulers.cell, rulers.main, rulers.whole)
    found = {
        key: interval([each])[1:] for key, each in figures(rulers.cell, rulers.main, rulers.whole).items()
    }
    for key, column in (("saturation", "chroma"), ("sharpness", "sharpness")):
        figure = teacher.mean(rulers.main[column])
        assert figure is not None and figure.resampled is not None
        found[key] = interval([Known(1.0, figure.resampled / figure.value)])[1:]
    spread = metric_table.METRICS["diversity"].measure(Drawn(rulers.cell, rulers.spread, rulers.spreads))
    assert spread is not None and spread.resampled is not None
    found["diversity"] = interval([Known(1.0, spread.resampled / spread.value)])[1:]
    return found


def measured(plan: Plan, output: Path) -> Study:
    """Measure all cells that are done. What is not drawn yet of the teacher is drawn first."""
    studio = Studio(plan, output)
    rulers = _Rulers(studio)
    wanted = plan.teacher
    rows = [Measured(TEACHER, 0, 0, 0, 0.0, wanted.steps, "ddim", wanted.guidance, True, plan.prompts,
                     rulers.final(rulers.cell, rulers.main))]  # fmt: skip
    costs: dict[tuple[str, int], Cost] = {}
    done = {(n, s): output / f"{n}-{s}" for n in plan.entries for s in plan.seeds
            if (output / f"{n}-{s}" / DONE).is_file()}  # fmt: skip
    for (name, seed), folder in done.items():
        entry, about = plan.entries[name], json.loads((folder / DONE).read_text())
        source = output / f"{entry.drawn_from or name}-{seed}"
        clock = [json.loads(line) for line in (source / CLOCK).read_text().splitlines()]
        pace, last = seconds_a_step(clock), about["states"][-1]
        costs[name, seed] = Cost(pace, max(line["peak_mib"] for line in clock), last, about["batch"])
        before = costs.get((entry.start, seed)) if entry.start else None
        seconds, seen = (before.seconds_a_step * before.steps, before.samples_a_step * before.steps) \
            if before else (0.0, 0)  # fmt: skip
        for step in about["states"]:
            state = source / "run" / "state" / f"step-{step:06d}"
            subject = studio.subject(folder, source / "run", state)
            for cell in studio.students(subject, entry):
                at = (name, seed, step, seen + step * about["batch"], seconds + step * pace, cell.steps,
                      cell.sampler, cell.guidance_scale)  # fmt: skip
                if step == last:
                    whole = studio.rows(MAIN, cell)
                    rows.append(Measured(*at, True, plan.prompts, rulers.final(cell, whole)))
                    few = first(whole, plan.curve.prompts)
                elif cell.steps in plan.curve.steps:
                    few = studio.rows(CURVE, cell)
                if cell.steps in plan.curve.steps:
                    found = figures(cell, few, rulers.curve)
                    rows.append(Measured(*at, False, plan.curve.prompts, found))
    return Study(rows, costs, _bounds(rulers))
