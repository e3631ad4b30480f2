"""What a plan makes of sizes and shapes: each phase is of the largest pictures that it can have."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lcm_kit.config.schema import Adapter
from lcm_kit.data.buckets import Shaper
from lcm_kit.plan import base_profile, encoding, evaluating
from lcm_kit.plan.dry_run import MetaModel
from lcm_kit.plan.estimate import Planner
from lcm_kit.workflow.needs import Needs
from tests.test_plan import config, tune
from tests.test_plan_stages import story

WIDE = (128, 64)  # twice the pixels of the embedded base's squares


@pytest.fixture(scope="module")
def stage() -> MetaModel:
    wanted = config()
    return MetaModel(base_profile.find(wanted.base), wanted.adapter)


def test_a_profile_knows_what_shapes_hang_on(stage: MetaModel) -> None:
    tiny, sd1 = stage.subject, base_profile.published("sd1")
    assert (sd1.factor, sd1.multiple, base_profile.published("sdxl").multiple) == (8, 64, 32)
    assert tiny.latent(64) == tiny.latent((64, 64)) and tiny.latent(WIDE) == 2 * tiny.latent(64)
    # of SD's shapes at 512, 384 x 704 has the most pixels; SDXL's own have none more than the square
    assert Shaper.of(sd1, replace(config().data, resolution=512)).largest in ((384, 704), (704, 384))
    sdxl = Shaper.of(base_profile.published("sdxl"), replace(config().data, resolution=1024))
    assert sdxl.largest == (1024, 1024)


def test_validation_is_of_its_own_size(stage: MetaModel) -> None:
    planner = Planner(stage)
    plain, wide = (
        planner(config("quickstart", "validation.count=64", f"validation.resolution={size}"))
        for size in ("null", list(WIDE))
    )
    guided = stage.drawing(WIDE, torch.float16).highest(128).at(128)
    decoded = stage.pictures(WIDE, torch.float16).decode
    assert wide.phases["validation"]["activations"] >= guided
    assert decoded.flops == pytest.approx(2 * stage.pictures(64, torch.float16).decode.flops, rel=0.02)
    assert wide.phases["validation"]["activations"] > 1.9 * plain.phases["validation"]["activations"]
    assert {k: v for k, v in wide.phases.items() if k != "validation"} == {
        k: v for k, v in plain.phases.items() if k != "validation"
    }


def test_samples_and_the_prior_are_drawn_in_the_largest_of_their_sizes(stage: MetaModel) -> None:
    planner = Planner(stage)
    teacher = (
        "data.source=teacher", "data.regularization=null", "data.regularization_share=null",
        "validation.held_out=0",
    )  # fmt: skip
    sizes = f"data.samples.resolutions=[64, {list(WIDE)}]"
    plain, wide = (planner(config("quickstart", *teacher, *more)) for more in ((), (sizes,)))
    few, many = (each.encode[encoding.SAMPLES]["activations"] for each in (plain, wide))
    assert many > 1.5 * few  # eight at once, each guided
    assert many == round(stage.drawing(WIDE, torch.float16).highest(16).at(16))
    # and a step may be of them
    held = stage.rehearse(WIDE, torch.float16, checkpointing=False).student.highest(16, gradients=True)
    assert wide.phases["student pass"]["activations"] == round(held.at(16, gradients=False))
    assert wide.flops == plain.flops  # in the mean a step is of squares
    prior = ("prior.prompts=asset:general", "data.shapes={multiple: 16}")
    some, other = (
        Planner(stage)(tune(*prior, *more)).encode[encoding.PRIOR]["activations"]
        for more in ((), ("prior.resolutions=[[128, 32]]",))
    )
    assert other == pytest.approx(some, rel=0.1)  # as many pixels


def test_training_is_planned_for_the_largest_of_its_shapes() -> None:
    """Of SD1.x at 512: the shape of 3% more pixels; squares alone where `data.shapes` says so."""
    stage = MetaModel(base_profile.published("sd1"), Adapter(4))
    planner = Planner(stage)
    wanted = [f"data.shapes={{kind: {kind}}}" for kind in ("square", "buckets")]
    squares, buckets = (
        config(
            "quickstart",
            "adapter.rank=4",
            "data.resolution=512",
            "batch_size=1",
            "validation.prompts=null",
            kind,
        )
        for kind in wanted
    )
    assert encoding.trained_at(squares, stage) == 512
    assert encoding.trained_at(buckets, stage) in ((384, 704), (704, 384))
    small, large = planner(squares), planner(buckets)
    ratio = large.phases["student pass"]["activations"] / small.phases["student pass"]["activations"]
    assert 1.02 < ratio < 1.05
    assert large.flops == small.flops
    vae = [each.encode[encoding.PICTURES]["activations"] for each in (small, large)]
    assert 1.02 < vae[1] / vae[0] < 1.07


def test_an_evaluation_of_a_story_is_planned_at_its_own_size() -> None:
    square, wide = (
        Needs.of(story("tiny", "asset:tiny-sd", 64, "brand.batch_size=4", *more), "cuda")
        for more in ((), (f"brand.resolution={list(WIDE)}",))
    )
    stage = wide.trainings["distill"][0].stage
    for batch in (4, 32):
        found = wide.evaluations["brand"].by_batch[batch]
        assert found == sum(evaluating.parts(WIDE, stage, "cuda", batch).values())
        assert found > square.evaluations["brand"].by_batch[batch]
