"""What an evaluation answers, from its results alone: the cells that matter, and Yes, In part or No."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lcm_kit.evaluation import results as results_of
from lcm_kit.evaluation.result_shapes import Cell, Comparison, Results
from lcm_kit.evaluation.results import BrandRow
from lcm_kit.io.own_shapes import Interval

UNKNOWN = "Judge by eye"
SHOWN = 0.9  # of the prompts of the style must show it
LOST = 0.05  # of the control prompts: losing a larger share of them, or of their CLIP score, is forgetting
CALLED = 0.5  # of the way to the brand's own pictures: less, and the trigger is weak
LEAKING = 0.25  # of what the trigger brings: a larger share that comes without it is a leak
_CALLS = 4  # UNet calls of the comparison that matters
_STEPS = 4  # of the adapter that is held against the brand
# What says how good a plain sampler's pictures are: the first that was measured
PLAIN_BY = ("prompt_adherence", "frechet_biased", "pixel_distance")


# -- evaluation/quality: is the student as good as the teacher? ----------------------------------------------


class Quality(NamedTuple):
    """The comparison that matters: the student near 4 UNet calls, the best plain sampler at as many."""

    teacher: Cell
    student: Cell
    plain: Cell | None  # None where no plain sampler ran at as many calls
    plain_frechet: float | None  # the least of any plain sampler at as many calls
    fewer: float  # UNet calls, teacher's over student's
    faster: float  # seconds, teacher's over student's


def best_plain(results: Results, calls: int, cells: Sequence[Cell] | None = None) -> Cell | None:
    """The base's best cell at `calls` UNet calls: most pictures right, then Frechet, then pixel distance.

    `cells`: those to choose among, all by default.
    """
    return results_of.best_plain(
        results["cells"] if cells is None else cells, calls, PLAIN_BY, results["metrics"]
    )


def lowest_frechet(cells: Sequence[Cell], calls: int) -> float | None:
    """The least Frechet distance of a plain sampler at `calls` UNet calls; None where none was measured.

    It may be another cell than the one that draws most right: without guidance a plain sampler keeps closer
    to the style of real pictures and further from their prompts.
    """
    found = [
        results_of.value(cell, "frechet_biased")
        for cell in results_of.cells_of(cells, "plain")
        if cell["unet_calls"] == calls
    ]
    return min((each for each in found if each is not None), default=None)


def has_student(results: Results) -> bool:
    """Whether an adapter was evaluated, not a base alone."""
    return bool(results_of.cells_of(results["cells"], "student"))


def quality_headline(results: Results) -> Quality:
    """The cells to compare; there is a student."""
    cells, teacher = results["cells"], results_of.reference(results)
    student = min(results_of.cells_of(cells, "student"), key=lambda cell: abs(cell["unet_calls"] - _CALLS))
    calls = student["unet_calls"]
    seconds = [results_of.value(cell, "seconds") or 0.0 for cell in (teacher, student)]
    return Quality(
        teacher, student, best_plain(results, calls), lowest_frechet(cells, calls),
        teacher["unet_calls"] / calls, seconds[0] / seconds[1] if seconds[1] else float("inf"),
    )  # fmt: skip


def quality_verdict(results: Results) -> str | None:
    """Yes: within 10 points of the teacher, and at most half of any plain sampler's Frechet distance.

    None without a student.
    """
    if not has_student(results):
        return None
    head = quality_headline(results)
    right, wanted = (results_of.value(cell, "prompt_adherence") for cell in (head.student, head.teacher))
    if head.plain is None or right is None or wanted is None:
        return UNKNOWN
    plain, frechet = (
        results_of.value(head.plain, "prompt_adherence"),
        results_of.value(head.student, "frechet_biased"),
    )
    better = plain is not None and right > plain
    near = frechet is not None and head.plain_frechet is not None and frechet <= 0.5 * head.plain_frechet
    if right >= wanted - 0.10 and better and near:
        return "Yes"
    return "In part" if better else "No"


# -- evaluation/brand: does it draw in the style, and what was forgotten? ------------------------------------


class More(NamedTuple):
    """Shares of right pictures on more control prompts than evaluation/brand has: of a quality evaluation."""

    base: float
    adapter: float
    n: int


class Brand(NamedTuple):
    """The rows to compare."""

    base: BrandRow
    styled: BrandRow | None  # None: evaluated without a style
    adapter: BrandRow  # nearest to 4 steps
    nearer: Comparison | None  # brand similarity, the adapter's less the base's
    more: More | None
    n: int  # prompts of the style


def brand_headline(results: Results, quality: Results | None = None) -> Brand:
    """The rows of evaluation/brand to compare; `quality`: a quality evaluation of the same run, which may
    have more prompts that do not name the style.
    """
    rows = results_of.brand_rows(results)
    base, styled = (next((row for row in rows if row["name"] == name), None) for name in ("base", "styled"))
    assert base is not None  # `results.compares_brand` has looked
    adapter = min(
        (row for row in rows if row["name"] == "adapter"), key=lambda row: abs(row["steps"] - _STEPS)
    )
    nearer = results_of.difference(results, adapter["id"], base["id"], "brand_similarity")
    more = _more(adapter["steps"], quality, results_of.count(results, results_of.CONTROL))
    return Brand(base, styled, adapter, nearer, more, len(results_of.prompts(results)["texts"]))


def _more(steps: int, quality: Results | None, known: int) -> More | None:
    if quality is None or results_of.count(quality) <= known:
        return None
    students = results_of.cells_of(quality["cells"], "student")
    student = next((cell for cell in students if cell["steps"] == steps), None)
    if student is None:
        return None
    base, adapter = (
        results_of.value(cell, "prompt_adherence") for cell in (results_of.reference(quality), student)
    )
    return None if base is None or adapter is None else More(base, adapter, results_of.count(quality))


def brand_verdict(head: Brand, adherence: str) -> str:
    """Yes: nine in ten prompts of the style show it, and the control prompts are not forgotten. No: no
    nearer to the brand than the base, beyond the interval of the paired difference, or no prompt shows it.
    """
    if head.nearer is None:
        return UNKNOWN
    shown = head.adapter["in_style"]
    if head.nearer["low"] <= 0 or (shown is not None and shown["value"] == 0):
        return "No"
    return "In part" if too_few(head) or forgotten(head, adherence) is not None else "Yes"


def too_few(head: Brand) -> bool:
    """Whether less than nine in ten prompts of the style show it; not where that was not measured."""
    shown = head.adapter["in_style"]
    return shown is not None and shown["value"] < SHOWN - 1e-9


def showing(head: Brand, row: BrandRow) -> int | None:
    """How many of the `head.n` prompts of the style show it in a row; None where it was not measured."""
    shown = row["in_style"]
    return None if shown is None else round(shown["value"] * head.n)


def forgotten(head: Brand, adherence: str) -> float | None:
    """How far the adapter is below the base on control prompts, if that is more than `LOST`; else None.

    Of a share that is 5 points, of a CLIP score 5% of the base's. By the larger number of prompts, where a
    quality evaluation has more of them.
    """
    if head.more:
        lost = head.more.base - head.more.adapter
        return lost if lost > LOST + 1e-9 else None
    base, adapter = head.base["control_adherence"], head.adapter["control_adherence"]
    if base is None or adapter is None:
        return None
    lost = base["value"] - adapter["value"]
    return lost if lost > _most(base, adherence) + 1e-9 else None


# -- the trigger contract ------------------------------------------------------------------------------------


class Kept(NamedTuple):
    """What became of the trigger contract; None: not measured, or not asked for."""

    called: bool | None  # the trigger brings the style
    quiet: bool | None  # without it the style stays away
    remembered: bool | None  # what the base draws without it is not forgotten

    @property
    def words(self) -> str:
        """`Kept`, or what is not: `Leaks and forgets`."""
        answers = ((self.called, "weak"), (self.quiet, "leaks"), (self.remembered, "forgets"))
        if all(kept is None for kept, _ in answers):
            return UNKNOWN
        broken = [word for kept, word in answers if kept is False]
        said = " and ".join(filter(None, [", ".join(broken[:-1]), *broken[-1:]]))
        return said.capitalize() or "Kept"


def contract_kept(results: Results, quality: Results | None = None) -> Kept | None:
    """What became of the contract with the adapter nearest to 4 steps; None where it was not measured.

    The trigger is weak below `CALLED`, or where its strength is not beyond the interval. It leaks where more
    than `LEAKING` of its strength (where it is weak: of the whole way) comes without it. The base is
    forgotten as in `forgotten`, of the control prompts (`quality`: as in `brand_headline`) or of those
    without the trigger; how far pictures are from the base's does not decide: another may be as good.
    """
    head, adherence = brand_headline(results, quality), results["adherence"]
    if (row := results_of.contract_row(results, head.adapter["id"])) is None:
        return None
    strength, leak = row["strength"], row["leak"]
    called = None if strength is None else strength["low"] > 0 and strength["value"] >= CALLED
    much = (row["leak_share"] if called else None) or leak
    quiet = None if much is None else much["value"] <= LEAKING + 1e-9
    answers = []
    if row["lost_elsewhere"] or head.more:
        answers.append(forgotten(head, adherence) is None)
    cell = results_of.by_id(results, f"{results_of.BARE}-{head.base['id']}")
    right = cell and results_of.figure(cell, "prompt_adherence")
    if row["lost"] and right:
        answers.append(row["lost"]["value"] <= _most(right, adherence) + 1e-9)
    return Kept(called, quiet, all(answers) if answers else None)


def _most(right: Interval, adherence: str) -> float:
    """How much of what the base gets may be lost: of a share in points, of a CLIP score a share of it."""
    return LOST * right["value"] if adherence == "clip" else LOST


def contract_verdict(results: Results) -> str | None:
    """Kept, or what is not kept; None where it was not measured."""
    found = contract_kept(results)
    return found and found.words
