"""The rule that keeps weights, and the words on a run's figures, on tables of numbers."""

from __future__ import annotations

import random
import re

import pytest

from lcm_kit.training.overtraining import CONTROL, TOLERANCE, Measured, fallen, of_tables, verdict

Table = dict[int, float]
LIMIT = 1 + TOLERANCE["control_loss"]


def kept(held_out: Table, control: Table, recipe: str = "train/finetune") -> int:
    measured = Measured(held_out, control, recipe)
    return measured.best(measured.steps)


def worse(by: float, name: str = "control_loss") -> float:
    """A figure that is above 1 by `by` tolerances."""
    return 1 + by * TOLERANCE[name]


# -- The rule ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", CONTROL)
def test_each_branch_of_the_rule(recipe: str) -> None:
    name = CONTROL[recipe]
    fine, bad, awful = worse(0.9, name), worse(1.1, name), worse(3, name)
    held = {0: 0.1, 10: 0.5, 20: 0.3, 30: 0.4}

    def of(held_out: Table, *control: float) -> int:
        return kept(held_out, dict(zip((0, 10, 20, 30), control, strict=False)), recipe)

    # The lowest held-out loss, step 0 aside; and of those that pass
    assert kept(held, {}) == 20
    assert of(held, 1, 1, fine, fine) == 20
    assert of(held, 1, 1, bad, fine) == 30
    assert of(held, 1, 1, bad, bad) == 10
    # The lowest figure, which others are held against, may come late: a LoRA that learns from nothing
    assert of(held, 9, 3, 1 / bad, 1) == 20
    assert of(held, 9, 8, 7, 1) == 30
    # None passes: the least degraded, whatever the held-out loss
    assert of(held, 1, bad, awful, awful) == 10
    assert of(held, 1, awful, awful, bad) == 30
    # Nothing is held out: the last that passes
    assert of({}, 1, 1, fine, fine) == 30
    assert of({}, 1, 1, fine, bad) == 20
    assert of({}, 9, 3, 2, 1) == 30
    assert of({}, 1, awful, bad, awful) == 20
    # Nothing was measured, or step 0 alone
    assert kept({}, {}) == kept({0: 1.0}, {}) == kept({}, {0: 1.0}) == 0
    # A step that lacks a figure is out; of equal losses the earlier is kept
    assert kept({10: 0.2, 20: 0.3}, {20: 1.0}, recipe) == 20
    assert kept({10: 0.3, 20: 0.3}, {}) == 10


def test_the_tolerance_is_a_share_of_the_lowest_figure() -> None:
    for scale in (0.01, 7.0):
        assert Measured({}, {0: scale, 5: 2 * scale}).limit == pytest.approx(scale * LIMIT)
    assert kept({}, {0: 1.0, 5: 1.0, 6: LIMIT}) == 6 and kept({}, {0: 1.0, 5: 1.0, 6: LIMIT + 1e-6}) == 5


@pytest.mark.parametrize(
    ("recipe", "fine", "bad"), [("train/finetune", 1.999, 2.001), ("train/distill", 1.119, 1.121)]
)
def test_the_tolerances_themselves(recipe: str, fine: float, bad: float) -> None:
    """By value: a style's control loss may double, a distillation's distance rise by 12%."""
    assert kept({}, {0: 1.0, 5: 1.0, 6: fine}, recipe) == 6
    assert kept({}, {0: 1.0, 5: 1.0, 6: bad}, recipe) == 5


@pytest.mark.parametrize(("last", "said"), [(1.019, "adapter/ holds step 5"), (1.021, "over-trained")])
def test_over_training_begins_two_hundredths_above_the_lowest_loss(last: float, said: str) -> None:
    (sentence,) = verdict(Measured({0: 2.0, 5: 1.0, 6: last}), 5)
    assert sentence.startswith(said)


def test_whatever_comes_next_the_weights_that_are_kept_are_still_there() -> None:
    """What is thrown away on the way is never the result: as if every step's weights had been kept."""
    random.seed(0)
    seen = set()
    for _ in range(400):
        n, spread = random.randint(1, 9), random.choice((0.05, 0.3, 2))
        steps = range(0, 10 * n + 10, 10)
        held_out = {s: random.random() for s in steps} if random.random() < 0.7 else {}
        drift = random.choice((-0.1, 0, 0.1))
        control = {s: max(0.1, 2 + drift * k + spread * random.random()) for k, s in enumerate(steps)}
        there: list[int] = []
        for now in steps:
            so_far = Measured(
                {s: held_out[s] for s in steps if s <= now and s in held_out},
                {s: control[s] for s in steps if s <= now},
            )
            there = so_far.candidates([*there, now])
            assert so_far.best(there) == so_far.best(so_far.steps)
            assert there[:1] == ([so_far.best(there)] if now else [])
            seen.add(len(there))
    assert {1, 2, 3} <= seen  # or this test would show nothing


def test_the_figures_of_either_recipe_are_found_by_name() -> None:
    tables = {"loss": {1: 2.0}, "held_out_loss": {0: 1.0}, "control_distance": {0: 3.0}}
    assert of_tables(tables, "train/distill") == Measured({0: 1.0}, {0: 3.0}, "train/distill")
    assert of_tables(tables, "train/finetune") == Measured({0: 1.0}, {})
    assert of_tables({"control_loss": {0: 3.0}}, "train/finetune").control == {0: 3.0}


def test_a_collapse_is_told_once_a_crossing() -> None:
    """By value: below 0.7. Step 0 is no training's doing, and what comes later is not known yet."""
    table = {0: 0.1, 10: 0.7, 20: 0.699, 30: 0.1, 40: 0.8, 50: 0.2}
    measured = Measured(diversity=table, recipe="train/distill")
    assert [step for step in table if fallen(measured, step)] == [20, 50]
    assert [step for step in (0, 5) if fallen(Measured(diversity={0: 0.1, 5: 0.2}), step)] == [5]
    assert fallen(measured, 60) == []  # memory ran out: nothing was measured
    (sentence,) = fallen(measured, 50)
    assert sentence.startswith("warning: at step 50 the pictures of one prompt are only 0.2 times as diff")
    assert_said(verdict(measured, 0), ["at step 50 .* only 0.2 times .* is collapsing; what helps"])
    assert_said(verdict(measured, 20), ["at step 20 .* only 0.7 times"])  # the result's, not the last one's
    assert verdict(measured, 40) == [] == verdict(measured, 45)
    assert measured.candidates(table) == []  # it chooses no weights


# -- The words -----------------------------------------------------------------------------------------------


def assert_said(said: list[str], words: list[str]) -> None:
    assert len(said) == len(words), said
    assert all(re.search(word, sentence) for word, sentence in zip(words, said, strict=True)), said


@pytest.mark.parametrize(
    ("losses", "best", "words"),
    [
        ({0: 0.5, 10: 0.4, 20: 0.3}, 20, []),
        ({0: 0.5, 10: 0.30, 20: 0.303}, 10, ["adapter/ holds step 10, which has the lowest"]),
        ({0: 0.5, 10: 0.3, 20: 0.33}, 10, ["over-trained: .* at step 10 .0.3. and is 10% higher at step 20"]),
        ({0: 0.2, 10: 0.3, 20: 0.25}, 20, ["never fell below the base's .0.2."]),
        ({0: 0.2, 10: 0.25, 20: 0.5}, 10, ["over-trained", "never fell below"]),
        ({10: 0.25}, 10, []),
    ],
)  # fmt: skip
def test_the_verdict_on_held_out_pictures(losses: Table, best: int, words: list[str]) -> None:
    assert kept(losses, {}) == best
    assert_said(verdict(Measured(losses), best), words)


@pytest.mark.parametrize(
    ("held_out", "control", "best", "words"),
    [
        ({}, (1, worse(-0.1), worse(0.5), worse(0.2)), 30, []),  # healthy
        ({}, (1, worse(0.5), worse(1.5), worse(0.5)), 30, []),  # and better again
        ({}, (1, worse(0.5), worse(1.5), worse(3)), 10,
         ["300% higher at step 30 .4. than at step 0 .1., and more than 100% since step 20.*holds step 10, "
          "the last one measured before that. What helps: prior.prompts"]),
        ({}, (1, worse(5), worse(2), worse(3)), 20,
         ["300% higher at step 30.* since step 10, .*holds step 20, the least degraded"]),
        ({0: 0.9, 10: 0.6, 20: 0.5, 30: 0.4}, (1, 1, worse(0.5), worse(3)), 20,
         ["since step 30.*holds step 20"]),
        ({0: 0.9, 10: 0.5, 20: 0.6, 30: 0.7}, (1, 1, 1, worse(3)), 10,
         ["over-trained: .*lowest at step 10.*holds step 10", "prompts degrade: .*holds step 10. What"]),
    ],
)  # fmt: skip
def test_the_verdict_on_control_prompts(
    held_out: Table, control: tuple[float, ...], best: int, words: list[str]
) -> None:
    measured = Measured(held_out, dict(zip((0, 10, 20, 30), control, strict=True)))
    assert measured.best(measured.steps) == best
    assert_said(verdict(measured, best), words)


def test_what_helps_depends_on_the_recipe() -> None:
    for recipe, wanted in {"train/finetune": "prior.prompts", "train/distill": "teacher.weight"}.items():
        said = verdict(Measured({10: 1.0, 20: 2.0}, {0: 1.0, 10: 1.0, 20: 9.0}, recipe), 10)
        assert f"{CONTROL[recipe]} is 800% higher at step 20" in said[1] and wanted in said[1]
        assert ("prior.prompts" if recipe == "train/finetune" else "data.regularization help") in said[0]
    # Of a distillation the held-out loss may rise: its target is the student itself
    assert verdict(Measured({0: 0.2, 10: 0.3}, {}, "train/distill"), 10) == []
