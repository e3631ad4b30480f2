"""Which of the teacher's guidance_scales do the student's pictures look like, from the same noise?

The teacher's samples at rising guidance_scales, all N of them taken as one point, are the corners of a
polyline; the student's samples are a point beside it. The effective guidance is where the polyline comes
nearest to that point: on each segment x(l) = (1 - l) T_i + l T_(i+1) the square distance is a parabola in l,
whose lowest point in [0, 1] is known. An error of the student that has nothing to do with guidance is
orthogonal to the line and moves nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lcm_kit.metrics.bootstrap import Resamples


def effective_guidance(
    student: Tensor, teachers: Tensor, scales: Tensor, resamples: Resamples
) -> tuple[float, Tensor]:
    """The guidance_scale, and what it is in every resample [rounds]; float64.

    `student` [N, ...], `teachers` [G, N, ...] at rising `scales` [G], G >= 2. A value at an end of `scales`
    is only a bound: it may lie beyond. Raises `ValueError` for scales that do not rise.
    """
    if len(scales) < 2 or not bool((scales[1:] > scales[:-1]).all()):
        raise ValueError(f"scales {scales.tolist()} must be two or more, each larger than the one before")
    s, t = student.flatten(1).double(), teachers.flatten(2).double()
    leg, way = (
        t[1:] - t[:-1],
        s - t[:-1],
    )  # [G-1, N, D]: along each segment, and from its start to the student
    tables = torch.stack([(leg * leg).sum(-1), (leg * way).sum(-1), (way * way).sum(-1)])  # [3, G-1, N]
    value = _nearest(tables.sum(-1)[..., None], scales)
    return float(value), _nearest(tables @ resamples.counts.T, scales)


def _nearest(sums: Tensor, scales: Tensor) -> Tensor:
    """[3, G-1, rounds]: |leg|^2, leg . way, |way|^2, summed over samples -> the scales [rounds]."""
    length, along, squared = sums
    share = (along / length.clamp(min=1e-300)).clamp(0, 1)
    distance = squared - 2 * share * along + share**2 * length
    best = distance.argmin(0, keepdim=True)
    scales = scales.double()
    start, end = scales[best[0]], scales[best[0] + 1]
    return start + share.gather(0, best)[0] * (end - start)
