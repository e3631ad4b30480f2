"""Cells held against each other, sample by sample, on the same resamples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lcm_kit.sweep.cells import Cell
from lcm_kit.sweep.measure import compare
from lcm_kit.sweep.recommend import Sweep, best_plain


def comparisons(sweep: Sweep) -> list[dict[str, Any]]:
    """Every metric of every pair: adapters at the same settings, and each adapter's cell without guidance of
    its own against the best plain sampler at the same number of UNet calls. `difference` is a - b.
    """
    rows = []
    for a, b in _pairs(sweep):
        first, second = sweep.cells[a], sweep.cells[b]
        for key in first:
            found = compare(first[key], second[key], sweep.confidence) if key in second else None
            if found is not None:
                rows.append({"a": a.id, "b": b.id, "metric": key, **found})
    return rows


def _pairs(sweep: Sweep) -> Iterator[tuple[Cell, Cell]]:
    names = [subject.name for subject in sweep.subjects]
    for cell in sweep.cells:
        if cell.kind != "student":
            continue
        for other in sweep.cells:
            same = (cell.sampler, cell.steps, cell.guidance_scale, cell.lora_weight) == (
                other.sampler, other.steps, other.guidance_scale, other.lora_weight,
            )  # fmt: skip
            if (
                other.kind == "student"
                and same
                and names.index(str(cell.adapter)) < names.index(str(other.adapter))
            ):
                yield cell, other
        plain = best_plain(sweep, cell.unet_calls) if cell.guidance_scale == 1 else None
        if plain is not None:
            yield cell, plain
