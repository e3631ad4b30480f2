"""Which settings to use, why, and when not to use the adapter at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from lcm_kit.config.resolution import Resolution, shown
from lcm_kit.evaluation.cells import Cell
from lcm_kit.evaluation.measure import Figures, compare
from lcm_kit.evaluation.metric_table import METRICS
from lcm_kit.evaluation.swept_adapters import SweptAdapter
from lcm_kit.samplers import title_of

Kind = Literal[
    "failed_to_load",
    "no_effect",
    "off_target",
    "collapsed",
    "blurred",
    "noisy",
    "over_saturated",
    "worse_than_plain",
]
# A cell outside of these looks broken to a person, whatever its prompts say (docs/guidance.md has pictures)
LEAST_DIVERSITY = 0.5  # of the teacher's
LEAST_SHARPNESS, MOST_SHARPNESS = 0.5, 4.0
MOST_SATURATION = 1.5
MOST_OFF_TARGET = 1.5
MOST_CLIPPED = 0.25  # share of values, beyond the teacher's own
MARGIN = 0.02  # of the best cell's prompt adherence that a cheaper one may lose
NO_EFFECT = 0.02  # distance from the base alone with the same sampler, over the base's from the teacher
BREAKS = {"saturation": 1.25, "clipped": 0.05}  # guidance hurts: colours beyond this, over those at 1


@dataclass(frozen=True)
class Objection:
    """Why an adapter, at the settings that were swept, should not be used."""

    adapter: str
    kind: Kind
    sentence: str


@dataclass(frozen=True)
class Recommendation:
    """What recommended.json holds; `cell` None: none of the settings can be recommended."""

    sentence: str
    adapter: str | None = None
    cell: str | None = None
    sampler: str | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    lora_weight: float | None = None
    reasons: tuple[str, ...] = ()
    warnings: tuple[Objection, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """As it stands in results.json."""
        return asdict(self)


@dataclass(frozen=True)
class Sweep:
    """All that was measured."""

    cells: Mapping[Cell, Figures]
    reference: Cell
    subjects: Sequence[SweptAdapter]
    confidence: float
    extra: Mapping[str, float] = field(default_factory=dict)  # adapter -> distance from the base alone
    resolution: Resolution | None = None

    def of(self, name: str) -> list[Cell]:
        """The cells of an adapter."""
        return [cell for cell in self.cells if cell.adapter == name]

    def usual_guidance(self, name: str) -> float:
        """An adapter's guidance_scale beside the teacher: 1, or the teacher's where none is baked in."""
        method = next(subject.method for subject in self.subjects if subject.name == name)
        return method.guidance_beside(self.reference.guidance_scale)

    @property
    def quality(self) -> str:
        """The metric that cells are chosen by: prompts where they are read, else the style of the samples."""
        has_prompts = "prompt_adherence" in self.cells[self.reference]
        return "prompt_adherence" if has_prompts else "kernel_teacher"

    def better(self, a: Cell, b: Cell, key: str) -> bool:
        """Whether `a` is better than `b` in `key` beyond the interval of their difference."""
        first, second = self.cells[a].get(key), self.cells[b].get(key)
        found = compare(first, second, self.confidence) if first and second else None
        if found is None:
            return False
        return found["low"] > 0 if METRICS[key].better == "higher" else found["high"] < 0


def recommend(sweep: Sweep) -> Recommendation:
    """The cheapest cell that is as good as the best of the healthy ones.

    As good: prompts are followed within `MARGIN` of the best and not less beyond the interval of the paired
    difference (without the margin, few prompts would speak for cheap settings), and the intervals of the
    kernel distance to the teacher's samples overlap. Of equal UNet calls the better one wins. An adapter with
    a warning is never recommended.
    """
    warnings = tuple(warning for subject in sweep.subjects for warning in warn(sweep, subject))
    excluded = {warning.adapter for warning in warnings}
    healthy = [
        cell for cell in sweep.cells
        if cell.kind == "student" and cell.adapter not in excluded and fault(sweep, cell) is None
    ]  # fmt: skip
    if not healthy:
        why = " ".join(warning.sentence for warning in warnings) or "Every setting looks broken."
        return Recommendation(f"None of these settings can be recommended. {why}", warnings=warnings)
    best = max(healthy, key=lambda cell: _goodness(sweep, cell))
    equal = [cell for cell in healthy if cell == best or _as_good(sweep, cell, best)]
    calls = min(cell.unet_calls for cell in equal)
    chosen = max(
        (cell for cell in equal if cell.unet_calls == calls), key=lambda cell: _goodness(sweep, cell)
    )
    return Recommendation(
        sentence=f"{use_at(sweep.resolution)} {words(chosen, sweep)}.",
        adapter=chosen.adapter, cell=chosen.id, sampler=chosen.sampler, steps=chosen.steps,
        guidance_scale=chosen.guidance_scale, lora_weight=chosen.lora_weight,
        reasons=tuple(_reasons(sweep, chosen, best)), warnings=warnings,
    )  # fmt: skip


def _goodness(sweep: Sweep, cell: Cell) -> tuple[float, float]:
    figure = sweep.cells[cell].get(sweep.quality)
    if figure is None:
        return float("-inf"), _look(sweep, cell)
    sign = 1 if METRICS[sweep.quality].better == "higher" else -1
    return sign * figure.value, _look(sweep, cell)


def _look(sweep: Sweep, cell: Cell) -> float:
    """Minus the kernel distance to the teacher's samples: higher is better."""
    figure = sweep.cells[cell].get("kernel_teacher")
    return float("-inf") if figure is None else -figure.value


def _as_good(sweep: Sweep, cell: Cell, best: Cell) -> bool:
    if sweep.better(best, cell, sweep.quality):
        return False
    asked, most = (sweep.cells[each].get("prompt_adherence") for each in (cell, best))
    if asked is not None and most is not None and asked.value < (1 - MARGIN) * most.value:
        return False
    mine, its = (sweep.cells[each].get("kernel_teacher") for each in (cell, best))
    if mine is None or its is None:
        return True
    return mine.interval(sweep.confidence)[0] <= its.interval(sweep.confidence)[1]


def use_at(resolution: Resolution | None) -> str:
    """How a recommendation begins: what was measured on other shapes than squares is said to be for those."""
    return f"For pictures of {shown(resolution)} pixels use" if isinstance(resolution, tuple) else "Use"


def words(cell: Cell, sweep: Sweep) -> str:
    """The settings in words, with the adapter's name where there are several."""
    guided = "a second UNet call a step"
    if cell.guidance_scale == 1:
        baked = sweep.usual_guidance(str(cell.adapter)) == 1
        guided = "no guidance beyond what is baked in" if baked else "no guidance"
    who = f"{cell.adapter} with " if len(sweep.subjects) > 1 else ""
    return (
        f"{who}{_steps(cell.steps)} of {title_of(cell.sampler)}, guidance_scale {cell.guidance_scale:g} "
        f"({guided}), LoRA weight {cell.lora_weight:g}"
    )


def _steps(n: int) -> str:
    return f"{n} step" + ("s" if n != 1 else "")


def _reasons(sweep: Sweep, chosen: Cell, best: Cell) -> list[str]:
    """What speaks for the choice, in figures."""
    key, found = sweep.quality, []
    label = METRICS[key].label
    mine = sweep.cells[chosen].get(key)
    if mine is not None:
        low, high = mine.interval(sweep.confidence)
        level = sweep.cells[sweep.reference].get(key)
        beside = (
            f"; the teacher at {sweep.reference.unet_calls} UNet calls: {level.value:.3g}" if level else ""
        )
        found.append(f"{label} {mine.value:.3g} ({low:.3g} to {high:.3g}{beside})")
    if chosen != best:
        found.append(
            f"{best.unet_calls} UNet calls ({words(best, sweep)}) are better by no more than the sweep can "
            "tell apart"
        )
    plain = best_plain(sweep, chosen.unet_calls)
    if plain is not None and mine is not None:
        other = sweep.cells[plain][key].value
        verdict = "better" if sweep.better(chosen, plain, key) else "no better, as far as the sweep can tell,"
        found.append(
            f"{verdict} than the best plain sampler at the same {plain.unet_calls} UNet calls "
            f"({title_of(plain.sampler)}: {other:.3g})"
        )
    guidance = sweep.cells[chosen].get("effective_guidance")
    if guidance is not None:
        low, high = guidance.interval(sweep.confidence)
        misfit = sweep.cells[chosen]["guidance_misfit"].value
        far = "" if misfit < 1 else ", though not near: the teacher's at its ends are closer to each other"
        found.append(
            f"its pictures are nearest to the teacher's at guidance_scale {low:.3g} to {high:.3g}{far}"
        )
    return found


def best_plain(sweep: Sweep, calls: int) -> Cell | None:
    """The base's best cell without an adapter at this number of UNet calls."""
    cells = [cell for cell in sweep.cells if cell.kind == "plain" and cell.unet_calls == calls]
    return max(cells, key=lambda cell: _goodness(sweep, cell), default=None)


# -- What is wrong -------------------------------------------------------------------------------------------


def fault(sweep: Sweep, cell: Cell) -> tuple[Kind, str] | None:
    """What is wrong with the style of a cell: its kind and the figures; None if nothing is."""
    figures, teacher = sweep.cells[cell], sweep.cells[sweep.reference]

    def over(key: str) -> float | None:
        mine, its = figures.get(key), teacher.get(key)
        return None if mine is None or its is None or not its.value else mine.value / its.value

    far = figures.get("off_target")
    if far is not None and not far.value <= MOST_OFF_TARGET:  # NaN too
        return (
            "off_target",
            f"pictures {far.value:.1f} times as far from the teacher's as those of other prompts",
        )
    if (ratio := over("diversity")) is not None and ratio < LEAST_DIVERSITY:
        return "collapsed", f"pictures of one prompt differ {ratio:.0%} as much as the teacher's"
    saturation, clipped = figures["saturation"].value, figures["clipped"].value
    if saturation > MOST_SATURATION:
        return "over_saturated", f"colours {saturation:.2f} times as strong as the teacher's"
    if clipped > teacher["clipped"].value + MOST_CLIPPED:
        return "over_saturated", f"{clipped:.0%} of the values at black or white"
    sharp = figures["sharpness"].value
    if sharp < LEAST_SHARPNESS:
        return "blurred", f"{sharp:.0%} of the teacher's sharpness"
    if sharp > MOST_SHARPNESS:
        return "noisy", f"{sharp:.1f} times the teacher's finest detail: noise"
    return None


def warn(sweep: Sweep, subject: SweptAdapter) -> list[Objection]:
    """Why `subject` should not be used; empty if nothing speaks against it."""
    name, cells = subject.name, sweep.of(subject.name)
    if subject.fault is not None:
        return [Objection(name, "failed_to_load", f"{name} does not load whole: {subject.fault}.")]
    if (moved := sweep.extra.get(name)) is not None and moved < NO_EFFECT:
        return [
            Objection(name, "no_effect", f"{name} has no effect: its pictures are those of the base alone.")
        ]
    faults = [found for cell in cells if (found := fault(sweep, cell)) is not None]
    if len(faults) == len(cells):
        kinds = [kind for kind, _ in faults]
        kind = max(kinds, key=kinds.count)
        example = next(words_ for kind_, words_ in faults if kind_ == kind)
        return [Objection(name, kind, f"{name} is broken at every setting that was swept: {example}.")]
    return [warning for warning in (_against_plain(sweep, name),) if warning]


def _against_plain(sweep: Sweep, name: str) -> Objection | None:
    """A warning if at every budget that plain samplers were drawn at, the best of them beats the adapter."""
    key, lost = sweep.quality, []
    for calls in sorted({cell.unet_calls for cell in sweep.of(name)}):
        plain = best_plain(sweep, calls)
        if plain is None or key not in sweep.cells[plain]:
            continue
        mine = max((c for c in sweep.of(name) if c.unet_calls == calls), key=lambda c: _goodness(sweep, c))
        if not sweep.better(plain, mine, key):
            return None
        lost.append(f"{calls}")
    if not lost:
        return None
    return Objection(
        name, "worse_than_plain",
        f"{name} is worse than plain samplers of the base at as many UNet calls ({', '.join(lost)}).",
    )  # fmt: skip


# -- Where guidance begins to hurt ---------------------------------------------------------------------------


def breaks(sweep: Sweep, name: str) -> list[dict[str, Any]]:
    """For each sampler, weight and number of steps: the least guidance_scale that hurts, and how.

    It hurts where prompts are followed less, beyond the interval of the paired difference, or where colours
    are stronger or more clipped by `BREAKS`, than at the usual guidance, above which it is looked for.
    """
    found, usual = [], sweep.usual_guidance(name)
    groups = dict.fromkeys((cell.sampler, cell.lora_weight, cell.steps) for cell in sweep.of(name))
    for sampler, weight, steps in groups:
        row = sorted(
            (c for c in sweep.of(name) if (c.sampler, c.lora_weight, c.steps) == (sampler, weight, steps)),
            key=lambda cell: cell.guidance_scale,
        )
        start = next((cell for cell in row if cell.guidance_scale == usual), None)
        above = [cell for cell in row if start and cell.guidance_scale > usual]
        hurt = next(((c, why) for c in above if start and (why := _hurt(sweep, start, c))), None)
        if hurt is not None:
            scale, why = hurt[0].guidance_scale, hurt[1]
            sentence = f"{title_of(sampler)}, {_steps(steps)}: from guidance_scale {scale:g} on {why}"
            found.append({
                "sampler": sampler, "steps": steps, "lora_weight": weight, "guidance_scale": scale,
                "sentence": sentence,
            })  # fmt: skip
    return found


def _hurt(sweep: Sweep, start: Cell, cell: Cell) -> str | None:
    a, b = sweep.cells[start], sweep.cells[cell]
    if sweep.better(start, cell, "prompt_adherence"):
        before, after = a["prompt_adherence"].value, b["prompt_adherence"].value
        return f"prompts are followed less ({before:.3g} to {after:.3g})"
    if b["saturation"].value > BREAKS["saturation"] * a["saturation"].value:
        times = b["saturation"].value / a["saturation"].value
        return f"colours are {times:.2f} times as strong"
    if b["clipped"].value > a["clipped"].value + BREAKS["clipped"]:
        return f"more values are black or white ({a['clipped'].value:.0%} to {b['clipped'].value:.0%})"
    return None
