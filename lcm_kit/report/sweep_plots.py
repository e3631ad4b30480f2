"""A sweep's plots as figures: colours that colour-blind readers tell apart, and never colour alone."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from typing import Any

from lcm_kit.report.plots import figure

Cell = Mapping[str, Any]  # as in results.json
# Okabe and Ito's palette (https://jfly.uni-koeln.de/color/) without its yellow, which vanishes on white, and
# its black, which is the teacher's; a marker and a dash of its own for each line
STYLES = (
    ("#0072B2", "o", "-"), ("#D55E00", "s", "--"), ("#009E73", "^", "-."), ("#CC79A7", "D", ":"),
    ("#E69F00", "v", (0, (5, 1))), ("#56B4E9", "P", (0, (3, 1, 1, 1))),
)  # fmt: skip
BETTER = {"lower": "lower is better ↓", "higher": "higher is better ↑", "one": "best is 1"}


def value(cell: Cell, key: str) -> float | None:
    """The metric's value in this cell; None where it was not measured."""
    found = cell["metrics"].get(key)
    return None if found is None else found["value"]


def lines(
    cells: Sequence[Cell],
    key: str,
    about: Mapping[str, Any],
    *,
    x: str = "guidance_scale",
    series: str = "steps",
    level: Mapping[str, float] | None = None,
    breaks: Mapping[float, float] | None = None,
) -> Any | None:
    """The metric `key` over `x`, a line for each value of `series`, with its interval as a shade.

    `about` is the metric's entry in results.json, `level` the teacher's figure. `breaks` maps a value of
    `series` to the `x` from which guidance hurts, which is marked. None if no cell has the metric.
    """
    measured = sorted((cell for cell in cells if cell["metrics"].get(key)), key=lambda cell: cell[x])
    if not measured:
        return None
    drawn, axes = figure(layout=None)  # there are dozens of these, all of one shape
    for name, style in zip(sorted({cell[series] for cell in cells}), _styles(), strict=False):
        line = [cell for cell in measured if cell[series] == name]
        if line:
            _line(axes, line, key, x, style, f"{_words(series)} {name:g}")
            _mark(axes, line, key, x, style[0], (breaks or {}).get(name))
    if level is not None:
        _level(axes, level, "teacher")
    _axes(axes, sorted({cell[x] for cell in cells}), _words(x), about)
    below = -(-len(axes.get_legend_handles_labels()[1]) // 3)  # rows of the legend
    drawn.subplots_adjust(left=0.17, right=0.97, top=0.92, bottom=0.17 + 0.065 * below)
    drawn.legend(loc="lower center", ncols=3, fontsize=9, frameon=False)
    return drawn


def _styles() -> Iterator[tuple[str, str, Any]]:
    """A style for each line; after the sixth the colours come again with other markers and dashes."""
    turned = STYLES[1:] + STYLES[:1]
    mixed = [(colour, *other[1:]) for (colour, *_), other in zip(STYLES, turned, strict=True)]
    return cycle([*STYLES, *mixed])


def _words(key: str) -> str:
    return {"lora_weight": "LoRA weight"}.get(key, key)


def _line(axes: Any, line: Sequence[Cell], key: str, x: str, style: tuple[str, str, Any], label: str) -> None:
    colour, marker, dash = style
    at = [cell[x] for cell in line]
    low, mid, high = ([cell["metrics"][key][part] for cell in line] for part in ("low", "value", "high"))
    axes.plot(at, mid, color=colour, marker=marker, linestyle=dash, linewidth=1.8, markersize=5, label=label)
    if len(line) > 1:
        axes.fill_between(at, low, high, color=colour, alpha=0.16, linewidth=0)
    else:  # a shade of no width cannot be seen
        axes.vlines(at, low, high, color=colour, linewidth=1.8)


def _mark(axes: Any, line: Sequence[Cell], key: str, x: str, colour: str, start: float | None) -> None:
    """A cross where guidance begins to hurt; named once in the legend."""
    for cell in line:
        if start is not None and cell[x] == start:
            named = "begins to hurt" in axes.get_legend_handles_labels()[1]
            axes.plot(
                [start], [cell["metrics"][key]["value"]], marker="X", markersize=12, color=colour, zorder=5,
                markeredgecolor="black", linestyle="none", label=None if named else "begins to hurt",
            )  # fmt: skip


def _level(axes: Any, level: Mapping[str, float], label: str) -> None:
    axes.axhline(level["value"], color="black", linewidth=1.4, label=label)
    if level["high"] > level["low"]:
        axes.axhspan(level["low"], level["high"], color="black", alpha=0.07, linewidth=0)


def _axes(axes: Any, ticks: Sequence[float], across: str, about: Mapping[str, Any]) -> None:
    shown: list[float] = []
    for tick in ticks:  # labels that would lie on each other are left out
        if not shown or tick - shown[-1] >= (ticks[-1] - ticks[0]) / 12:
            shown.append(tick)
    axes.set_xticks(shown, [f"{tick:g}" for tick in shown])
    axes.set_xlabel(across)
    axes.set_ylabel(_label(about))
    axes.set_title(BETTER.get(about.get("better") or "", ""), loc="left", fontsize=9, color="#565b64")


def _label(about: Mapping[str, Any]) -> str:
    unit = f" ({about['unit']})" if about.get("unit") else ""
    return "\n".join(textwrap.wrap(about["label"] + unit, 36))


# -- Quality against cost ------------------------------------------------------------------------------------


def front(cells: Sequence[Cell], key: str, better: str | None) -> list[Cell]:
    """The Pareto front, cheapest first: cells that none with as few UNet calls is as good as."""
    sign = 1 if better == "higher" else -1
    measured = [(cell, found) for cell in cells if (found := value(cell, key)) is not None]
    measured.sort(key=lambda pair: (pair[0]["unet_calls"], -sign * pair[1]))
    kept: list[Cell] = []
    best = float("-inf")
    for cell, found in measured:
        if sign * found > best:
            kept, best = [*kept, cell], sign * found
    return kept


def pareto(
    groups: Mapping[str, Sequence[Cell]], best: Sequence[Cell], key: str, about: Mapping[str, Any]
) -> Any | None:
    """The metric `key` over UNet calls: every cell by group, and the front `best` numbered from 1."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    if not best:
        return None
    drawn, axes = figure(5.6, 4.6)
    for (name, cells), style in zip(groups.items(), _group_styles(groups), strict=True):
        line = [cell for cell in cells if cell["metrics"].get(key)]
        at, mid = [cell["unet_calls"] for cell in line], [value(cell, key) for cell in line]
        size = 130 if style[1] == "*" else 34
        label = name if line else None
        axes.scatter(at, mid, size, style[0], style[1], alpha=0.75, linewidths=0, label=label)
    _front(axes, best, key)
    calls = sorted({cell["unet_calls"] for cells in groups.values() for cell in cells})
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(_apart(calls)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("UNet calls an image")
    axes.set_ylabel(_label(about))
    axes.set_title(BETTER.get(about.get("better") or "", ""), loc="left", fontsize=9, color="#565b64")
    if about.get("better") == "lower":
        axes.invert_yaxis()  # so that good is up, as ever
    drawn.legend(loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    return drawn


def _group_styles(groups: Mapping[str, Sequence[Cell]]) -> list[tuple[str, str]]:
    """A colour and a marker for each group; the teacher's is a black star."""
    styles = _styles()
    found = []
    for cells in groups.values():
        teacher = cells[0]["kind"] == "teacher"
        colour, marker, _ = ("black", "*", "") if teacher else next(styles)
        found.append((colour, marker))
    return found


def _front(axes: Any, best: Sequence[Cell], key: str) -> None:
    at = [cell["unet_calls"] for cell in best]
    mid = [cell["metrics"][key]["value"] for cell in best]
    axes.plot(at, mid, color="black", linewidth=1, drawstyle="steps-post", zorder=1, label="Pareto front")
    axes.vlines(
        at, [cell["metrics"][key]["low"] for cell in best], [cell["metrics"][key]["high"] for cell in best],
        color="black", linewidth=1, alpha=0.5, zorder=1,
    )  # fmt: skip
    axes.scatter(at, mid, s=110, facecolors="none", edgecolors="black", linewidths=1.4, zorder=4)
    for number, place in enumerate(zip(at, mid, strict=True), start=1):
        axes.annotate(
            str(number), place, xytext=(-7, 7), textcoords="offset points", ha="right", weight="bold"
        )


def _apart(calls: Sequence[int]) -> list[int]:
    """Those ticks that do not lie on each other on a logarithmic axis."""
    shown: list[int] = []
    for number in calls:
        if not shown or number >= 1.2 * shown[-1]:
            shown.append(number)
    return shown
