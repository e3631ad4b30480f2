"""The report's plots, as SVG text: colours that colour-blind readers tell apart, and never colour alone."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from lcm_kit.report.shared import SAMPLERS

# Okabe and Ito's palette (https://jfly.uni-koeln.de/color/), with a marker and a dash of its own for each
# line; the student's is the same with whatever sampler it is drawn.
_STUDENT = ("#D55E00", "o", "-")
_STYLES = {
    ("base", "ddim", True): ("DDIM, guidance", "#0072B2", "s", "--"),
    ("base", "dpmpp_2m", True): ("DPM++ 2M, guidance", "#009E73", "^", "--"),
    ("base", "ddim", False): ("DDIM, none", "#56B4E9", "s", ":"),
    ("base", "dpmpp_2m", False): ("DPM++ 2M, none", "#7A7A7A", "^", ":"),
}


def figure(
    width: float = 4.8, height: float = 3.6, layout: Literal["constrained"] | None = "constrained"
) -> tuple[Any, Any]:
    """An empty figure, in inches, and its axes; without `layout` it is drawn in half the time."""
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state

    empty = Figure(figsize=(width, height), layout=layout)
    axes = empty.subplots()
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return empty, axes


def svg(drawn: Any) -> str:
    """The figure as SVG text, the same bytes for the same figure."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "lcm-kit"}):
        drawn.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def by_calls(rows: Sequence[Mapping[str, Any]], key: str, label: str, floor: float | None = None) -> str:
    """`rows[...][key]` over the UNet calls, a line for each sampler; the teacher (and `floor`) as a level."""
    from matplotlib.ticker import NullLocator, ScalarFormatter

    drawn, axes = figure()
    students = dict.fromkeys(row["solver"] for row in rows if row["name"] == "student")
    styles = {
        ("student", solver, False): (f"student ({SAMPLERS.get(solver, solver)})", *_STUDENT)
        for solver in students
    }
    for (name, solver, guided), (title, colour, marker, dash) in {**styles, **_STYLES}.items():
        line = [
            r for r in rows if (r["name"], r["solver"], r["guidance_scale"] > 1) == (name, solver, guided)
        ]
        line.sort(key=lambda row: row["unet_calls"])
        axes.plot(
            [row["unet_calls"] for row in line], [row[key] for row in line], color=colour, marker=marker,
            linestyle=dash, linewidth=2.6 if name == "student" else 1.6, label=title if line else None,
        )  # fmt: skip
    for row in (row for row in rows if row["name"] == "teacher"):
        axes.axhline(row[key], color="black", linewidth=1.4, label=f"teacher, {row['unet_calls']} calls")
    if floor is not None:
        axes.axhline(floor, color="black", linewidth=1.2, linestyle="-.", label="real pictures")
    calls = sorted({row["unet_calls"] for row in rows if row["name"] != "teacher"})
    axes.set_xscale("log")
    axes.set_xticks(calls)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("UNet calls an image")
    axes.set_ylabel(label)
    axes.set_ylim(bottom=0)
    drawn.legend(loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    return svg(drawn)


def curve(
    metrics: Sequence[Mapping[str, float]],
    key: str,
    label: str,
    *,
    log: bool = False,
    level: float | None = None,
) -> str | None:
    """`key` over the training step, with a running mean where it is noisy; None if it was not measured.

    `level`: a value to draw a line at.
    """
    points = [(line["step"], line[key]) for line in metrics if line.get(key) is not None]
    if not points:
        return None
    steps, values = zip(*points, strict=True)
    drawn, axes = figure()
    noisy = len(values) >= 30
    axes.plot(steps, values, color="#0072B2", alpha=0.35 if noisy else 1, marker=None if noisy else "o")
    if noisy:
        axes.plot(steps, _running_mean(values), color="#0072B2", linewidth=2.2)
    if level is not None:
        axes.axhline(level, color="black", linewidth=1.2, linestyle="--")
    if log and min(values) > 0:
        axes.set_yscale("log")
    axes.set_xlabel("training step")
    axes.set_ylabel(label)
    return svg(drawn)


def _running_mean(values: Sequence[float]) -> list[float]:
    """Exponential mean over about a tenth of the values, without a bias towards its start."""
    keep = 1 - 10 / len(values)
    means, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        means.append(total / weight)
    return means
