"""What `tools/gpu_check.py` measured, as lines for a terminal and as a Markdown table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Figures = Mapping[str, Any]
# The share of 120 pictures that are all right after the tiny cases' distillation on a CPU in float32,
# as `python tools/gpu_check.py tiny-cpu` measured it on 29 November 2026
RIGHT_ON_A_CPU = 0.983


def _train(f: Figures) -> list[str]:
    if "samples_per_second" not in f:
        return [f"first step after {f['first_step_after_s']:.0f} s"] if "first_step_after_s" in f else []
    words = [f"{f['samples_per_second']:.3g} samples/s", f"{f['step_ms']:.4g} ms a step"]
    return [*words, f"first step after {f['first_step_after_s']:.0f} s"]


def _tiny(f: Figures) -> list[str]:
    words = _train(f)
    if f.get("right_at_4") is not None:
        known = f"{RIGHT_ON_A_CPU:.1%} on a CPU, teacher {f['right_of_teacher']:.1%}"
        words.append(f"{f['right_at_4']:.1%} of {f['judged']} right at 4 steps ({known})")
    return words


def _sample(f: Figures) -> list[str]:
    names = (("ms_of_1", "a picture"), ("ms_of_4", "four at once"))
    return [f"{f[key]:.4g} ms {what}" for key, what in names if key in f]


def _encode(f: Figures) -> list[str]:
    return [f"{f['pictures_per_second']:.3g} pictures/s"] if "pictures_per_second" in f else []


def _pair(f: Figures) -> list[str]:
    sides = [
        f"{side} {f[f'{side}_samples_per_second']:.3g} samples/s"
        + (f" in {f[f'{side}_peak_gib']:.1f} GiB" if f"{side}_peak_gib" in f else "")
        for side in ("ours", "baseline")
        if f"{side}_samples_per_second" in f
    ]
    return [*sides, f"{f['ratio']:.2f} times the speed"] if "ratio" in f else sides


def _plan(f: Figures) -> list[str]:
    return [f"{key.removesuffix('_gib')} {value:.1f} GiB" for key, value in f.items()]


# By how a case's name begins
WORDS: dict[str, Callable[[Figures], list[str]]] = {
    "encode": _encode, "sample": _sample, "tiny": _tiny, "pair": _pair, "plan": _plan,
}  # fmt: skip


def words_of(row: Mapping[str, Any]) -> str:
    """What came out, in words: the figures that there are, and why there are no more."""
    figures = row.get("figures", {})
    found = WORDS.get(row["case"].split("-")[0], _train)(figures)
    if row["status"] == "limit":
        found.append(f"not done within {row['limit']:.0f} s")
    elif row["status"] != "done":
        found.append(f"{row['status']}: {row['reason']}")
    return ", ".join(found)


def _memory(figures: Figures) -> list[str]:
    if "peak_gib" in figures:
        return [f"{figures['peak_gib']:.1f}", f"{figures['reserved_gib']:.1f}"]
    return ["", ""]


def line(row: Mapping[str, Any]) -> str:
    """One line for a terminal."""
    peak, reserved = _memory(row.get("figures", {}))
    memory = f", {peak} GiB ({reserved} reserved)" if peak else ""
    spent = f"{row['seconds']:>5.0f} s" if "seconds" in row else " " * 7
    return f"{row['case']:<24} {spent}  {words_of(row)}{memory}"


def _title(row: Mapping[str, Any]) -> str:
    told = row["machine"]
    driver = f", driver {told['driver']}" if told["driver"] else ""
    rehearsed = " (a rehearsal in small: none of it counts)" if row["rehearsed"] else ""
    return (
        f"{told['card']}{driver}, torch {told['torch']}, diffusers {told['diffusers']}, lcm-kit "
        f"{told['lcm_kit']}, {row['date']}{rehearsed}:"
    )


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table for each machine and date, the newest row of each case; what was left out is left out."""
    tables: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        if "machine" in row:
            tables.setdefault(_title(row), {})[row["case"]] = row
    return "\n\n".join(f"{title}\n\n{_table(found)}" for title, found in tables.items())


def _table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    planned = rows.get("plan", {}).get("figures", {})
    lines = [
        "| case | batch, precision | measured | peak GiB | reserved | `plan` says |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in rows.items():
        if name == "plan":
            continue
        figures = row.get("figures", {})
        size = ", ".join(str(figures[key]) for key in ("batch", "precision") if key in figures)
        told = planned.get(f"{name}_gib")
        cells = [name, size, words_of(row), *_memory(figures), "" if told is None else f"{told:.1f}"]
        lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    return "\n".join(lines)
