"""From the tables of all cells to figures with intervals, each cell on the same resamples of prompts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lcm_kit.config.sweep import Cost
from lcm_kit.metrics import diversity, effective_guidance, frechet, kernel, similarity
from lcm_kit.metrics.bootstrap import Resamples, percentiles, two_sided_p
from lcm_kit.metrics.distance import rms
from lcm_kit.results import Rows
from lcm_kit.sweep.cells import Cell

# key -> label, unit, which way is better ("one": nearest to 1), what it is
METRICS: dict[str, tuple[str, str, str | None, str]] = {
    "prompt_adherence": (
        "prompt adherence", "", "higher",
        "CLIP score (100 x cosine of picture and prompt), or on tiny-sd the share of pictures in which the "
        "probe reads object, colour and pattern as prompted",
    ),
    "latent_distance": (
        "distance to the teacher, latents", "", "lower",
        "RMS between the sample and the teacher's from the same noise, in latents; for one step and for "
        "samplers without noise on their way, since others end elsewhere by chance",
    ),
    "feature_distance": (
        "distance to the teacher, features", "", "lower",
        "RMS between the features of the sample and those of the teacher's of the same noise",
    ),
    "effective_guidance": (
        "effective guidance", "", None,
        "the teacher's guidance_scale whose samples are nearest from the same noise: what was baked in, and "
        "what the student's own guidance_scale adds to it",
    ),
    "guidance_misfit": (
        "distance from the teacher's line", "", "lower",
        "how far the samples are from the teacher's at the effective guidance, over how far the teacher's at "
        "the least and the most guidance are apart; near 1 or above, effective guidance says little",
    ),
    "astray": (
        "astray", "", "lower",
        "RMS in latents to the teacher's sample of the same noise, over that between the teacher's samples "
        "of different prompts; 1 and above is not the teacher's picture any more",
    ),
    "frechet_real": (
        "Fréchet distance to real pictures", "", "lower",
        "between Gaussians fitted to the features; biased upwards by few samples",
    ),
    "kernel_real": (
        "kernel distance to real pictures", "", "lower",
        "unbiased MMD² of the features with a cubic kernel (KID)",
    ),
    "frechet_teacher": ("Fréchet distance to the teacher's", "", "lower", "as to real pictures"),
    "kernel_teacher": ("kernel distance to the teacher's", "", "lower", "as to real pictures"),
    "brand_similarity": (
        "brand similarity", "", "higher",
        "mean cosine of the features to the brand's pictures, less that to the control's",
    ),
    "diversity": (
        "diversity", "", "higher", "mean distance between the features of pictures of one prompt",
    ),
    "saturation": (
        "colourfulness over the teacher's", "", "one", "mean HSV chroma over that of the teacher's samples",
    ),
    "clipped": ("clipped values", "", "lower", "share of channel values at black or white"),
    "sharpness": (
        "sharpness over the teacher's", "", "one",
        "variance of the Laplacian of the luma over that of the teacher's; low is blurred, high is noisy",
    ),
    "seconds": ("seconds an image", "s", "lower", "text encoder, UNet and VAE, in batches"),
    "energy": ("energy an image", "J", "lower", "where the device reports it"),
    "cost_1000": ("cost of 1,000 images", "", "lower", "seconds an image at the config's price an hour"),
}  # fmt: skip


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
    """What all cells are measured with."""

    resamples: Resamples
    teachers: Mapping[float, Rows]  # by guidance_scale, rising
    reference: Rows  # of the teacher that is compared with
    real: Tensor | None  # features [M, F]
    brand: tuple[Tensor, Tensor] | None  # features of the brand's and the control's pictures
    cost: Cost | None
    confidence: float

    def figures(self, cell: Cell, table: Rows) -> Figures:
        """All metrics that can be measured of `cell`."""
        found = {
            **self._colours(table), **self._distances(cell, table), **self._sets(cell, table),
            **self._costs(table),
        }  # fmt: skip
        if "adherence" in table:
            found["prompt_adherence"] = self._mean(table["adherence"])
        if self.resamples.images_per_prompt > 1:
            spread = diversity.within_prompts(table["features"], self.resamples.images_per_prompt)
            found["diversity"] = self._mean(spread.repeat_interleave(self.resamples.images_per_prompt))
        if self.brand is not None:
            found["brand_similarity"] = self._mean(
                similarity.brand_similarity(table["features"], *self.brand)
            )
        if len(self.teachers) > 1 and cell.kind != "teacher":
            found |= self._guidance(table)
        return {key: found[key] for key in METRICS if key in found}

    def _mean(self, values: Tensor) -> Figure:
        values = values.double()
        return Figure(float(values.mean()), values[self.resamples.index].mean(1))

    def _ratio(self, values: Tensor, of: Tensor) -> Figure:
        a, b = self._mean(values), self._mean(of)
        assert a.resampled is not None and b.resampled is not None
        return Figure(a.value / b.value, a.resampled / b.resampled)

    def _colours(self, table: Rows) -> Figures:
        return {
            "saturation": self._ratio(table["chroma"], self.reference["chroma"]),
            "clipped": self._mean(table["clipped"]),
            "sharpness": self._ratio(table["sharpness"], self.reference["sharpness"]),
        }

    def _distances(self, cell: Cell, table: Rows) -> Figures:
        if table is self.reference:
            return {}
        teacher = self.reference["latents"]
        others = teacher.roll(self.resamples.images_per_prompt, 0)  # of the prompt before
        astray = {"astray": self._ratio(rms(table["latents"], teacher), rms(others, teacher))}
        if not cell.deterministic:
            return astray
        return astray | {
            f"{name}_distance": self._mean(rms(table[part], self.reference[part]))
            for name, part in (("latent", "latents"), ("feature", "features"))
        }

    def _sets(self, cell: Cell, table: Rows) -> Figures:
        found: Figures = {}
        sets = {"real": self.real, "teacher": None if table is self.reference else self.reference["features"]}
        for name, others in sets.items():
            if others is None:
                continue
            mine = table["features"]
            paired = name == "teacher"
            value, low, high = frechet.frechet_interval(
                mine, others, self.resamples, self.confidence, paired=paired
            )
            if min(len(mine), len(others)) < frechet.ENOUGH * mine.shape[1]:
                value = frechet.frechet(
                    mine, others
                )  # its bias cannot be taken off, and is that of all cells
            found[f"frechet_{name}"] = Figure(value, bounds=(low, high))
            value, rounds = kernel.kernel_distance(mine, others, self.resamples, paired=paired)
            found[f"kernel_{name}"] = Figure(value, rounds)
        return found

    def _guidance(self, table: Rows) -> Figures:
        scales = torch.tensor(list(self.teachers))
        stack = torch.stack([teacher["latents"] for teacher in self.teachers.values()])
        found = effective_guidance.nearest(table["latents"], stack, scales, self.resamples)
        return {
            "effective_guidance": Figure(found.value, found.resampled, found.interval(self.confidence)),
            "guidance_misfit": Figure(found.distance),
        }

    def _costs(self, table: Rows) -> Figures:
        seconds, joules = float(table["seconds"].mean()), float(table["joules"].mean())
        found = {"seconds": Figure(seconds)}
        if joules == joules:  # not NaN
            found["energy"] = Figure(joules)
        if self.cost is not None:
            found["cost_1000"] = Figure(seconds * 1000 / 3600 * self.cost.price_per_hour)
        return found


def compare(a: Figure, b: Figure, confidence: float) -> dict[str, float] | None:
    """a - b on the same resamples: the difference, its interval, and a two-sided bootstrap p-value."""
    if a.resampled is None or b.resampled is None:
        return None
    if not math.isfinite(a.value - b.value):
        return None
    difference = Figure(a.value - b.value, a.resampled - b.resampled)
    low, high = difference.interval(confidence)
    p = two_sided_p(a.resampled - b.resampled)
    return {"difference": difference.value, "low": low, "high": high, "p": p}


def as_json(figures: Figures, confidence: float) -> dict[str, Any]:
    """`{"value", "low", "high"}` of every metric, null where there is none or it is no number."""

    def entry(figure: Figure | None) -> dict[str, float] | None:
        if figure is None:
            return None
        low, high = figure.interval(confidence)
        if not all(map(math.isfinite, (figure.value, low, high))):
            return None  # a broken adapter's samples hold NaN
        return {"value": figure.value, "low": low, "high": high}

    return {key: entry(figures.get(key)) for key in METRICS}


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
