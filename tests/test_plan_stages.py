"""The plan of every stage: encoding, the prior, training, validation, evaluations. The largest decides."""

from __future__ import annotations

import re
from collections.abc import Iterator
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lcm_kit.bases import compiling
from lcm_kit.config import shipped
from lcm_kit.config.load import load
from lcm_kit.config.schema import Base, Training
from lcm_kit.plan import advice, base_profile, encoding, evaluating, probe, show, style, text
from lcm_kit.plan.dry_run import MetaModel
from lcm_kit.plan.estimate import CARDS, Planner, Stage, room
from lcm_kit.plan.sizes import GIB
from lcm_kit.workflow import configs, needs
from lcm_kit.workflow.configs import Story
from lcm_kit.workflow.needs import Evaluation, Needs
from tests.test_plan import card_of, config, kept_stage, plan, styled, tiny, tiny_stage, tune

__all__ = ["kept_stage", "tiny", "tiny_stage"]  # fixtures

ROOT = Path(__file__).parents[1]


# -- What an evaluation holds --------------------------------------------------------------------------------


def test_an_evaluation_holds_pipeline_adapter_and_its_pictures(tiny: Planner) -> None:
    numbers, found = tiny.stage.weights, tiny(config()).evaluate
    assert list(found) == [1, 2, 4, 8, 16, 32]
    vae, drawn = tiny.stage.pictures(64, torch.float16), tiny.stage.drawing(64, torch.float16)
    parts = found[4]
    assert (parts["UNet"], parts["adapter"]) == (2 * numbers.base, 2 * sum(numbers.lora))
    assert parts["text encoders"] == 2 * tiny.stage.subject.text
    assert parts["activations"] == round(max(drawn.highest(8).at(8), vae.decode.highest(4).at(4)))
    assert parts["what looks at pictures"] == 0  # the probe of the embedded world is tiny
    large = tiny(config("quickstart", "data.resolution=128")).evaluate[1]
    assert large["what looks at pictures"] == 4 * evaluating._CLIP
    on_cpu = Planner(tiny.stage, "cpu")(config()).evaluate[1]
    assert on_cpu["UNet"] == 4 * numbers.base


def test_weights_of_what_looks_at_pictures_are_clip_vit_large_patch14s() -> None:
    """Its published configuration, built without weights."""
    from transformers import CLIPConfig, CLIPModel

    seen = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "patch_size": 14,
            "num_attention_heads": 16, "projection_dim": 768}  # fmt: skip
    read = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "projection_dim": 768,
            "num_attention_heads": 12}  # fmt: skip
    with torch.device("meta"):
        model = CLIPModel(CLIPConfig(text_config=read, vision_config=seen, projection_dim=768))
    assert sum(p.numel() for p in model.parameters()) == evaluating._CLIP


# -- The largest stage decides -------------------------------------------------------------------------------


def test_the_largest_of_all_stages_decides_what_fits(tiny: Planner) -> None:
    for wanted, verb in (
        (config("quickstart", "batch_size=64"), "train"),
        (config("quickstart", "batch_size=1", "data.batch_size=1024"), "encode"),
    ):
        found = tiny(wanted)
        sizes = [sum(p.values()) for p in found.encode.values()] + [
            found.peak,
            sum(found.evaluate[1].values()),
        ]
        assert [stage.size for stage in found.stages] == sizes
        assert (found.largest.verb, found.largest.size) == (verb, max(sizes))
        card = card_of(max(sizes) / GIB)
        assert found.fits(card + 1e-6) and not found.fits(card - 1e-6)
        assert [stage.verb for stage in found.too_large(card - 1e-6)] == [verb]


def test_the_prior_is_a_stage_of_its_own(tiny: Planner) -> None:
    found = tiny(tune("prior.prompts=asset:general"))
    assert [stage.name for stage in found.stages[:2]] == [
        "encode (pictures)",
        "encode (the prior's pictures)",
    ]
    assert "prior.prompts" in show.help_for(found.stages[1])
    assert "data.source=images" in show.help_for(tiny(styled()).stages[0])


def test_what_encoding_lacks_is_a_smaller_batch_of_its_own(tiny: Planner) -> None:
    """On a card that holds 100 pictures of 1024: 64, the largest half of halves that fits. Training stays."""
    wanted = config("quickstart", "batch_size=1", "data.batch_size=1024", "validation.count=1")
    card = card_of(sum(tiny(replaced(wanted, 100)).encode[encoding.PICTURES].values()) / GIB)
    assert tiny(wanted).train_fits(card) and not tiny(wanted).fits(card)
    tried = advice.what_to_change(tiny, wanted, card)
    assert [option.typed for option in tried] == ["data.batch_size=64"] and tried[0].estimate.fits(card)
    found = advice.preset(tiny, wanted, card)
    assert found and found.overrides["data.batch_size"] == 64 and found.estimate.fits(card)
    assert not found.fits_unchanged


def replaced(wanted: Any, batch: int) -> Any:
    return replace(wanted, data=replace(wanted.data, batch_size=batch))


def test_control_prompts_are_left_out_last(tiny: Planner) -> None:
    """A style whose validation is its peak: they go where all other savings are not enough."""
    stage = copy(tiny.stage)
    stage.subject = replace(stage.subject, words=300_000)  # text encoders that count for something
    tiny = Planner(stage)
    wanted = tune("validation.count=1", "batch_size=1", "accumulation=1")
    least = {"gradient_checkpointing": True, "memory.quantize": "nf4", "optimizer.name": "adamw8bit"}
    without = tiny(advice.changed(wanted, {**least, "validation.control": None}))
    lasting = tiny(advice.changed(wanted, least))
    assert without.peak < lasting.peak
    found = [advice.preset(tiny, wanted, card_of(1.001 * each.peak / GIB)) for each in (lasting, without)]
    assert found[0] and "validation.control" not in found[0].overrides
    assert found[1] and found[1].typed.endswith("validation.control=null")
    assert tune("validation.count=1", "batch_size=1", "accumulation=1", *found[1].typed.split()) == (
        found[1].estimate.config
    )
    tried = advice.what_to_change(tiny, wanted, card_of(1.001 * without.peak / GIB))
    assert ["validation.control" in option.overrides for option in tried].count(True) == 1
    assert "validation.control" in tried[-1].overrides


@pytest.mark.usefixtures("kept_stage")
def test_a_stage_that_fits_nowhere_is_named_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluating, "_CLIP", 4 * 10**9)  # 15 GiB
    monkeypatch.setattr(evaluating.world, "SIZE", 1)
    done = plan("quickstart", "--device-memory", "12")
    told = " ".join(done.output.split())
    assert done.exit_code == 1
    assert "evaluate (batch_size=1) does not fit: 14.9" in told or "does not fit: 15.0" in told
    assert "what helps: evaluate on a larger card, or on the CPU" in told
    assert "training fits" in told
    assert re.search(r"12 GB: does not fit: evaluate \(batch_size=1\) [\d.]+ GiB; the rest does", told)
    assert re.search(r"24 GB: fits; .* to evaluate", told)


# -- A story -------------------------------------------------------------------------------------------------


def story(family: str, base: str, size: int, *overrides: str) -> Story:
    place = {"path": base, "revision": None, "variant": None}
    return configs.finetune("my/brand", place, family, Path("runs/x"), size, None, overrides)


@pytest.fixture(scope="module")
def small() -> Needs:
    told = story("tiny", "asset:tiny-sd", 64, "style.batch_size=32", "brand.batch_size=64")
    return Needs.of(told, "cuda")


def test_a_story_is_planned_stage_by_stage(small: Needs) -> None:
    found = list(small.stages())
    assert [stage.verb for _, stage in found] == ["encode", "style", "distil", "evaluate"]
    for name in ("style", "distill"):
        planner, wanted = small.trainings[name]
        assert planner(wanted).resident in [stage.size for _, stage in found]
    planner, wanted = small.trainings["distill"]
    parts = evaluating.parts(wanted.data.resolution, planner.stage, "cuda", 64)
    assert found[-1] == ("brand", Stage("evaluate", "brand, batch_size=64", sum(parts.values())))
    assert small.largest().size == max(stage.size for _, stage in found)


def test_the_style_that_is_not_trained_yet_counts_in_the_teacher(small: Needs) -> None:
    """As many numbers as the style's training has."""
    styles, _ = small.trainings["style"]
    distil, _ = small.trainings["distill"]
    assert distil.stage.weights.style == sum(styles.stage.weights.lora) > 0


def test_a_stage_of_a_story_that_does_not_fit_is_named_with_overrides_that_help(small: Needs) -> None:
    needs = replace(small, evaluations={"brand": Evaluation(64, {64: 10 * GIB, 8: GIB // 8, 1: GIB // 16})})
    style = next(stage.size for name, stage in needs.stages() if name == "style" and stage.verb == "style")
    card = card_of(0.7 * style / GIB)
    said = needs.advice(card)
    told = next(each for each in said if each.startswith("style ("))
    typed = told.partition(": add ")[2].split()
    assert typed and all(each.startswith("style.") for each in typed)
    again = story("tiny", "asset:tiny-sd", 64, "style.batch_size=32", *typed).style
    planner, _ = needs.trainings["style"]
    assert planner(again).train_fits(card)
    judged = next(each for each in said if each.startswith("evaluate (brand, batch_size=64) needs 10.00 GiB"))
    assert judged.endswith(": add brand.batch_size=8" if room(card) * GIB >= GIB // 8 else "=1")
    assert needs.advice(1000) == []
    hopeless = replace(needs, evaluations={"brand": Evaluation(1, {1: 10 * GIB})}).advice(8)
    assert hopeless == [
        "evaluate (brand, batch_size=1) needs 10.00 GiB: evaluate on a larger card, or on the CPU "
        "(CUDA_VISIBLE_DEVICES= lcm-kit evaluate ...)"
    ]


def test_it_is_told_for_what_is_here(
    small: Needs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = story("tiny", "asset:tiny-sd", 64)
    asked: list[str] = []
    monkeypatch.setattr(Needs, "of", lambda _, device: asked.append(device) or small)
    monkeypatch.setattr(needs, "capacity", lambda _: 16.0)
    needs.tell(told)
    assert "16 GB of memory: every stage fits" in capsys.readouterr().out
    monkeypatch.setattr(needs, "capacity", lambda _: None)
    sd15 = replace(
        told, distill=replace(told.distill, base=Base("stable-diffusion-v1-5/stable-diffusion-v1-5"))
    )
    monkeypatch.setattr(needs.base_profile, "find", lambda _: base_profile.published("sd1"))
    needs.tell(sd15)
    printed = capsys.readouterr().out
    assert "there is no GPU here" in printed and "8 GB of memory: every stage fits" in printed
    assert asked == ["cpu", "cuda"]


# -- What is promised ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "name", "size", "promise"),
    [
        ("sd15", "stable-diffusion-v1-5/stable-diffusion-v1-5", 512, r"(\d+) GB of memory do for SD1\.5"),
        ("sdxl", "stabilityai/stable-diffusion-xl-base-1.0", 1024, r"and (\d+) GB for SDXL"),
    ],
)
def test_the_readme_promises_the_smallest_card_that_holds_every_stage(
    family: str, name: str, size: int, promise: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    readme = " ".join((ROOT / "README.md").read_text().split())
    install = " ".join((ROOT / "docs" / "install.md").read_text().split())
    (found,) = re.findall(promise, readme)
    short = {"sd15": rf"\b{found} GB of memory for SD1\.5", "sdxl": rf"\b{found} GB for SDXL"}[family]
    assert re.search(short, install)
    published = base_profile.published("sd1" if family == "sd15" else "sdxl")
    monkeypatch.setattr(base_profile, "find", lambda _: replace(published, stored=torch.float32))
    planned = Needs.of(story(family, name, size), "cuda")
    smallest = next(card for card in CARDS if not planned.advice(card))
    assert smallest == int(found)


def promises() -> Iterator[Any]:
    """Shipped configs whose comments name a card, in GB."""
    for file in sorted((ROOT / "configs").glob("*/*.yaml")):
        name = f"{file.parent.name}/{file.stem}"
        head = " ".join(line.lstrip("# ") for line in file.read_text().splitlines() if line.startswith("#"))
        if cards := re.findall(r"(\d+) GB\b", head):
            yield pytest.param(name, head, int(cards[0]), id=name)


def test_configs_that_name_a_card_are_found() -> None:
    named = {param.id for param in promises()}
    assert {"distill/sd15_lcm", "distill/sdxl_lcm", "distill/sdxl_lcm_12gb", "finetune/sdxl_style"} <= named
    assert len(named) >= 9


@pytest.mark.slow
@pytest.mark.parametrize(("name", "head", "card"), promises())
def test_a_config_fits_the_card_that_its_comments_name(name: str, head: str, card: int) -> None:
    """Every stage, or those that the comment names; and its figures in GiB are the plan's."""
    wanted = load(shipped.config_path(name))
    assert isinstance(wanted, Training)
    base = base_profile.find(wanted.base)
    look, _ = style.find(wanted, base.structure)
    found = Planner(MetaModel(base, wanted.adapter, look, text.rank_of(wanted)))(wanted)
    large = [stage.verb for stage in found.too_large(card)]
    assert large == (["evaluate"] if "evaluating takes" in head else [])
    for number, what in re.findall(r"([\d.]+) GiB to (train|encode|evaluate)", head):
        size = max(stage.size for stage in found.stages if stage.verb == what)
        assert float(number) == pytest.approx(size / GIB, abs=0.051), what


# -- The probe -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on", [True, False])
def test_the_probe_calls_what_memory_compile_asks_for(
    on: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[int] = []

    def compile_blocks(unet: Any, config: Any) -> None:
        if compiling.wants(config, torch.device("cpu")):
            unet.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))

    monkeypatch.setattr(compiling, "compile_blocks", compile_blocks)
    given = ("batch_size=2", f"memory.compile={str(on).lower()}", f"output={tmp_path}", "logging.trackers=[]")
    wanted = config("quickstart", *given)
    found = probe.measure(wanted, None)
    # in each step: the teacher with both conditions, the target, the student
    assert calls == ([4, 2, 2] * probe.STEPS if on else [])
    assert found.first > 0 and found.compiled is on
    planner = Planner(MetaModel(base_profile.find(wanted.base), wanted.adapter), "cpu")
    show.probe(found, planner(wanted))
    assert ("the first step, which compiles, took" in capsys.readouterr().out) is on
