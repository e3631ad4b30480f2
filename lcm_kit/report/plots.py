"""The report's plots, as SVG text: colours that colour-blind readers tell apart, and never colour alone."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from typing import Any, Literal

from lcm_kit import samplers
from lcm_kit.evaluation.result_shapes import Cell
from lcm_kit.evaluation.results import cells_of, value

# Okabe and Ito's palette (https://jfly.uni-koeln.de/color/), with a marker and a dash of its own for each
# line: of students, of the base with guidance, and of the base without, by the sampler's place in its table.
_STUDENT = (("#D55E00", "o"), ("#CC79A7", "v"), ("#E69F00", "D"))
_GUIDED = (("#0072B2", "s"), ("#009E73", "^"), ("#CC79A7", "P"), ("#E69F00", "X"))
_PLAIN = (("#56B4E9", "s"), ("#7A7A7A", "^"), ("#F0E442", "P"), ("#000000", "X"))
_MORE = ("<", ">", "p", "h", "d", "*", "H", "8", "1", "2", "3", "4")  # markers of samplers that it lacks
Style = tuple[str, str, str, str]  # title, colour, marker, dash


def styles(cells: Sequence[Cell] = ()) -> dict[tuple[str, str, bool], Style]:
    """How lines look, by their rows' name, sampler and whether there is guidance, in the legend's order.

    Those of the table, and behind them those that `cells` have besides, as `tcd:0.5`: the look of a line does
    not depend on which others are drawn, as long as they are the table's.
    """
    bases, students = samplers.for_base(), samplers.for_adapter()
    none: list[str] = []
    blocks = (
        ("student", False, students, _STUDENT, "student ({})", "-"),
        ("student", True, none, _STUDENT, "student ({}), guidance", "-."),
        ("plain", True, bases, _GUIDED, "{}, guidance", "--"),
        ("plain", False, bases, _PLAIN, "{}, none", ":"),
    )
    return {
        (name, sampler, guided): (words.format(samplers.title_of(sampler)), colour, marker, dash)
        for name, guided, known, marks, words, dash in blocks
        for sampler, colour, marker in _looks(known, _drawn(cells, name, guided), marks)
    }


def _drawn(cells: Sequence[Cell], kind: str, guided: bool) -> list[str]:
    found = (cell for cell in cells_of(cells, kind) if (cell["guidance_scale"] > 1) == guided)
    return sorted({cell["sampler"] for cell in found})


def _looks(
    known: Sequence[str], drawn: Sequence[str], marks: Sequence[tuple[str, str]]
) -> Iterator[tuple[str, str, str]]:
    """Each sampler with its colour and marker: no two of them have both alike."""
    yield from ((name, *mark) for name, mark in zip(known, cycle(marks), strict=False))
    others = (name for name in drawn if name not in known)
    for name, (colour, _), marker in zip(others, cycle(marks), cycle(_MORE)):
        yield name, colour, marker


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


def by_calls(cells: Sequence[Cell], key: str, label: str, floor: float | None = None) -> str:
    """The metric `key` over the UNet calls, a line for each sampler; the teacher (and `floor`) as a level."""
    from matplotlib.ticker import NullLocator, ScalarFormatter

    drawn, axes = figure()
    for (kind, *how), (title, colour, marker, dash) in styles(cells).items():
        line = [
            cell for cell in cells_of(cells, kind)
            if [cell["sampler"], cell["guidance_scale"] > 1] == how
        ]  # fmt: skip
        line.sort(key=lambda cell: cell["unet_calls"])
        if line:
            axes.plot(
                [cell["unet_calls"] for cell in line], [value(cell, key) for cell in line], color=colour,
                marker=marker, linestyle=dash, linewidth=2.6 if kind == "student" else 1.6, label=title,
            )  # fmt: skip
    for cell in cells_of(cells, "teacher"):
        level = value(cell, key)
        if level is not None:
            axes.axhline(level, color="black", linewidth=1.4, label=f"teacher, {cell['unet_calls']} calls")
    if floor is not None:
        axes.axhline(floor, color="black", linewidth=1.2, linestyle="-.", label="real pictures")
    calls = sorted({cell["unet_calls"] for cell in cells if cell["kind"] != "teacher"})
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
    for each in values:
        total, weight = keep * total + each, keep * weight + 1
        means.append(total / weight)
    return means
