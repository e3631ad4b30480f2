"""Which of the teacher's guidance_scales do the student's pictures look like, from the same noise?

The teacher's samples at rising guidance_scales, all N of them taken as one point of a large space, are the
corners of a polyline; the student's samples are a point beside it. The effective guidance is where the
polyline comes nearest to that point: on each segment x(l) = (1 - l) T_i + l T_(i+1) the square distance

    |S - x(l)|^2 = |w|^2 - 2 l (v . w) + l^2 |v|^2,    v = T_(i+1) - T_i,  w = S - T_i

is a parabola with its lowest point at l = (v . w) / |v|^2, cut to [0, 1]; the best segment wins, and the
scale is interpolated in l. All three products are sums over samples, so a resample of prompts only weighs
their tables.

An error of the student that has nothing to do with guidance is orthogonal to the line and, on a straight
line, moves nothing; where the line bends, a large one (`distance` near 1 or above) can pull the value towards
a corner. The definition is ours.

Between two corners the teacher runs along a curve, not along the chord, so the scale is off there by up to
about c (g - g_i) (g_(i+1) - g), as in any linear interpolation. c is measured: each inner corner is looked
for on the line without it. The interval is made wider by that much; a finer grid makes it narrower.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lcm_kit.evaluation.metrics.bootstrap import Resamples, percentiles


@dataclass(frozen=True)
class Nearest:
    """The guidance_scale `value`; what it is in every resample, `resampled` [rounds]; and how near that is.

    `interpolation`: how far off the value may be because the scales are few, 0 at each of them.
    `distance`: from the student to that point, over the distance between the ends of the polyline; 0 is on
    it. `at_edge`: the value is the first or last scale, so the truth may lie beyond: it is a bound only.
    """

    value: float
    resampled: Tensor
    distance: float
    at_edge: bool
    interpolation: float

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Percentile interval over prompts, wider by `interpolation` on both sides; at an edge one-sided."""
        low, high = percentiles(self.resampled, confidence)
        return low - self.interpolation, high + self.interpolation


def nearest(student: Tensor, teachers: Tensor, scales: Tensor, resamples: Resamples) -> Nearest:
    """Where the teacher's polyline comes nearest to the student; float64.

    `student` [N, ...], `teachers` [G, N, ...] at rising `scales` [G], G >= 2, all from the same prompts and
    noise. Raises `ValueError` for scales that do not rise, or shapes that do not fit.
    """
    if len(scales) < 2 or not bool((scales[1:] > scales[:-1]).all()):
        raise ValueError(f"scales {scales.tolist()} must be two or more, each larger than the one before")
    if teachers.shape != (len(scales), *student.shape):
        raise ValueError(
            f"teachers are {tuple(teachers.shape)}, and must be {(len(scales), *student.shape)}: "
            "the student's shape for each of the scales"
        )
    pairs = zip(teachers[:-1], teachers[1:], strict=True)
    products = torch.stack([_products(student, a, b) for a, b in pairs], dim=1)  # [3, G-1, N]
    value, squared = _lowest(products.sum(-1)[..., None], scales)
    resampled, _ = _lowest(products @ resamples.counts.T, scales)
    span = float((teachers[-1].double() - teachers[0].double()).square().sum())
    distance = (float(squared) / span) ** 0.5 if span else float("nan")
    found = float(value)
    at_edge = found in (float(scales[0]), float(scales[-1]))
    return Nearest(found, resampled, distance, at_edge, _interpolation(teachers, scales.tolist(), found))


def effective_guidance(
    student: Tensor, teachers: Tensor, scales: Tensor, resamples: Resamples
) -> tuple[float, Tensor]:
    """Of `nearest`: the value, and what it is in every resample [rounds]; without `interpolation`."""
    found = nearest(student, teachers, scales, resamples)
    return found.value, found.resampled


def _interpolation(teachers: Tensor, scales: list[float], value: float) -> float:
    """The error of linear interpolation at `value`: what the inner corners beside it miss when left out.

    0 where there is no inner corner to try it on, with two scales.
    """
    i = max(k for k, scale in enumerate(scales[:-1]) if scale <= value)
    worst = 0.0
    for k in {i, i + 1} & set(range(1, len(scales) - 1)):
        v2, vw, _ = _products(teachers[k], teachers[k - 1], teachers[k + 1]).sum(1).tolist()
        before, after = scales[k] - scales[k - 1], scales[k + 1] - scales[k]
        missed = vw / v2 * (before + after) - before if v2 else 0.0
        worst = max(worst, abs(missed) / (before * after))
    return worst * (value - scales[i]) * (scales[i + 1] - value)


def _products(student: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """|v|^2, v . w and |w|^2 of each sample, [3, N]; one segment at a time, for latents of large models."""
    v = (end.double() - start.double()).flatten(1)
    w = (student.double() - start.double()).flatten(1)
    return torch.stack([(v * v).sum(1), (v * w).sum(1), (w * w).sum(1)]).cpu()


def _lowest(sums: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """[3, G-1, rounds]: |v|^2, v . w, |w|^2 over all samples -> the scales and square distances [rounds]."""
    v2, vw, w2 = sums
    share = (vw / v2.clamp(min=1e-300)).clamp(0, 1)
    squared = (w2 - 2 * share * vw + share**2 * v2).clamp(min=0)
    lowest, best = squared.min(0)
    ends = scales.double().cpu()
    # lerp is exact at both ends: a student that is the teacher gets the teacher's scale to the bit
    return torch.lerp(ends[best], ends[best + 1], share.gather(0, best[None])[0]), lowest
