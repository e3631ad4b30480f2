"""What a sweep recommends, on made-up figures: each limit from both sides, by value."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lcm_kit.evaluation.cells import Cell
from lcm_kit.evaluation.measure import Figure, Figures
from lcm_kit.evaluation.recommend import Sweep, best_plain, breaks, fault, recommend, warn
from lcm_kit.evaluation.swept_adapters import SweptAdapter

TEACHER = Cell("teacher", None, "ddim", 50, 3.0)
HEALTHY = {"saturation": 1.0, "clipped": 0.0, "sharpness": 1.0, "diversity": 0.4, "off_target": 0.5}


def student(steps: int, guidance: float = 1.0, name: str = "lora") -> Cell:
    return Cell("student", name, "lcm", steps, guidance)


def plain(steps: int, sampler: str = "ddim") -> Cell:
    return Cell("plain", None, sampler, steps, 1.0)


def figures(**changes: float | Figure) -> Figures:
    """A healthy cell's; a bare number has no resamples, so nothing is better than it beyond its interval."""
    values: Mapping[str, float | Figure] = {**HEALTHY, **changes}
    return {key: each if isinstance(each, Figure) else Figure(each) for key, each in values.items()}


def sweep(cells: Mapping[Cell, Figures], moved: float = 1.0, broken: str | None = None) -> Sweep:
    """Of one adapter, `moved` from the base alone; the teacher's own clipping is 0.1, its diversity 0.4."""
    subject = SweptAdapter("lora", Path("lora.safetensors"), "", "", 1, broken)
    teacher = figures(clipped=0.1, prompt_adherence=30.0)
    return Sweep({TEACHER: teacher, **cells}, TEACHER, [subject], 0.95, {"lora": moved})


def spread(value: float, by: float = 0.0) -> Figure:
    """A figure whose resamples lie evenly within `by` of it."""
    return Figure(value, value + by * torch.linspace(-1, 1, 101, dtype=torch.float64))


def chosen(cells: Mapping[Cell, Figures]) -> str | None:
    return recommend(sweep(cells)).cell


# -- What looks broken ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "fine", "bad", "kind"),
    [
        ("saturation", 1.499, 1.501, "over_saturated"),
        ("clipped", 0.349, 0.351, "over_saturated"),  # 0.25 beyond the teacher's 0.1
        ("diversity", 0.201, 0.199, "collapsed"),  # half of the teacher's 0.4
        ("sharpness", 0.501, 0.499, "blurred"),
        ("sharpness", 3.99, 4.01, "noisy"),
        ("off_target", 1.499, 1.501, "off_target"),
        ("off_target", 1.499, math.nan, "off_target"),
    ],
)
def test_each_fault_from_both_sides_of_its_limit(key: str, fine: float, bad: float, kind: str) -> None:
    whole = sweep({student(1): figures(**{key: bad}), student(2): figures(**{key: fine})})
    assert fault(whole, student(2)) is None
    found = fault(whole, student(1))
    assert found is not None and found[0] == kind
    assert recommend(whole).cell == student(2).id  # what looks broken is not, though cheaper


@pytest.mark.parametrize(
    ("key", "at"),
    [("saturation", 1.5), ("clipped", 0.1 + 0.25), ("diversity", 0.2), ("sharpness", 0.5),
     ("sharpness", 4.0), ("off_target", 1.5)],
)  # fmt: skip
def test_a_figure_at_its_limit_passes(key: str, at: float) -> None:
    assert fault(sweep({student(1): figures(**{key: at})}), student(1)) is None


def test_a_teacher_without_diversity_condemns_nobody() -> None:
    one = sweep({student(1): figures(diversity=0.0)})
    still = Sweep({**one.cells, TEACHER: figures(diversity=0.0)}, TEACHER, one.subjects, 0.95)
    assert fault(one, student(1)) is not None and fault(still, student(1)) is None


def test_an_adapter_is_warned_of_only_if_every_setting_is_broken() -> None:
    bad, blurred = figures(saturation=2.0), figures(sharpness=0.1)
    whole = sweep({student(1): bad, student(2): figures(), student(4): bad})
    assert warn(whole, whole.subjects[0]) == []
    whole = sweep({student(1): blurred, student(2): bad, student(4): bad})
    (warning,) = warn(whole, whole.subjects[0])
    assert warning.kind == "over_saturated" and warning.sentence == (
        "lora is broken at every setting that was swept: colours 2.00 times as strong as the teacher's."
    )
    assert recommend(whole).cell is None


@pytest.mark.parametrize(("moved", "kinds"), [(0.019, ["no_effect"]), (0.02, []), (0.021, [])])
def test_an_adapter_that_moves_nothing(moved: float, kinds: list[str]) -> None:
    whole = sweep({student(1): figures()}, moved)
    assert [warning.kind for warning in warn(whole, whole.subjects[0])] == kinds
    assert (recommend(whole).cell is None) == bool(kinds)


def test_a_file_that_does_not_load_whole_comes_before_all_other_faults() -> None:
    whole = sweep({student(1): figures(saturation=9.0)}, 0.0, broken="half of it is missing")
    (warning,) = warn(whole, whole.subjects[0])
    assert warning.kind == "failed_to_load" and "half of it is missing" in warning.sentence


@pytest.mark.parametrize(
    ("resolution", "begins"),
    [(None, "Use 1"), (512, "Use 1"), ((768, 512), "For pictures of 768 × 512 pixels use 1")],
)
def test_what_was_measured_on_a_shape_is_recommended_for_it(resolution: Any, begins: str) -> None:
    found = recommend(replace(sweep({student(1): figures()}), resolution=resolution))
    assert found.sentence.startswith(f"{begins} step of LCM, ")


def test_the_words_of_a_recommendation() -> None:
    one = recommend(sweep({student(1): figures()}))
    assert one.sentence == (
        "Use 1 step of LCM, guidance_scale 1 (no guidance beyond what is baked in), LoRA weight 1."
    )
    assert (one.adapter, one.sampler, one.steps, one.guidance_scale, one.lora_weight) == (
        "lora",
        "lcm",
        1,
        1,
        1,
    )
    subjects = [SweptAdapter(name, Path("f"), "", "", 1, None) for name in ("a", "b")]
    cells = {TEACHER: figures(), student(4, 1.5, "a"): figures(), student(2, 4.0, "b"): figures(saturation=9)}
    both = recommend(Sweep(cells, TEACHER, subjects, 0.95))
    assert both.sentence == (
        "Use a with 4 steps of LCM, guidance_scale 1.5 (a second UNet call a step), LoRA weight 1."
    )
    assert [warning.adapter for warning in both.warnings] == ["b"]


def test_where_nothing_can_be_recommended_it_says_why() -> None:
    none = "None of these settings can be recommended."
    nobody = Sweep({TEACHER: figures()}, TEACHER, [], 0.95)
    assert recommend(nobody).sentence == f"{none} Every setting looks broken."
    assert recommend(sweep({student(1): figures()}, 0.0)).sentence == (
        f"{none} lora has no effect: its pictures are those of the base alone."
    )


# -- What is as good as the best -----------------------------------------------------------------------------


@pytest.mark.parametrize(("adherence", "steps"), [(98.01, 1), (97.99, 4)])
def test_a_cheaper_cell_may_lose_two_hundredths_of_the_adherence(adherence: float, steps: int) -> None:
    cells = {student(1): figures(prompt_adherence=adherence), student(4): figures(prompt_adherence=100.0)}
    assert chosen(cells) == student(steps).id


@pytest.mark.parametrize(("low", "steps"), [(0.0299, 1), (0.03, 1), (0.0301, 4)])
def test_a_cheaper_cells_kernel_interval_must_overlap(low: float, steps: int) -> None:
    dear = figures(prompt_adherence=100.0, kernel_teacher=Figure(0.02, bounds=(0.01, 0.03)))
    cheap = figures(prompt_adherence=99.0, kernel_teacher=Figure(0.04, bounds=(low, 0.05)))
    assert chosen({student(1): cheap, student(4): dear}) == student(steps).id
    # Nearer to the teacher's than the best is no fault
    near = figures(prompt_adherence=99.0, kernel_teacher=Figure(0.005, bounds=(0.004, 0.006)))
    assert chosen({student(1): near, student(4): dear}) == student(1).id


def test_within_the_margin_a_difference_that_is_certain_still_counts() -> None:
    """99 against 100 with one and the same spread: the paired difference is 1 in every resample."""
    cells = {
        student(1): figures(prompt_adherence=spread(99.0, 5)),
        student(4): figures(prompt_adherence=spread(100.0, 5)),
    }
    assert chosen(cells) == student(4).id
    cells[student(1)] = figures(prompt_adherence=Figure(99.0, spread(100.0, 5).resampled))
    assert chosen(cells) == student(1).id


def test_of_equal_calls_the_better_cell_is_recommended() -> None:
    guided, free = student(1, 2.0), student(2)
    assert guided.unet_calls == free.unet_calls == 2
    for one, other in ((guided, free), (free, guided)):
        cells = {one: figures(prompt_adherence=100.0), other: figures(prompt_adherence=99.9)}
        assert chosen(cells) == one.id
    cells = {
        guided: figures(prompt_adherence=99.0, kernel_teacher=0.02),
        free: figures(prompt_adherence=99.0, kernel_teacher=0.01),
    }
    assert chosen(cells) == free.id  # prompts alike: by the style


def test_where_prompts_are_not_read_the_look_decides() -> None:
    def look(value: float) -> Figures:
        return figures(kernel_teacher=spread(value, 0.001))

    teacher = figures()
    whole = Sweep(
        {TEACHER: teacher, student(1): look(0.05), student(2): look(0.01), student(4): look(0.02)}, TEACHER,
        [SweptAdapter("lora", Path("f"), "", "", 1, None)], 0.95,
    )  # fmt: skip
    assert whole.quality == "kernel_teacher"
    assert whole.better(student(2), student(4), "kernel_teacher")
    assert not whole.better(student(4), student(2), "kernel_teacher")
    assert recommend(whole).cell == student(2).id


# -- Against plain samplers ----------------------------------------------------------------------------------


def test_worse_than_plain_needs_every_budget_and_certainty() -> None:
    def adherence(value: float) -> Figures:
        return figures(prompt_adherence=spread(value, 1))

    base = {plain(2): adherence(50.0), plain(4): adherence(60.0)}
    lora = {student(2): adherence(40.0), student(4): adherence(55.0)}
    (warning,) = recommend(sweep({**base, **lora})).warnings
    assert warning.kind == "worse_than_plain" and "at as many UNet calls (2, 4)." in warning.sentence
    # As good at one of the two
    unsure = {**lora, student(4): figures(prompt_adherence=Figure(59.9, spread(60.0, 3).resampled))}
    assert recommend(sweep({**base, **unsure})).warnings == ()
    # A budget that plain samplers were not drawn at says nothing
    assert recommend(sweep({student(8): adherence(1.0)})).warnings == ()


def test_the_best_plain_cell_is_of_equal_calls() -> None:
    whole = sweep({
        plain(4): figures(prompt_adherence=60.0), plain(4, "dpmpp_2m"): figures(prompt_adherence=61.0),
        plain(8): figures(prompt_adherence=99.0), student(4): figures(prompt_adherence=100.0),
    })  # fmt: skip
    assert best_plain(whole, 4) == plain(4, "dpmpp_2m") and best_plain(whole, 2) is None


# -- Where guidance begins to hurt ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "start", "fine", "bad", "said"),
    [
        ("saturation", 0.8, 0.999, 1.001, "colours are 1.25 times as strong"),
        ("clipped", 0.1, 0.149, 0.151, "more values are black or white (10% to 15%)"),
    ],
)
def test_guidance_hurts_from_there_on(key: str, start: float, fine: float, bad: float, said: str) -> None:
    values = {1.0: start, 1.5: fine, 2.0: bad, 3.0: 2 * bad}
    cells = {student(4, g): figures(**{key: value}) for g, value in reversed(values.items())}
    (found,) = breaks(sweep(cells), "lora")
    assert found["guidance_scale"] == 2.0
    assert found["sentence"] == f"LCM, 4 steps: from guidance_scale 2 on {said}"
    del cells[student(4, 1.0)]
    assert breaks(sweep(cells), "lora") == []  # nothing to hold it against


def test_guidance_hurts_where_prompts_are_followed_less() -> None:
    cells = {
        student(1, 1.0): figures(prompt_adherence=spread(30.0, 1)),
        student(1, 2.0): figures(prompt_adherence=Figure(29.0, spread(30.0, 2).resampled)),
        student(1, 3.0): figures(prompt_adherence=spread(28.0, 1)),
    }
    (found,) = breaks(sweep(cells), "lora")
    assert found["sentence"] == "LCM, 1 step: from guidance_scale 3 on prompts are followed less (30 to 28)"
