"""The table of metrics: what each is, which way is better, and how it is measured.

A new metric is an entry here (docs/extending/metric.md): every evaluation measures it, writes it with its
interval into results.json, compares by it and shows it in its report.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from lcm_kit.console import working
from lcm_kit.evaluation import styled
from lcm_kit.evaluation.cells import Cell
from lcm_kit.evaluation.kept import Rows
from lcm_kit.evaluation.measure import Drawn, Figure, Figures, Ruler
from lcm_kit.evaluation.metrics import diversity as spread
from lcm_kit.evaluation.metrics import frechet, kernel
from lcm_kit.evaluation.metrics.accuracy import ATTRIBUTES
from lcm_kit.evaluation.metrics.distance import rms
from lcm_kit.evaluation.metrics.saturation import chroma, clipped_shares
from lcm_kit.evaluation.metrics.sharpness import laplacian_energy
from lcm_kit.evaluation.results import BRAND, QUALITY

C = TypeVar("C", bound=Cell)
Column = Callable[[Tensor], Tensor]  # pixels [B, 3, H, W] in [-1, 1] -> [B], a figure a picture
_AT_ONCE = 16  # pictures whose pixels are compared at once
_LEAST = 3  # prompts for a distance of sets with its interval


@dataclass(frozen=True)
class Metric:
    """One metric; `measure` returns None where a cell has nothing to measure it by."""

    label: str  # as people read it
    better: Literal["higher", "lower", "one"] | None  # "one": nearest to 1; None: neither way
    help: str
    measure: Callable[[Drawn], Figure | None]
    unit: str = ""
    columns: Mapping[str, Column] = field(default_factory=dict)  # what is kept of every picture for it
    recipes: tuple[str, ...] = ()  # that measure it; empty: all

    def described(self) -> dict[str, str | None]:
        """What results.json says of it."""
        return {"label": self.label, "unit": self.unit, "better": self.better, "help": self.help}


# -- How each is measured: of a cell's rows, beside the ruler ------------------------------------------------


def _column(name: str) -> Callable[[Drawn], Figure | None]:
    return lambda drawn: drawn.mean(drawn.rows.get(name))


def _over_teacher(name: str) -> Callable[[Drawn], Figure | None]:
    return lambda drawn: drawn.over_teacher(name)


def _from_teacher(column: str) -> Callable[[Drawn], Figure | None]:
    def measure(drawn: Drawn) -> Figure | None:
        if drawn.is_reference or not drawn.cell.deterministic or column not in drawn.rows:
            return None
        return drawn.mean(rms(drawn.rows[column], drawn.ruler.reference[column]))

    return measure


def _pixel_distance(drawn: Drawn) -> Figure | None:
    mine, teacher = drawn.rows["pictures"], drawn.ruler.reference["pictures"]
    if len(mine) < len(drawn.rows["latents"]):
        return None  # only those that are shown were kept
    pairs = zip(mine.split(_AT_ONCE), teacher.split(_AT_ONCE), strict=True)
    return drawn.mean(torch.cat([rms(a / 127.5, b / 127.5) for a, b in pairs]))


def _off_target(drawn: Drawn) -> Figure | None:
    if drawn.is_reference:
        return None
    teacher = drawn.ruler.reference["latents"]
    others = teacher.roll(drawn.ruler.resamples.images_per_prompt, 0)  # of the prompt before
    return drawn.ratio(rms(drawn.rows["latents"], teacher), rms(others, teacher))


def _effective_guidance(drawn: Drawn) -> Figure | None:
    if (found := drawn.guidance) is None:
        return None
    return Figure(found.value, found.resampled, found.interval(drawn.ruler.confidence))


def _guidance_misfit(drawn: Drawn) -> Figure | None:
    return None if drawn.guidance is None else Figure(drawn.guidance.distance)


def _sets(drawn: Drawn, name: str) -> tuple[Tensor, Tensor] | None:
    """Features of the cell's pictures and of `real` ones or those of the `teacher`; None where one lacks, or
    where there are too few prompts to leave some out.
    """
    ruler, mine = drawn.ruler, drawn.rows.get("features")
    others = ruler.real if name == "real" else None if drawn.is_reference else ruler.reference.get("features")
    if mine is None or others is None or len(mine) < _LEAST * ruler.resamples.images_per_prompt:
        return None
    return mine, others


def _frechet(name: str) -> Callable[[Drawn], Figure | None]:
    def measure(drawn: Drawn) -> Figure | None:
        if (sets := _sets(drawn, name)) is None:
            return None
        ruler, few = drawn.ruler, min(map(len, sets)) < frechet.ENOUGH * sets[0].shape[1]
        value, low, high = frechet.frechet_interval(
            *sets, ruler.resamples, ruler.confidence, paired=name == "teacher"
        )
        if few:  # its bias cannot be taken off, and is that of all cells
            value = frechet.frechet(*sets)
        return Figure(value, bounds=(low, high))

    return measure


def _kernel(name: str) -> Callable[[Drawn], Figure | None]:
    def measure(drawn: Drawn) -> Figure | None:
        if (sets := _sets(drawn, name)) is None:
            return None
        return Figure(*kernel.kernel_distance(*sets, drawn.ruler.resamples, paired=name == "teacher"))

    return measure


def _frechet_biased(drawn: Drawn) -> Figure | None:
    mine, real = drawn.rows.get("features"), drawn.ruler.real
    return None if mine is None or real is None else Figure(frechet.frechet(mine, real))


def _diversity(drawn: Drawn) -> Figure | None:
    images = drawn.ruler.resamples.images_per_prompt
    if images < 2 or "features" not in drawn.rows:
        return None
    return drawn.mean(spread.within_prompts(drawn.rows["features"], images).repeat_interleave(images))


def _mean_alone(column: str, times: Callable[[Drawn], float | None]) -> Callable[[Drawn], Figure | None]:
    """A column's mean, without an interval, `times` something; None where the device did not say."""

    def measure(drawn: Drawn) -> Figure | None:
        factor, value = times(drawn), float(drawn.rows[column].mean())
        return None if factor is None or math.isnan(value) else Figure(value * factor)

    return measure


def _price(drawn: Drawn) -> float | None:
    """Of a second, for a thousand pictures."""
    cost = drawn.ruler.cost
    return None if cost is None else 1000 / 3600 * cost.price_per_hour


# -- The table -----------------------------------------------------------------------------------------------

METRICS: dict[str, Metric] = {
    "prompt_adherence": Metric(
        "prompt adherence", "higher",
        "CLIP score (100 x cosine of picture and prompt), or on tiny-sd the share of pictures in which the "
        "probe reads object, colour and pattern as prompted",
        _column("adherence"),
    ),
    **{
        f"{name}_accuracy": Metric(
            f"{name} right", "higher", f"share of pictures in which the probe reads the {name} as prompted",
            _column(f"{name}_right"), recipes=(QUALITY,),
        )
        for name in ATTRIBUTES
    },
    "latent_distance": Metric(
        "distance to the teacher, latents", "lower",
        "RMS between the sample and the teacher's from the same noise, in latents; for one step and for "
        "samplers without noise on their way, since others end elsewhere by chance",
        _from_teacher("latents"),
    ),
    "feature_distance": Metric(
        "distance to the teacher, features", "lower",
        "RMS between the features of the sample and those of the teacher's of the same noise",
        _from_teacher("features"),
    ),
    "pixel_distance": Metric(
        "distance to the teacher, pixels", "lower",
        "RMS between the picture and the teacher's from the same noise, on pixels in [-1, 1]; with several "
        "steps of LCM a right picture may differ",
        _pixel_distance, recipes=(QUALITY,),
    ),
    "effective_guidance": Metric(
        "effective guidance", None,
        "the teacher's guidance_scale whose samples are nearest from the same noise: what was baked in, and "
        "what the student's own guidance_scale adds to it",
        _effective_guidance,
    ),
    "guidance_misfit": Metric(
        "distance from the teacher's line", "lower",
        "how far the samples are from the teacher's at the effective guidance, over how far the teacher's at "
        "the least and the most guidance are apart; near 1 or above, effective guidance says little",
        _guidance_misfit,
    ),
    "off_target": Metric(
        "off target", "lower",
        "RMS in latents to the teacher's sample of the same noise, over that between the teacher's samples "
        "of different prompts; 1 and above is not the teacher's picture any more",
        _off_target,
    ),
    "frechet_real": Metric(
        "Fréchet distance to real pictures", "lower",
        "between Gaussians fitted to the features; biased upwards by few samples",
        _frechet("real"),
    ),
    "frechet_biased": Metric(
        "Fréchet distance to real pictures, as it comes", "lower",
        "as above, with all of the bias of few samples, to be read beside what as many real pictures get",
        _frechet_biased, recipes=(QUALITY,),
    ),
    "kernel_real": Metric(
        "kernel distance to real pictures", "lower",
        "unbiased MMD² of the features with a cubic kernel (KID)",
        _kernel("real"),
    ),
    "frechet_teacher": Metric(
        "Fréchet distance to the teacher's", "lower", "as to real pictures", _frechet("teacher")
    ),
    "kernel_teacher": Metric(
        "kernel distance to the teacher's", "lower", "as to real pictures", _kernel("teacher")
    ),
    "brand_similarity": Metric(
        "brand similarity", "higher",
        "mean cosine of the features to the brand's pictures, less that to the control's",
        styled.brand_similarity,
    ),
    "in_style": Metric(
        "prompts in the style", "higher",
        "share of prompts whose pictures are, on average, nearer to the brand's than to the base's of the "
        "same prompts, along what sets the two apart",
        styled.prompts_in_style, recipes=(BRAND,),
    ),
    "style_way": Metric(
        "of the way to the brand", None,
        "brand similarity over that of the base's pictures of the same prompts: 0 is the base's, 1 what the "
        "brand's own pictures have; on prompts without the trigger it is what leaks",
        styled.style_way, recipes=(BRAND,),
    ),
    "changed": Metric(
        "changed from the base", None,
        "distance of the features to the base's of the same prompt and noise, over that between two noises "
        "of the base: 0 is the base's own picture, 1 another picture of the prompt",
        styled.changed, recipes=(BRAND,),
    ),
    "diversity": Metric(
        "diversity", "higher", "mean distance between the features of pictures of one prompt", _diversity
    ),
    "saturation": Metric(
        "colourfulness over the teacher's", "one", "mean HSV chroma over that of the teacher's samples",
        _over_teacher("chroma"), columns={"chroma": chroma},
    ),
    "clipped": Metric(
        "clipped values", "lower", "share of channel values at black or white",
        _column("clipped"), columns={"clipped": clipped_shares},
    ),
    "sharpness": Metric(
        "sharpness over the teacher's", "one",
        "variance of the Laplacian of the luma over that of the teacher's; low is blurred, high is noisy",
        _over_teacher("sharpness"), columns={"sharpness": laplacian_energy},
    ),
    "seconds": Metric(
        "seconds an image", "lower", "text encoder, UNet and VAE, in batches",
        _mean_alone("seconds", lambda drawn: 1.0), unit="s",
    ),
    "energy": Metric(
        "energy an image", "lower", "where the device reports it",
        _mean_alone("joules", lambda drawn: 1.0), unit="J",
    ),
    "cost_1000": Metric(
        "cost of 1,000 images", "lower", "seconds an image at the config's price an hour",
        _mean_alone("seconds", _price),
    ),
}  # fmt: skip


def metrics_of(recipe: str) -> dict[str, Metric]:
    """Those that an evaluation measures, in the table's order."""
    return {key: each for key, each in METRICS.items() if not each.recipes or recipe in each.recipes}


def columns_of(recipe: str) -> dict[str, Column]:
    """What an evaluation keeps of every picture for its metrics."""
    return {name: column for each in metrics_of(recipe).values() for name, column in each.columns.items()}


def figures(drawn: Drawn, recipe: str) -> Figures:
    """All metrics of the evaluation that can be measured of a cell."""
    found = {key: metric.measure(drawn) for key, metric in metrics_of(recipe).items()}
    return {key: figure for key, figure in found.items() if figure is not None}


def measure(drawn: Mapping[C, Rows], ruler: Ruler, recipe: str) -> dict[C, Figures]:
    """The figures of every cell, all on the same resamples of prompts."""
    with working(f"measuring {len(drawn)} cells"):
        return {cell: figures(Drawn(cell, rows, ruler), recipe) for cell, rows in drawn.items()}


def as_json(found: Figures, confidence: float, recipe: str) -> dict[str, Any]:
    """`{"value", "low", "high"}` of every metric, null where there is none or it is no number."""

    def entry(figure: Figure | None) -> dict[str, float] | None:
        if figure is None:
            return None
        low, high = figure.interval(confidence)
        if not all(map(math.isfinite, (figure.value, low, high))):
            return None  # a broken adapter's samples hold NaN
        return {"value": figure.value, "low": low, "high": high}

    return {key: entry(found.get(key)) for key in metrics_of(recipe)}


def per_picture(recipe: str, rows: Rows) -> dict[str, list[float]]:
    """The columns of rows that samples.parquet holds, those of the metrics among them, a value a sample."""
    names = ("adherence", *columns_of(recipe), "seconds", "joules")
    return {name: rows[name].tolist() for name in names if name in rows}
