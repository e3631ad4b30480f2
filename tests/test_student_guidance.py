"""Guidance left to inference: one key of a config, which everything that draws its student follows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lcm_kit.adapter import roles
from lcm_kit.bases.condition import Condition
from lcm_kit.config import shipped
from lcm_kit.config.brand import Brand
from lcm_kit.config.evaluation import Quality
from lcm_kit.config.load import load
from lcm_kit.config.sweep import Compose, GuidanceSweep, SweptStudent
from lcm_kit.core.methods import DEFAULT, PCM, MethodInfo
from lcm_kit.core.schedule import SD_BETAS, Schedule
from lcm_kit.data.batches import Batch
from lcm_kit.errors import UserError
from lcm_kit.evaluation import brand, cells, compare, pairs, recommend, recommended
from lcm_kit.evaluation.cells import Cell
from lcm_kit.export import card
from lcm_kit.lora import metadata
from lcm_kit.lora.layers import Lora
from lcm_kit.lora.metadata_reading import provenance_from_header
from lcm_kit.lora.provenance import Guidance, Provenance
from lcm_kit.lora.provenance_rules import of_training
from lcm_kit.lora.structure import known
from lcm_kit.plan import work
from lcm_kit.training.validation import student_of
from tests.cards import BOTH, facts, hollow, section, snippets, tables
from tests.small_roles import distill, line, linear_roles, two_samples
from tests.test_recommend import figures, spread, student, sweep

SCHEDULE = Schedule.from_config(SD_BETAS)
GUIDED = replace(DEFAULT, guidance_scale=6.0)  # drawn with 6 by its own validation


# -- The key -------------------------------------------------------------------------------------------------


def test_a_number_is_the_lowest_and_the_highest(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("recipe: train/distill\noutput: x\nguidance: 1\n")
    one: Any = load(file)
    assert (one.guidance.min, one.guidance.max, one.student_guidance) == (1.0, 1.0, 5.0)
    other: Any = load(file, ["guidance=2.5", "validation.guidance_scale=7"])
    assert (other.guidance.min, other.guidance.max, other.student_guidance) == (2.5, 2.5, None)
    block: Any = load(file, ["guidance={min: 1, max: 1}", "validation.guidance_scale=7"])
    assert block.student_guidance == 7.0
    for wrong, words in (("0.5", "guidance.min: 0.5"), ("true", "guidance"), ("strong", "guidance")):
        with pytest.raises(UserError, match=words):
            load(file, [f"guidance={wrong}"])


@pytest.mark.parametrize(
    ("keys", "guidance"),
    [
        ({"guidance": 1}, 5.0),
        ({"guidance": {"min": 1, "max": 3}}, None),
        ({"guidance": 1, "teacher": {"weight": 0.5}}, 5.0),  # pictures have no guidance either
        ({"guidance": 1, "teacher": {"weight": 0.5}, "data": {"source": "teacher"}}, None),  # samples have
        ({"guidance": 1, "data": {"source": "teacher"}}, 5.0),  # of which only the ends are used
        ({"teacher": {"weight": 0.0}}, None),  # of the data alone: drawn as pictures are, without
        ({}, None),
        ({"guidance": 1, "validation": {"guidance_scale": 1}}, 1.0),  # left to inference, and none wanted
    ],
)
def test_whether_guidance_is_left_to_inference(keys: dict[str, Any], guidance: float | None) -> None:
    config = distill(**keys)
    assert config.student_guidance == guidance == student_of(config).guidance_scale
    made = of_training(
        config,
        SimpleNamespace(base_hash="ab", prediction_type="epsilon", family=known("sd1").family, license=None),
        "cd",
        3,
    )
    assert made.student == student_of(config)
    if guidance is None:
        with pytest.raises(
            ValueError, match="caption_dropout 0.1 is for a student that is drawn with guidance"
        ):
            distill(**keys, caption_dropout=0.1)
    else:
        assert distill(**keys, caption_dropout=0.1).caption_dropout == 0.1


# -- Training ------------------------------------------------------------------------------------------------


def asked(
    guidance: Any, scales: list[float], *, again: bool = False
) -> tuple[torch.Tensor, list[Condition], list[int]]:
    """Losses of a step of two samples; what the UNet was asked: its conditions, and how many rows a pass."""
    conditions: list[Condition] = []

    def call(x: torch.Tensor, t: torch.Tensor, encoder_hidden_states: torch.Tensor) -> Any:
        conditions.append(Condition(encoder_hidden_states))
        return line(x, t, encoder_hidden_states)

    given = two_samples(scales=scales, again=(0, 0) if again else None)
    mine = linear_roles(distill(guidance=guidance, teacher={"reuse": 2 if again else 1}), call)
    losses = torch.stack([mine.losses(given) for _ in range(2 if again else 1)])
    return losses, conditions, [len(each) for each in conditions]


def test_without_guidance_the_teacher_is_asked_with_the_caption_alone() -> None:
    alone, said, rows = asked(1, [1.0, 1.0])
    both, _, twice = asked({"min": 1, "max": 2}, [1.0, 1.0])
    assert rows == [2, 2, 2] and twice == [4, 2, 2]  # teacher, target, student
    assert torch.equal(said[0].embeds, said[2].embeds) and torch.equal(alone, both)
    assert not torch.equal(alone, asked({"min": 1, "max": 2}, [1.0, 1.5])[0])
    reused, _, rows = asked(1, [1.0, 1.0], again=True)
    assert rows == [2, 2, 2, 2, 2] and torch.equal(reused, alone.expand(2, -1))


@pytest.mark.parametrize(("solver", "calls"), [("ddim", 1), ("heun", 2)])
def test_a_plan_counts_one_pass_of_the_teacher_and_two_of_the_student(solver: str, calls: int) -> None:
    config = distill(guidance=1, solver=solver, validation={"control": "asset:tiny-sd", "control_count": 4})
    assert roles.passes(config) == {"teacher": calls, "target": 1, "student": 1}
    baked = replace(config, guidance=replace(config.guidance, max=2.0))
    assert roles.passes(baked) == {"teacher": 2 * calls, "target": 1, "student": 1}
    flops = {"teacher": 1.0, "student": 1.0}
    drawn, control = work.while_training(config, flops, None)
    once, alone = work.while_training(baked, flops, None)
    teacher, rows = 4 * 50 * 2, 4 + 2  # rows: prompts, and some control prompts below them
    assert (drawn.passes - teacher, once.passes - teacher) == (rows * (1 + 2 + 4) * 2, rows * (1 + 2 + 4))
    assert (control.passes - teacher, alone.passes - teacher) == (2 * 4 * 2, 2 * 4)


def test_captions_are_dropped_by_seed_step_and_slot() -> None:
    recipe = shipped.load_recipe("train/distill")
    condition = Condition(torch.randn(4, 3, 5), torch.randn(4, 2), torch.randn(4, 6))
    batch = Batch(torch.zeros(4, 4, 2, 2), condition, ["a"] * 4, range(8, 12))

    def dropped(
        step: int, seed: int = 0, share: float = 0.3, reuse: int = 1, batch: Batch = batch
    ) -> list[bool]:
        config = distill(guidance=1, caption_dropout=share, seed=seed, teacher={"reuse": reuse})
        return recipe.step_randomness(config, PCM(), SCHEDULE, batch, step).dropped.tolist()

    steps = [dropped(step) for step in range(250)]
    assert steps == [dropped(step) for step in range(250)]
    share = sum(map(sum, steps)) / 1000
    assert 0.25 < share < 0.35  # 3.4 standard deviations of 1000 draws
    assert steps != [dropped(step, seed=1) for step in range(250)] and not any(
        map(any, [dropped(0, share=0.0)])
    )
    # slots are places of the global batch: half of it on each of two processes
    halves = [
        replace(batch, latents=batch.latents[:2], slots=slots) for slots in (range(8, 10), range(10, 12))
    ]
    assert all(dropped(n) == [*dropped(n, batch=halves[0]), *dropped(n, batch=halves[1])] for n in range(20))
    # what is kept of the teacher's answer was asked with the same captions
    assert all(dropped(n, reuse=5) == dropped(n - n % 5) for n in range(50))

    empty = Condition(torch.zeros(1, 3, 5), torch.ones(1, 2), torch.full((1, 6), 9.0))
    found = batch.without_captions(torch.tensor([True, False, False, True]), empty).condition
    assert found.pooled is not None and found.time_ids is not None and condition.pooled is not None
    assert not found.embeds[[0, 3]].any() and torch.equal(found.embeds[1:3], condition.embeds[1:3])
    assert bool((found.pooled[[0, 3]] == 1).all()) and torch.equal(found.pooled[1:3], condition.pooled[1:3])
    assert found.time_ids is condition.time_ids  # the sizes are the picture's, not the caption's


# -- Everything that draws -----------------------------------------------------------------------------------


def test_every_evaluation_draws_it_as_its_teacher() -> None:
    quality = shipped.load_recipe("evaluation/quality")
    asked_for = Quality(recipe="evaluation/quality", run="a", guidance_scale=4.0)
    rows = {(c.steps, c.guidance_scale, c.unet_calls) for c in quality.plan(asked_for, GUIDED) if c.adapter}
    assert rows == {(n, 4.0, 2 * n) for n in (1, 2, 4, 8)}
    assert {c.guidance_scale for c in quality.plan(asked_for, DEFAULT) if c.adapter} == {1.0}

    judged = Brand(recipe="evaluation/brand", run="a", teacher_guidance=3.0)
    pair = Compose(recipe="evaluation/compose", style="a", speed="b", teacher_guidance=3.0)
    for own, method, scale in (
        (None, GUIDED, 3.0),
        (None, DEFAULT, 1.0),
        (2.0, GUIDED, 2.0),
        (1.0, GUIDED, 1.0),
    ):
        planned = [*brand.plan(replace(judged, guidance_scale=own), method)]
        assert {c.guidance_scale for c in planned if c.kind == "student"} == {scale}
        planned = [*pairs.plan(replace(pair, guidance_scale=own), method)]
        assert {c.guidance_scale for c in planned if c.kind == "student"} == {scale}

    swept = GuidanceSweep(recipe="evaluation/guidance_sweep", adapters=("a", "b"))
    grid = cells.plan(swept, {"a": DEFAULT, "b": GUIDED})
    drawn = {name: {c.guidance_scale for c in grid if c.adapter == name} for name in "ab"}
    assert drawn == {"a": {1.0, 1.5}, "b": set(swept.teacher.guidance_scales)}
    asked = replace(swept, student=(SweptStudent(guidance_scales=(2.0,)),))
    assert {c.guidance_scale for c in cells.plan(asked, {"b": GUIDED}) if c.adapter} == {2.0}


def test_settings_to_draw_with() -> None:
    assert recommended.settings(None, GUIDED).guidance_scale == 6.0
    assert recommended.settings(None, GUIDED, guidance_scale=2.0).guidance_scale == 2.0
    assert recommended.settings(None, DEFAULT).guidance_scale == 1.0


def test_a_sweep_looks_for_harm_above_the_usual_guidance() -> None:
    """Colours grow with guidance up to the teacher's own: that is no harm to one that is drawn with it."""
    made = {
        student(4, scale): figures(saturation=colour, prompt_adherence=spread(30, 1))
        for scale, colour in ((1.0, 0.7), (3.0, 1.0), (5.0, 1.3))
    }
    made[Cell("plain", None, "ddim", 8, 1.0)] = figures(saturation=0.9, prompt_adherence=spread(20, 1))
    found = {}
    for method in (DEFAULT, GUIDED):
        whole = sweep(made)
        whole = replace(whole, subjects=[replace(whole.subjects[0], method=method)])
        (entry,) = recommend.breaks(whole, "lora")
        beside_plain = {row["a"] for row in compare.comparisons(whole) if row["b"].startswith("plain")}
        words = recommend.words(student(4), whole)
        found[method.guidance_scale] = entry["guidance_scale"], beside_plain, words
    # the plain sampler has 8 UNet calls: 4 steps of the student with guidance, and 8 without
    assert found[None] == (
        3.0,
        set(),
        "4 steps of LCM, guidance_scale 1 (no guidance beyond what is baked in), LoRA weight 1",
    )
    assert found[6.0] == (
        5.0,
        {student(4, 3.0).id},
        "4 steps of LCM, guidance_scale 1 (no guidance), LoRA weight 1",
    )


# -- What files say ------------------------------------------------------------------------------------------

ALONE = {"guidance": Guidance(1.0, 1.0), "guidance_scale": 6.0}


def test_a_file_says_how_it_is_drawn_and_it_is_read_back() -> None:
    built = metadata.build(Lora({}), known("sd1"), facts(**ALONE))
    assert (
        "guidance_scale / CFG 6.0: no guidance is baked in. LoRA strength 1.0. Negative prompts work."
        in built["modelspec.usage_hint"]
    )
    assert built["lcm_kit.sampling_guidance_scale"] == "6"
    assert provenance_from_header(built, "house").student == GUIDED
    of_data = metadata.build(Lora({}), known("sd1"), facts(guidance=Guidance(1.0, 1.0)))
    assert "CFG 1.0: no guidance is baked in. LoRA strength 1.0." in of_data["modelspec.usage_hint"]
    assert (
        "Negative" not in of_data["modelspec.usage_hint"]
        and of_data["lcm_kit.sampling_guidance_scale"] == "1"
    )


def page(folder: Path, made: Provenance) -> str:
    structure = known("sd1")
    written = card.write(
        folder, title="house", files=BOTH, structure=structure, facts=made, lora=hollow(structure), checks=[]
    )
    return written.read_text()


def test_a_card_says_which_guidance_to_set_everywhere(tmp_path: Path) -> None:
    own, baked = page(tmp_path / "own", facts(**ALONE)), page(tmp_path / "baked", facts())
    of_data = page(tmp_path / "data", facts(guidance=Guidance(1.0, 1.0)))
    rows = [dict(tables(each)[0][1:])["guidance (CFG)"] for each in (own, baked, of_data)]
    assert rows == ["6.0", "1.0; up to 2 for a little more", "1.0; up to 2 for a little more"]
    assert "with no guidance baked in" in own and "guidance_scale=6.0" in snippets(own)[0]
    assert "`cfg` 6.0" in section(own, "ComfyUI") and "CFG scale 6." in section(own, "A1111 and Forge")
    assert "CFG scale 6." in section(own, "InvokeAI")
    assert "two passes through the UNet" in own and "a negative prompt works" in own
    assert "over-saturate" not in own and "guidance baked in |" not in own
    assert "guidance_scale=1.0" in snippets(baked)[0] and "A negative prompt does nothing at CFG 1." in baked
    assert "baked" not in of_data and "A negative prompt does nothing at CFG 1." in of_data


@pytest.mark.parametrize(
    ("usual", "words"),
    [
        (None, "give one above 1 \\(up to about 2 where guidance is baked in, to which it adds\\)"),
        (6.0, "give one above 1, as 6: no guidance is baked in"),
    ],
)
def test_a_negative_prompt_without_guidance_is_refused_with_what_to_do(
    usual: float | None, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from lcm_kit.api import pictures

    made = MethodInfo("lcm", "LCM", ("lcm",), (4,), guidance_scale=usual)
    monkeypatch.setattr(pictures, "_require_a_pair", lambda adapter, base: adapter)
    monkeypatch.setattr(recommended, "of_adapter", lambda adapter, file: None)
    monkeypatch.setattr(recommended, "method_of", lambda file: made)
    asked_for = {"adapter": tmp_path / "a.safetensors", "negative_prompt": "a dog"}
    with pytest.raises(
        UserError, match=f"nothing at guidance_scale 1, which .*a.safetensors is drawn at; {words}"
    ):
        pictures.drawing(["a cat"], **asked_for, guidance_scale=1.0)
    if usual is None:
        with pytest.raises(UserError, match=words):
            pictures.drawing(["a cat"], **asked_for)
    else:
        assert pictures.drawing(["a cat"], **asked_for).settings["guidance_scale"] == 6.0
    assert pictures.drawing(["a cat"], **asked_for, guidance_scale=1.5).settings["negative_prompt"] == "a dog"
