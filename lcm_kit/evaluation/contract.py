"""The trigger contract: what the trigger brings, what leaks without it, what of the base is forgotten.

The same prompts are drawn with the trigger and without it, from the same noise, by the base and by every
adapter. Where no trigger is known, what is forgotten is measured on the control prompts alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lcm_kit.evaluation.cells import Cell
from lcm_kit.evaluation.measure import Figure, Figures, compare
from lcm_kit.evaluation.result_shapes import Contract, ContractRow
from lcm_kit.evaluation.results import BARE, CONTROL, MAIN
from lcm_kit.io.own_shapes import Interval

WAY, CHANGED, ADHERENCE = "style_way", "changed", "prompt_adherence"  # in the table of metrics


def contract(
    cells: Sequence[Cell], figures: Mapping[str, Mapping[Cell, Figures]], trigger: str | None,
    confidence: float,
) -> Contract:  # fmt: skip
    """What brand.json says of it, without a verdict: a row for each of `cells` that has an adapter.

    `cells`: the base's first. `figures`: by list of prompts; `BARE` has as many prompts as `MAIN`, so that
    the resamples of both are the same. `trigger`: None where there is no such list.
    """
    rows = [_row(cell, cells[0], figures, confidence) for cell in cells if cell.adapter is not None]
    return {"trigger": trigger, "verdict": None, "rows": rows}


def _row(
    cell: Cell, base: Cell, figures: Mapping[str, Mapping[Cell, Figures]], confidence: float
) -> ContractRow:
    bare = figures.get(BARE)
    strength = figures[MAIN][cell].get(WAY) if bare else None
    leak = bare[cell].get(WAY) if bare else None
    share = _share(leak, strength) if leak and strength else None
    changed = (bare or figures[CONTROL])[cell].get(CHANGED)
    return {
        "cell": cell.id,
        "strength": _interval(strength, confidence),
        "leak": _interval(leak, confidence),
        "leak_share": _interval(share, confidence),
        "changed": _interval(changed, confidence),
        "lost": _lost(bare[base], bare[cell], confidence) if bare else None,
        "lost_elsewhere": _lost(figures[CONTROL][base], figures[CONTROL][cell], confidence),
    }


def _share(leak: Figure, strength: Figure) -> Figure | None:
    """The leak over the strength, resample by resample; None where the trigger brings no style.

    Resamples in which it brings none are NaN, and left out of the interval.
    """
    if strength.value <= 0 or leak.resampled is None or strength.resampled is None:
        return None
    found = (leak.resampled / strength.resampled).where(strength.resampled > 0, float("nan"))
    return Figure(leak.value / strength.value, found)


def _lost(base: Figures, mine: Figures, confidence: float) -> Interval | None:
    """By how much the pictures follow their prompts less than the base's."""
    if ADHERENCE not in base or ADHERENCE not in mine:
        return None
    found = compare(base[ADHERENCE], mine[ADHERENCE], confidence)
    return found and {"value": found["difference"], "low": found["low"], "high": found["high"]}


def _interval(figure: Figure | None, confidence: float) -> Interval | None:
    if figure is None:
        return None
    low, high = figure.interval(confidence)
    return {"value": figure.value, "low": low, "high": high}
