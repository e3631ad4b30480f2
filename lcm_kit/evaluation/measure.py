"""What figures are made of: values with their resamples, and what all cells are held against."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypedDict

import torch
from torch import Tensor

from lcm_kit.config.sweep import Cost
from lcm_kit.evaluation.cells import Cell
from lcm_kit.evaluation.kept import Rows
from lcm_kit.evaluation.metrics import effective_guidance
from lcm_kit.evaluation.metrics.bootstrap import Resamples, percentiles, two_sided_p
from lcm_kit.evaluation.metrics.distance import rms


@dataclass(frozen=True)
class Figure:
    """A metric of a cell: its value, and what it is in every resample, [rounds] (None: only the value)."""

    value: float
    resampled: Tensor | None = None
    bounds: tuple[float, float] | None = None  # of the interval, where it does not follow from `resampled`

    def interval(self, confidence: float) -> tuple[float, float]:
        """Its ends: percentiles of the resamples."""
        if self.bounds is not None:
            return self.bounds
        if self.resampled is None:
            return self.value, self.value
        return percentiles(self.resampled, confidence)


Figures = dict[str, Figure]


@dataclass(frozen=True)
class Ruler:
    """What all cells are measured with; what is None is not measured against."""

    resamples: Resamples
    reference: Rows  # of the teacher that is compared with
    confidence: float
    teachers: Mapping[float, Rows] = field(default_factory=dict)  # by guidance_scale, rising
    real: Tensor | None = None  # features [M, F] of real pictures
    brand: tuple[Tensor, Tensor] | None = None  # features of the brand's and the control's pictures
    # features [N, F] of what the base without an adapter draws, and of what it draws from other noise
    unstyled: Tensor | None = None
    renoised: Tensor | None = None
    cost: Cost | None = None


@dataclass(frozen=True)
class Drawn:
    """What a metric is measured of: a cell's rows, a row a sample, beside the ruler."""

    cell: Cell
    rows: Rows
    ruler: Ruler

    @property
    def is_reference(self) -> bool:
        """Whether this is the teacher that others are compared with."""
        return self.rows is self.ruler.reference

    def mean(self, values: Tensor | None) -> Figure | None:
        """The mean of values [N], a sample each, with its resamples; None of None."""
        if values is None:
            return None
        values = values.double()
        return Figure(float(values.mean()), values[self.ruler.resamples.index].mean(1))

    def ratio(self, values: Tensor, of: Tensor) -> Figure:
        """The mean of `values` [N] over that of `of` [N], on the same resamples; over 0 it is no number."""
        a, b = values.double(), of.double()
        index = self.ruler.resamples.index
        return Figure(float(a.mean() / b.mean()), a[index].mean(1) / b[index].mean(1))

    def over_teacher(self, column: str) -> Figure:
        """The mean of a column over that of the reference."""
        return self.ratio(self.rows[column], self.ruler.reference[column])

    @cached_property
    def guidance(self) -> effective_guidance.Nearest | None:
        """Where between the teacher's guidance_scales a cell of another kind lies; None of one scale."""
        teachers = self.ruler.teachers
        if len(teachers) < 2 or self.cell.kind == "teacher":
            return None
        stack = torch.stack([teacher["latents"] for teacher in teachers.values()])
        scales = torch.tensor(list(teachers))
        return effective_guidance.nearest(self.rows["latents"], stack, scales, self.ruler.resamples)


class Difference(TypedDict):
    """Of two figures: a - b, the ends of its interval, and a two-sided bootstrap p-value."""

    difference: float
    low: float
    high: float
    p: float


def compare(a: Figure, b: Figure, confidence: float) -> Difference | None:
    """a - b on the same resamples; None where there are none."""
    if a.resampled is None or b.resampled is None:
        return None
    if not math.isfinite(a.value - b.value):
        return None
    difference = Figure(a.value - b.value, a.resampled - b.resampled)
    low, high = difference.interval(confidence)
    p = two_sided_p(a.resampled - b.resampled)
    return {"difference": difference.value, "low": low, "high": high, "p": p}


def moved(tables: Mapping[Cell, Rows], reference: Cell) -> dict[str, float]:
    """How far each adapter moves the samples: RMS in latents between a cell of it and the same settings
    on the base alone (a plain cell), over that of the base alone from the teacher; where there is a pair.
    """
    found: dict[str, float] = {}
    for cell, table in tables.items():
        alone = Cell("plain", None, cell.sampler, cell.steps, cell.guidance_scale)
        if cell.adapter is None or alone not in tables:
            continue
        base = tables[alone]["latents"]
        scale = float(rms(base, tables[reference]["latents"]).mean())
        distance = float(rms(table["latents"], base).mean()) / scale
        found[cell.adapter] = max(found.get(cell.adapter, 0.0), distance)
    return found
