"""Cells held against each other, sample by sample, on the same resamples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from lcm_kit.evaluation.cells import Cell
from lcm_kit.evaluation.measure import Figures, compare
from lcm_kit.evaluation.recommend import Sweep, best_plain
from lcm_kit.evaluation.result_shapes import Comparison

Pair = tuple[tuple[str, Figures], tuple[str, Figures]]  # two cells' ids and figures


def differences(pairs: Iterable[Pair], confidence: float) -> list[Comparison]:
    """Every metric that both cells of a pair have, the first less the second."""
    rows: list[Comparison] = []
    for (a, mine), (b, other) in pairs:
        for key in mine:
            found = compare(mine[key], other[key], confidence) if key in other else None
            if found is not None:
                rows.append({"a": a, "b": b, "metric": key, **found})
    return rows


def comparisons(sweep: Sweep) -> list[Comparison]:
    """Adapters at the same settings, and each adapter's cell at its usual guidance against the best plain
    sampler at the same number of UNet calls.
    """
    pairs = (((a.id, sweep.cells[a]), (b.id, sweep.cells[b])) for a, b in _pairs(sweep))
    return differences(pairs, sweep.confidence)


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
        usual = cell.guidance_scale == sweep.usual_guidance(str(cell.adapter))
        plain = best_plain(sweep, cell.unet_calls) if usual else None
        if plain is not None:
            yield cell, plain
