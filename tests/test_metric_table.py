"""The table of metrics as a whole: which evaluation measures what, and that few prompts break none."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lcm_kit.evaluation import results
from lcm_kit.evaluation.cells import Cell
from lcm_kit.evaluation.kept import Rows
from lcm_kit.evaluation.measure import Drawn, Ruler
from lcm_kit.evaluation.metric_table import METRICS, as_json, figures, measure, metrics_of, per_picture
from lcm_kit.evaluation.metrics.bootstrap import Resamples
from lcm_kit.evaluation.metrics.distance import rms

TEACHER, STUDENT = Cell("teacher", None, "ddim", 50, 5.0), Cell("student", "a", "lcm", 4, 1.0)


def rows(count: int, seed: int) -> Rows:
    g = torch.Generator().manual_seed(seed)
    picture = torch.randint(256, (count, 3, 8, 8), generator=g, dtype=torch.uint8)
    return {
        "latents": torch.randn(count, 4, 2, 2, generator=g), "features": torch.rand(count, 5, generator=g),
        "adherence": torch.rand(count, generator=g).round(), "chroma": torch.rand(count, generator=g) + 0.1,
        "clipped": torch.rand(count, generator=g), "sharpness": torch.rand(count, generator=g) + 0.1,
        "seconds": torch.full((count,), 0.25), "joules": torch.full((count,), float("nan")),
        "pictures": picture,
    }  # fmt: skip


def drawn(count: int, cell: Cell = STUDENT, real: int = 16) -> Drawn:
    teacher = rows(count, 0)
    index = Resamples.draw(count, rounds=100)
    ruler = Ruler(index, teacher, 0.95, real=torch.rand(real, 5, generator=torch.Generator().manual_seed(9)))
    return Drawn(cell, teacher if cell == TEACHER else rows(count, 1), ruler)


def test_what_only_one_evaluation_can_measure_is_its_own() -> None:
    """All pictures are kept by quality alone, and the base draws the style's prompts in brand's alone."""
    only = ["object_accuracy", "colour_accuracy", "pattern_accuracy", "pixel_distance", "frechet_biased"]
    style = ["in_style", "style_way", "changed"]
    rest = [key for key in METRICS if key not in [*only, *style]]
    assert list(metrics_of(results.QUALITY)) == [key for key in METRICS if key not in style]
    assert list(metrics_of(results.BRAND)) == [key for key in METRICS if key not in only]
    for recipe in (results.SWEEP, results.COMPOSE):
        assert list(metrics_of(recipe)) == rest


@pytest.mark.parametrize("count", [2, 3, 20])
def test_few_prompts_leave_out_what_they_cannot_bear(count: int) -> None:
    found = figures(drawn(count), results.QUALITY)
    sets = {"frechet_real", "kernel_real", "frechet_teacher", "kernel_teacher"}
    assert (sets <= found.keys()) == (count >= 3) and (sets & found.keys() == set()) == (count < 3)
    assert {"frechet_biased", "prompt_adherence", "pixel_distance", "saturation", "seconds"} <= found.keys()
    assert not {"energy", "cost_1000", "diversity", "brand_similarity", "effective_guidance"} & found.keys()
    assert not {"latent_distance", "feature_distance"} & found.keys()  # LCM draws noise on its way
    for figure in found.values():
        low, high = figure.interval(0.95)
        assert low <= high


def test_a_style_is_told_from_the_base_and_not_from_the_reference() -> None:
    """Beside a style LoRA the reference is the styled teacher, from which no style can be told."""
    few = drawn(4, TEACHER)
    plain, brand = torch.zeros(4, 5), torch.ones(6, 5)
    styled = few.rows | {"features": torch.ones(4, 5)}
    ruler = replace(few.ruler, reference=styled, brand=(brand, plain))
    assert "in_style" not in figures(Drawn(TEACHER, styled, ruler), results.BRAND)
    ruler = replace(ruler, unstyled=plain)
    assert figures(Drawn(TEACHER, styled, ruler), results.BRAND)["in_style"].value == 1
    half = few.rows | {"features": torch.tensor([[0.4], [0.6], [0.0], [1.0]]).expand(4, 5)}
    assert figures(Drawn(STUDENT, half, ruler), results.BRAND)["in_style"].value == 0.5


def test_one_prompt_has_figures_too() -> None:
    alone = drawn(1)
    alone = Drawn(STUDENT, alone.rows, Ruler(alone.ruler.resamples, alone.ruler.reference, 0.95))
    assert figures(alone, results.QUALITY)["seconds"].value == 0.25


def test_pixels_are_compared_where_all_are_kept() -> None:
    whole = drawn(20)
    found = figures(whole, results.QUALITY)["pixel_distance"]
    mine, teacher = (rows_["pictures"] / 127.5 - 1 for rows_ in (whole.rows, whole.ruler.reference))
    assert found.value == pytest.approx(float(rms(mine, teacher).mean()), rel=1e-6)
    assert figures(drawn(20, TEACHER), results.QUALITY)["pixel_distance"].value == 0
    shown = {**whole.rows, "pictures": whole.rows["pictures"][:3]}
    assert "pixel_distance" not in figures(Drawn(STUDENT, shown, whole.ruler), results.QUALITY)


def test_every_metric_is_there_null_where_it_is_no_number() -> None:
    one = drawn(3)
    one.rows["chroma"][0] = float("nan")
    found = as_json(measure({STUDENT: one.rows}, one.ruler, results.SWEEP)[STUDENT], 0.95, results.SWEEP)
    assert list(found) == list(metrics_of(results.SWEEP))
    assert found["saturation"] is None and found["energy"] is None and found["clipped"] is not None
    assert list(per_picture(results.SWEEP, one.rows)) == [
        "adherence", "chroma", "clipped", "sharpness", "seconds", "joules"
    ]  # fmt: skip
