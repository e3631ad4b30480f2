"""The study of methods (docs/methods.md): its list, its clock, its intervals and tables, all of it once."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scipy import stats

from lcm_kit.errors import UserError
from lcm_kit.evaluation.metrics.bootstrap import Resamples
from lcm_kit.evaluation.metrics.jackknife import jackknife
from studies import methods_tables as tables
from studies.methods import ENTRIES, ROOT, config_of
from studies.methods_measure import Cost, Known, Measured, Study, interval, mean_of, seconds_a_step
from studies.methods_plan import Entry, Plan, read

ROUNDS = 4000


def of(values: torch.Tensor) -> Known:
    """The mean of values of prompts, as the kit's metrics have it."""
    return Known(float(values.double().mean()), Resamples.draw(len(values), 1, ROUNDS, 0).means(values))


def row(entry: str, seed: int, step: int, final: bool = False, steps: int = 4, **figures: float) -> Measured:
    """A training after `step` steps of 16 pictures and 0.5 seconds each."""
    known = {key: Known(value, torch.full((8,), value)) for key, value in figures.items()}
    return Measured(entry, seed, step, 16 * step, 0.5 * step, steps, "lcm", 1.0, final, 8, known)


# -- Intervals -----------------------------------------------------------------------------------------------


def test_of_one_seed_the_interval_is_that_of_its_prompts() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(1)).double()
    middle, low, high = interval([of(values)])
    half = 1.96 * float(values.std()) / 20
    assert middle == pytest.approx(float(values.mean()))
    assert (high - low) / 2 == pytest.approx(half, rel=0.05)


def test_of_seeds_that_differ_the_interval_is_students() -> None:
    """Where prompts say the same in every resample, only the seeds speak."""
    values = [0.2, 0.5, 0.35]
    found = interval([Known(value, torch.full((8,), value)) for value in values])
    wanted = stats.t.interval(0.95, 2, loc=0.35, scale=stats.sem(values))
    assert found == pytest.approx((0.35, *wanted))


def test_both_parts_add_as_squares() -> None:
    g = torch.Generator().manual_seed(2)
    prompts, seeds = torch.randn(300, generator=g), (-0.1, 0.0, 0.1)
    found = interval([of(prompts + shift) for shift in seeds])
    square_p, square_s = float(prompts.var()) / 300, 0.01 / 3
    freedom = (square_p + square_s) ** 2 / (square_s**2 / 2)
    half = stats.t.ppf(0.975, freedom) * math.sqrt(square_p + square_s)
    assert (found[2] - found[1]) / 2 == pytest.approx(half, rel=0.05)


def test_what_varies_with_prompts_cancels_in_differences() -> None:
    """Prompts differ by 1, the methods by 0.1 with an error of 0.01: seen only where they are paired."""
    g = torch.Generator().manual_seed(3)
    prompts = torch.randn(200, generator=g)
    mine, other = of(prompts + 0.1 + 0.01 * torch.randn(200, generator=g)), of(prompts)
    _, low, high = interval([mine.minus(other)])
    assert 0.098 < low < 0.1 < high < 0.102 or 0.097 < low < high < 0.103
    assert interval([mine])[1] < interval([other])[0]  # alone they cannot be told apart


def test_a_jackknife_is_carried_through_mean_and_difference() -> None:
    g = torch.Generator().manual_seed(4)
    a, b = torch.randn(100, generator=g).double(), torch.randn(100, generator=g).double()
    parts = [jackknife(lambda index, x=x: float(x[index].mean()), 100) for x in (a, b, a - b, (a + b) / 2)]
    first, second, less, both = (Known(part.value, None, part) for part in parts)
    assert first.minus(second).error == pytest.approx(less.error)
    assert mean_of([first, second]).error == pytest.approx(both.error)
    assert less.error == pytest.approx(float((a - b).std()) / 10, rel=0.2)  # by 20 groups of five
    assert first.freedom == 19


def test_rounds_without_a_value_are_left_out() -> None:
    assert Known(2.0, torch.tensor([1.0, 3.0, float("nan")])).error == pytest.approx(math.sqrt(2))


# -- The clock -----------------------------------------------------------------------------------------------


def test_what_starting_takes_is_no_training_and_a_resumed_one_has_two_clocks() -> None:
    lines = [
        {"process": "a", "step": 10, "seconds": 25.0}, {"process": "a", "step": 30, "seconds": 35.0},
        {"process": "b", "step": 40, "seconds": 19.0}, {"process": "b", "step": 50, "seconds": 26.0},
    ]  # fmt: skip
    assert seconds_a_step(lines) == pytest.approx((10 + 7) / (20 + 10))


def test_one_state_tells_no_speed() -> None:
    with pytest.raises(ValueError, match="two states"):
        seconds_a_step([{"process": "a", "step": 10, "seconds": 25.0}])


# -- Time to quality -----------------------------------------------------------------------------------------


def test_time_to_quality_is_read_between_points() -> None:
    at = [10.0, 20.0, 40.0]
    assert tables.reached(at, [0.2, 0.6, 0.8], 0.5, more=True) == (17.5, False)
    assert tables.reached(at, [4.0, 3.0, 1.0], 1.5, more=False) == (35.0, False)
    assert tables.reached(at, [0.5, 0.9, 0.8], 0.4, more=True) == (10.0, True)
    assert tables.reached(at, [0.5, 0.9, 0.8], 0.9, more=True) == (20.0, False)
    assert tables.reached(at, [0.5, 0.6, 0.7], 0.9, more=True) is None


def study() -> Study:
    """LCM is right in 0.9 at the end of 40 steps (20 s), of its two seeds; the other gets there earlier."""
    curves = {
        ("lcm", 0): (0.5, 0.88), ("lcm", 1): (0.7, 0.92), ("tcd", 0): (0.85, 0.95), ("tcd", 1): (0.75, 1.0),
    }  # fmt: skip
    rows = [row("teacher", 0, 0, True, 50, prompt_adherence=1.0, frechet_real=0.2)]
    for (name, seed), values in curves.items():
        for step, value in zip((20, 40), values, strict=True):
            rows.append(row(name, seed, step, prompt_adherence=value, frechet_real=2 - value))
        rows.append(row(name, seed, 40, True, prompt_adherence=values[1], frechet_real=2 - values[1]))
    return Study(
        rows,
        {(name, seed): Cost(0.5, 700.0 + seed, 40, 16) for name in ("lcm", "tcd") for seed in (0, 1)},
        {"prompt_adherence": (0.97, 1.0), "frechet_real": (0.1, 0.3)},
    )


PLAN = Plan(
    {"lcm": Entry("LCM", config="distill/tiny_quick"), "tcd": Entry("TCD", config="distill/tiny_quick")},
    seeds=(0, 1),
)


def test_the_bar_is_plain_lcms_own_end() -> None:
    found = study()
    assert tables.bar(found, "prompt_adherence") == pytest.approx(0.9)
    middle, each = tables.time_to(found, "tcd", "prompt_adherence")
    # the mean goes from 0.8 after 10 s to 0.975 after 20 s; the seeds reach 0.9 half-way and 3/5 of the way
    assert middle is not None and middle.at == pytest.approx(10 + 10 * 0.1 / 0.175)
    assert each == pytest.approx([15.0, 16.0])
    samples, _ = tables.time_to(found, "tcd", "prompt_adherence", "samples")
    assert samples is not None and samples.at == pytest.approx(320 + 320 * 0.1 / 0.175)
    assert tables.time_to(found, "lcm", "prompt_adherence")[1] == pytest.approx([10 + 10 * 0.2 / 0.22])


def test_how_much_of_the_way_to_the_teacher() -> None:
    found = study()
    assert tables.of_the_way(found, "tcd", 4, "prompt_adherence") == pytest.approx(0.075 / 0.1)
    assert tables.of_the_way(found, "tcd", 4, "frechet_real") == pytest.approx(0.075 / 0.9)
    assert tables.of_the_way(found, "lcm", 4, "frechet_real") == 0
    assert tables.of_the_way(found, "tcd", 1, "frechet_real") is None


def test_differences_are_of_the_same_seed() -> None:
    found = tables.differences(study(), "tcd", "lcm", 4, "prompt_adherence")
    assert [each.value for each in found] == pytest.approx([0.07, 0.08])
    found = tables.differences(study(), "tcd", "teacher", 4, "prompt_adherence")
    assert [each.value for each in found] == pytest.approx([-0.05, 0.0])


def test_the_page_says_it_in_words() -> None:
    """Bold is within the teacher's interval; the interval of two seeds has one degree of freedom."""
    found = study()
    half = 100 * float(stats.t.ppf(0.975, 1)) * 0.02
    text = tables.page(found, PLAN)
    assert f"| LCM | 90.0 ({90 - half:.1f} to 100.0) |" in text
    assert f"| TCD | **97.5 ({97.5 - 1.25 * half:.1f} to 100.0)** |" in text
    assert f"| TCD | 7.5 ({7.5 - half / 4:.1f} to {7.5 + half / 4:.1f}) |" in text
    assert "| TCD | 16 (15 to 16) | 16 (15 to 16) |" in text
    assert "| TCD | 1.3 | 0.500 | 20 | 701 |" in text
    assert max(map(len, text.splitlines())) <= 120


def test_one_seed_is_marked() -> None:
    rows = [each for each in study().rows if each.seed == 0]
    assert "88.0 (88.0 to 88.0)* |" in tables.page(Study(rows, study().costs, study().bounds), PLAN)


def test_without_another_entry_there_is_nothing_beside_plain_lcm() -> None:
    found = study()
    rows = [each for each in found.rows if each.entry != "tcd"]
    text = tables.page(Study(rows, found.costs, found.bounds), PLAN)
    assert "Less plain LCM" not in text and "Less the teacher, 4 steps" in text and "TCD" not in text
    assert "Less plain LCM" in tables.page(found, PLAN)


def test_the_table_of_all(tmp_path: Path) -> None:
    tables.write_csv(study(), tmp_path / "results.csv")
    lines = list(csv.DictReader((tmp_path / "results.csv").read_text().splitlines()))
    assert len(lines) == 13
    last = lines[-1]
    assert (last["set"], last["entry"], last["seed"], last["samples"]) == ("end", "tcd", "1", "640")
    assert (float(last["prompt_adherence"]), float(last["prompt_adherence_low"])) == (1.0, 1.0)


# -- The list ------------------------------------------------------------------------------------------------


def test_every_entry_of_the_list_trains_at_the_rank_that_it_says_on_the_same_pictures(tmp_path: Path) -> None:
    plan = read(ENTRIES)
    assert plan.prompts >= 500 and len(plan.seeds) >= 3 and tables.PLAIN in plan.entries
    trained = [name for name, entry in plan.entries.items() if entry.config and not entry.start]
    configs = [config_of(plan, tmp_path, name, 0) for name in trained]
    for name, config in zip(trained, configs, strict=True):
        _, told, rank = plan.entries[name].label.partition("rank ")
        assert config.adapter.rank == (int(rank) if told else 16), name
    assert len({(c.adapter.targets, c.data.path, c.base.path) for c in configs}) == 1
    assert all(c.steps // c.checkpoint.every >= plan.curve.points for c in configs)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("entries: {a: {label: A}}", "either config or drawn_from"),
        ("entries: {a: {label: A, drawn_from: b}}", "names b, which is no other entry"),
        ("entries: {a: {label: A, config: c, sampling: 1}}", "sampling"),
        ("prompts: 8\nentries: {a: {label: A, config: c}}", "at most as many"),
    ],
)
def test_a_list_that_says_nothing_is_refused(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text(text)
    with pytest.raises(UserError, match=words):
        read(tmp_path / "list.yaml")


# -- All of it -----------------------------------------------------------------------------------------------

SMALL = """
seeds: [0]
prompts: 4
curve: {points: 2, prompts: 3, steps: [1]}
diversity: {prompts: 2, images: 2}
negative: 2
guidance_prompts: 3
teacher: {steps: 2, guidance: 5.0, guidances: [1.0, 5.0]}
entries:
  lcm: {label: LCM, config: distill/tiny_quick, steps: [1, 4],
        set: {steps: 4, batch_size: 2, optimizer.warmup_steps: 0}}
  guided: {label: guided, config: distill/tiny_quick, start: lcm, steps: [1],
           set: {steps: 2, batch_size: 2, optimizer.warmup_steps: 0, guidance: 1.0}}
  by-ddim: {label: by DDIM, drawn_from: lcm, sampler: ddim, steps: [4]}
"""


@pytest.mark.slow
def test_the_study_runs_and_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text(SMALL)
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "methods.md"
    page.write_text("# Methods\n\n<!-- tables -->\nold\n<!-- end of tables -->\n\nafter\n")

    def run(*words: str) -> str:
        command = [sys.executable, "-m", "studies.methods", "--entries", str(tmp_path / "list.yaml"),
                   "--output", str(tmp_path / "runs"), "--docs", str(tmp_path / "docs"), *words]  # fmt: skip
        return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout

    run()
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").rglob("*.safetensors")}
    clock = [
        json.loads(line) for line in (tmp_path / "runs" / "lcm-0" / "clock.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in clock] == [2, 4] and clock[1]["seconds"] > clock[0]["seconds"]
    run()
    run("--tables")
    assert kept == {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").rglob("*.safetensors")}
    lines = list(csv.DictReader((tmp_path / "docs" / "methods.csv").read_text().splitlines()))
    ends = {(line["entry"], line["steps"]): line for line in lines if line["set"] == "end"}
    assert set(ends) == {("teacher", "2"), ("lcm", "1"), ("lcm", "4"), ("guided", "1"), ("by-ddim", "4")}
    assert ends["guided", "1"]["samples"] == str((4 + 2) * 2)  # with what it started from
    assert ends["guided", "1"]["unsaid"] and not ends["lcm", "1"]["unsaid"]
    assert float(ends["teacher", "2"]["sharpness"]) == float(ends["teacher", "2"]["diversity"]) == 1
    text = page.read_text()
    assert "old" not in text and "| by DDIM |" in text and text.endswith("<!-- end of tables -->\n\nafter\n")
    assert {"methods.png", "methods-sheet.png"} == {
        file.name for file in (tmp_path / "docs/images").iterdir()
    }
