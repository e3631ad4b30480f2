"""`lcm-kit plan`: counts against published figures, memory against closed forms and a measured peak."""

from __future__ import annotations

import json
import random
import re
import shutil
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner, Result

from lcm_kit import assets, bases, families
from lcm_kit.adapter import roles
from lcm_kit.adapter import text as text_lora
from lcm_kit.adapter.adapted_unet import AdaptedUNet
from lcm_kit.adapter.styles import add_teacher_adapters
from lcm_kit.cli.plan import verbs
from lcm_kit.config import shipped
from lcm_kit.config.finetune import Finetune
from lcm_kit.config.load import load
from lcm_kit.config.schema import Adapter, Base, Distill, Optimizer, Teacher, Training, Weighted
from lcm_kit.core.methods import LCM
from lcm_kit.core.schedule import Schedule
from lcm_kit.core.solvers import SOLVERS
from lcm_kit.core.step import consistency_loss
from lcm_kit.errors import UserError
from lcm_kit.lora import write
from lcm_kit.lora.provenance import Provenance
from lcm_kit.lora.structure import of_base
from lcm_kit.plan import (
    advice,
    base_profile,
    disk,
    encoding,
    estimate,
    phases,
    probe,
    show,
    sizes,
    style,
    trial,
    work,
)
from lcm_kit.plan.dry_run import MetaModel, rehearse_vae
from lcm_kit.plan.estimate import Planner
from lcm_kit.plan.sizes import GIB
from lcm_kit.plan.style import Style
from lcm_kit.plan.tracker import Held, Kernels, Ledger, a_prime, largest
from tests.loras import lcm_modules, random_lora

TERA = 1e12


PLAIN = ("teacher.adapters=[]", "adapter.start=null", "adapter.rank=16", "adapter.alpha=16",
         "batch_size=16", "accumulation=1", "steps=200")  # fmt: skip


def config(name: str = "quickstart", *overrides: str) -> Distill:
    """A shipped config; the quickstart's as a plain distillation of the embedded base."""
    loaded = load(shipped.config_path(name), (*(PLAIN if name == "quickstart" else ()), *overrides))
    assert isinstance(loaded, Distill)
    return loaded


def tune(*overrides: str) -> Finetune:
    loaded = load(shipped.config_path("finetune/tiny_brand"), overrides)
    assert isinstance(loaded, Finetune)
    return loaded


OF_SAMPLES = (
    "data.source=teacher", "data.regularization=null", "data.regularization_share=null", "adapter.start=null",
    "data.samples.count=384", "data.samples.steps=25", "validation.held_out=0",
)  # fmt: skip


def styled(*overrides: str) -> Distill:
    return config("distill/tiny_styled", *OF_SAMPLES, *overrides)


def plan(*arguments: str | Path) -> Result:
    return CliRunner().invoke(verbs, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def sd1() -> MetaModel:
    return MetaModel(base_profile.published("sd1"), Adapter())


@pytest.fixture(scope="module")
def sdxl() -> MetaModel:
    return MetaModel(base_profile.published("sdxl"), Adapter())


@pytest.fixture(scope="module")
def tiny_stage() -> MetaModel:
    quickstart = config()
    return MetaModel(base_profile.find(quickstart.base), quickstart.adapter)


@pytest.fixture
def tiny(tiny_stage: MetaModel) -> Planner:
    """One of its own for each test: a planner takes another stage where a config asks for it."""
    return Planner(tiny_stage)


@pytest.fixture
def kept_stage(tiny: Planner, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command finds the rehearsals of `tiny` done."""
    monkeypatch.setattr("lcm_kit.plan.dry_run.MetaModel", lambda *_: tiny.stage)


# -- Counts --------------------------------------------------------------------------------------------------


def test_weights_of_sd15(sd1: MetaModel) -> None:
    """The published sizes, and those of the published LCM-LoRA."""
    assert (sd1.weights.base, sum(sd1.weights.lora)) == (859_520_964, 67_252_224)
    # the share that bitsandbytes reaches, shared/FACTS.md; two embeddings are kept by ours
    assert sd1.weights.quantizable / sd1.weights.base == pytest.approx(0.31, abs=0.01)


@pytest.mark.slow
def test_weights_of_sdxl_and_ssd1b(sdxl: MetaModel) -> None:
    assert (sdxl.weights.base, sum(sdxl.weights.lora)) == (2_567_463_684, 196_751_360)
    assert sdxl.weights.quantizable / sdxl.weights.base == pytest.approx(0.87, abs=0.01)
    assert MetaModel(base_profile.published("ssd1b"), Adapter(4)).weights.base == pytest.approx(
        1.3e9, rel=0.03
    )


def test_flops_of_sd15(sd1: MetaModel) -> None:
    """shared/FACTS.md: batch 1, 512 pixels, a multiply-add counts as two; the LoRA adds 12%."""
    plain = sd1.rehearse(512, torch.float32, checkpointing=False)
    assert plain.teacher.flops / TERA == pytest.approx(0.80, abs=0.005)
    assert plain.forward / plain.teacher.flops == pytest.approx(1.12, abs=0.005)
    # fused attention's backward repeats its first product, so a little more than the 2.00 without it
    assert plain.student.flops / TERA == pytest.approx(2.00, rel=0.04)


def test_checkpointing_repeats_the_blocks_and_holds_less(tiny: Planner) -> None:
    plain, repeated = (tiny.stage.rehearse(64, torch.float32, checkpointing=on) for on in (False, True))
    assert plain.student.flops + 0.7 * plain.forward < repeated.student.flops
    assert repeated.student.flops < plain.student.flops + plain.forward
    assert repeated.forward == plain.forward and repeated.teacher is plain.teacher
    assert repeated.student.highest(16).at(16) < 0.5 * plain.student.highest(16).at(16)


@pytest.mark.slow
def test_flops_of_checkpointed_sd15_and_sdxl(sd1: MetaModel, sdxl: MetaModel) -> None:
    repeated = sd1.rehearse(512, torch.float32, checkpointing=True)
    assert repeated.student.flops / TERA == pytest.approx(2.78, rel=0.04)
    found = sdxl.rehearse(1024, torch.float16, checkpointing=True)
    assert found.teacher.flops / TERA == pytest.approx(6.76, abs=0.005)
    assert found.forward / found.teacher.flops == pytest.approx(1.08, abs=0.005)
    assert found.student.flops / TERA == pytest.approx(22.8, rel=0.03)


def test_weights_of_the_published_text_encoders_and_vae() -> None:
    """CLIP ViT-L/14, OpenCLIP ViT-H (23 layers), ViT-bigG with its projection; the VAE of all of them."""
    large, huge, giant = 123_060_480, 340_387_840, 694_659_840
    assert [base_profile.published(name).text for name in families.names()] == [
        large, huge, large + giant, large + giant,
    ]  # fmt: skip
    assert rehearse_vae(base_profile.published("sd1").vae_config, 64, torch.float32).weights == 83_653_863


def test_weights_of_text_encoders_at_hand(sdxl_base: Path) -> None:
    from safetensors import safe_open

    total = 0
    for part in ("text_encoder", "text_encoder_2"):
        with safe_open(sdxl_base / part / "model.safetensors", "pt") as file:
            total += sum(file.get_tensor(key).numel() for key in file.keys())  # noqa: SIM118 - no dict
    assert base_profile.find(Base(str(sdxl_base))).text == total


@pytest.mark.parametrize(("solver", "calls"), [("ddim", 1), ("heun", 2), ("dpmpp_2s", 2)])
def test_flops_of_a_step_count_every_teacher_pass(solver: str, calls: int, tiny: Planner) -> None:
    wanted = config("quickstart", f"solver={solver}", "accumulation=3", "batch_size=2")
    assert roles.passes(wanted) == {"teacher": 2 * calls, "target": 1, "student": 1}
    passes = tiny.stage.rehearse(64, torch.float16, checkpointing=False)
    flops = tiny(wanted).flops
    assert flops["teacher"] == pytest.approx(passes.teacher.flops * 2 * calls * 6)
    assert flops["target"] == flops["student forward"] == passes.forward * 6


# -- Memory in closed form -----------------------------------------------------------------------------------


def test_the_ledger_books_a_forward_and_a_backward() -> None:
    """Two layers of width 8 and 6, a batch of 13: sizes on paper."""
    n = 13
    first, second = nn.Linear(8, 6, bias=False, device="meta"), nn.Linear(6, 8, bias=False, device="meta")
    x = torch.empty(n, 8, device="meta")
    ledger = Ledger(n, frozenset([first.weight.nbytes]))
    ledger.ignore([x, first.weight, second.weight])
    with ledger:
        hidden = first(x)
        kept = second(hidden.relu())
        del hidden
    # both outputs of width 6 (relu keeps its own) and that of width 8; the first is gone after `del`
    assert max(m.sample for m in ledger.moments) == 4 * (6 + 6 + 8)
    assert ledger.flops == 2 * n * 8 * 6 * 2
    with ledger:
        kept.sum().backward()
    assert ledger.flops == 2 * n * 8 * 6 * 5  # no gradient of the input: 2 forward, 3 backward
    assert ledger.moments[-1].gradients == 2 * 4 * 8 * 6
    assert ledger.moments[-1].sample <= 4 * (6 + 6 + 8 + 6 + 6)


def test_the_ledger_sees_no_attention_matrix() -> None:
    q = torch.empty(13, 2, 1024, 8, device="meta", requires_grad=True)
    ledger = Ledger(13)
    ledger.ignore([q])
    with ledger, Kernels():
        nn.functional.scaled_dot_product_attention(q, q, q)
    assert max(m.sample for m in ledger.moments) < 4 * 2 * 1024 * 16 < 4 * 2 * 1024**2


def test_the_largest_moments_hold_the_peak_at_any_batch() -> None:
    rng = random.Random(0)
    moments = [Held(rng.randrange(50), rng.randrange(50), rng.randrange(50)) for _ in range(300)]
    kept = largest(moments)
    assert len(kept) < 60
    for batch in (1, 2, 7, 100):
        for gradients in (True, False):
            wanted = max(m.at(batch, gradients=gradients) for m in moments)
            assert max(m.at(batch, gradients=gradients) for m in kept) == wanted


def test_a_prime_divides_no_size() -> None:
    assert a_prime([8, 64, 77]) == 13
    assert a_prime([26, 17, 77]) == 19


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_bytes_of_a_quantised_layer_are_those_of_bitsandbytes(kind: str, tiny: Planner) -> None:
    from lcm_kit.bases.memory import _quantized

    layer = nn.Linear(1024, 512, bias=False)
    held = _quantized(layer, kind, torch.device("cpu"))
    with torch.no_grad():
        held(torch.ones(1, 1024))  # int8 puts its scales in place at the first call
    state = getattr(held.weight, "quant_state", None)
    tensors = [state.absmax, state.state2.absmax] if state else [held.state.SCB]
    real = held.weight.nbytes + sum(t.nbytes for t in tensors)
    n = 1024 * 512
    weights = replace(tiny.stage.weights, base=n, quantizable=n, rows=512)
    wanted = config("quickstart", f"memory.quantize={kind}")
    assert sizes.base_bytes(wanted, weights, torch.float16) == pytest.approx(real, rel=0.002)


def test_bytes_of_8_bit_moments_are_those_of_bitsandbytes(tiny: Planner) -> None:
    from lcm_kit.bases.memory import make_optimizer

    shapes = [(64, 640), (16, 16), (320, 64)]
    parameters = [nn.Parameter(torch.zeros(*shape)) for shape in shapes]
    for name, per in (("adamw", 8), ("adamw8bit", 2)):
        optimizer = make_optimizer(parameters, Optimizer(name=name), torch.device("cpu"))  # type: ignore[arg-type]
        for p in parameters:
            p.grad = torch.ones_like(p)
        optimizer.step()
        large = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
        real = sum(
            v.nbytes for v in large if v.numel() > 1 and "qmap" not in repr(v.shape) and v.shape != (256,)
        )
        weights = replace(tiny.stage.weights, lora=tuple(p.numel() for p in parameters))
        found = sizes.moment_bytes(config("quickstart", f"optimizer.name={name}"), weights)
        assert found == pytest.approx(real, rel=1e-3) and found >= per * sum(weights.lora)


def test_what_stays_in_closed_form(tiny: Planner) -> None:
    numbers = tiny.stage.weights
    lora = sum(numbers.lora)
    found = tiny(config("quickstart", "precision=float32", "ema=0.9", "accumulation=2"))
    assert found.staying == {
        "base weights": 4 * numbers.base, "teacher's adapters": 0, "LoRA weights": 4 * lora,
        "optimizer moments": 8 * lora, "EMA of the LoRA": 4 * lora,
    }  # fmt: skip
    assert {phase: parts.get("gradients") for phase, parts in found.phases.items()} == {
        "teacher pass": 4 * lora, "student pass": 4 * lora, "optimizer step": 4 * lora, "validation": None,
    }  # fmt: skip
    assert found.phase == "student pass" and sum(found.parts.values()) == found.peak
    half = tiny(config())  # float16
    assert half.staying["base weights"] == 2 * numbers.base and half.staying["EMA of the LoRA"] == 0
    assert half.phases["teacher pass"]["gradients"] == 0
    assert half.phases["optimizer step"]["gradients"] == 4 * lora


def test_validation_holds_text_encoders_and_vae_and_all_its_pictures(tiny: Planner) -> None:
    text, vae = tiny.stage.subject.text, tiny.stage.pictures(64, torch.float16)
    # so many pictures that they are the peak
    few, many = (tiny(config("quickstart", f"validation.count={n}", "batch_size=1")) for n in (64, 128))
    assert many.phase == "validation"
    parts = many.phases["validation"]
    assert (parts["text encoders"], parts["VAE"]) == (2 * text, 4 * vae.weights)
    assert parts["activations"] == pytest.approx(2 * few.phases["validation"]["activations"], rel=0.01)
    assert parts["activations"] >= vae.decode.highest(128).at(128)
    assert "validation" not in tiny(config("quickstart", "validation.prompts=null")).phases


def test_encoding_is_in_float32(tiny: Planner) -> None:
    small, large = (
        tiny(config("quickstart", f"data.batch_size={n}")).encode[encoding.PICTURES] for n in (8, 16)
    )
    vae = tiny.stage.pictures(64, torch.float32)
    assert (small["text encoders"], small["VAE"]) == (4 * tiny.stage.subject.text, 4 * vae.weights)
    assert large["activations"] == pytest.approx(2 * small["activations"], rel=0.01)
    # the first convolution alone makes 16 channels of 64x64 pixels
    assert small["activations"] > 8 * 4 * 16 * 64 * 64


def test_float16_pictures_of_sdxl_are_decoded_in_float32(tiny: Planner) -> None:
    wanted = config()
    stage = copy(tiny.stage)
    stage.subject = replace(tiny.stage.subject, pooled=32)  # what tells SDXL
    found = Planner(stage)(wanted).phases["validation"]
    assert found["VAE"] == 4 * stage.pictures(64, torch.float32).weights
    assert found["text encoders"] == 2 * stage.subject.text


def test_a_cpu_maps_the_file_of_the_weights(tiny: Planner) -> None:
    """The embedded base is stored in float16: in float32 it is there twice while it is loaded."""
    numbers = tiny.stage.weights
    here = Planner(tiny.stage, "cpu")
    assert tiny.stage.subject.stored == torch.float16
    assert here(config()).staying["base weights"] == 4 * numbers.base
    loading = phases.on_the_host(config(), tiny.stage, torch.float32, {})["loading"]
    assert sum(loading.values()) == 6 * numbers.base
    # stored as it is used: quantised layers come on top of a file that stays mapped
    stage = copy(tiny.stage)
    stage.subject = replace(tiny.stage.subject, stored=torch.float32)
    wanted = config("quickstart", "memory.quantize=nf4")
    plain = wanted, numbers, torch.float32
    few = sizes.base_bytes(*plain) - 4 * (numbers.base - numbers.quantizable)
    mapped = Planner(stage, "cpu")(wanted)
    assert mapped.staying["base weights"] == 4 * numbers.base + few
    assert "loading" not in tiny(wanted).phases and tiny(wanted).staying["base weights"] < 2 * numbers.base


def test_a_cpu_holds_what_is_saved_more_than_once(tiny: Planner) -> None:
    lora = sum(tiny.stage.weights.lora)
    found = Planner(tiny.stage, "cpu")(config("quickstart", "ema=0.9"))
    assert found.passing("saving") == 4 * 4 * lora  # the LoRA's copy, twice its bytes, the EMA's copy
    assert "saving" not in tiny(config()).phases  # which a GPU gives to its machine's memory


def real_moments(n: int, teacher_lora: Style | None = None, *, pair: bool, checkpointing: bool) -> list[Held]:
    """What real tensors hold in a step of the embedded base's UNet at n samples, by the ledger on the CPU."""
    wanted = config("quickstart")
    unet = bases.load_unet(bases.inspect_base(wanted.base.path))
    adapted = AdaptedUNet(unet)
    style.put_on(adapted, teacher_lora)
    adapted.add_lora(wanted.adapter)
    assert adapted.make_fast()
    if checkpointing:
        unet.enable_gradient_checkpointing()
    length, width = 32, 128
    x, text = torch.randn(n, unet.config.in_channels, 16, 16), torch.randn(n, length, width)
    t = torch.zeros(n, dtype=torch.int64)
    ledger = Ledger(n, frozenset(adapted.gradient_bytes()))
    ledger.ignore([*unet.parameters(), x, text])
    with ledger:
        loss = unet(x, t, encoder_hidden_states=text).sample.square().mean()
        if pair:
            loss = loss + unet(x, t, encoder_hidden_states=text).sample.square().mean()
        loss.backward()
    return ledger.moments


@pytest.mark.parametrize(
    ("pair", "checkpointing"),
    [(False, False), (True, False), pytest.param(True, True, marks=pytest.mark.slow)],
)
def test_the_rehearsal_is_what_real_tensors_do(pair: bool, checkpointing: bool, tiny: Planner) -> None:
    """The same ledger on the CPU, with the embedded base's real UNet: at most 2% between them."""
    n = 13
    found = real_moments(n, pair=pair, checkpointing=checkpointing)
    told = tiny.stage.rehearse(
        64, torch.float32, checkpointing=checkpointing, pair=pair
    ).student  # fmt: skip
    for batch in (1, n):
        real = max(m.at(batch) for m in found)
        assert told.highest(batch, gradients=True).at(batch) == pytest.approx(real, rel=0.02)


def test_activations_grow_with_the_batch_and_nothing_else_does(tiny: Planner) -> None:
    found = [tiny(config("quickstart", f"batch_size={n}")) for n in (64, 128, 256)]
    assert found[0].staying == found[1].staying
    for phase in ("teacher pass", "student pass"):
        small, middle, big = (f.passing(phase) for f in found)
        assert big - middle == pytest.approx(2 * (middle - small), rel=0.01)


@pytest.mark.parametrize(
    "override",
    ["gradient_checkpointing=true", "memory.quantize=nf4", "optimizer.name=adamw8bit", "precision=float16"],
)
def test_every_saving_saves(override: str, tiny: Planner) -> None:
    before = tiny(config("quickstart", "precision=float32"))
    after = tiny(config("quickstart", "precision=float32", override))
    assert after.peak < before.peak


def test_disk_of_the_embedded_base(tiny: Planner) -> None:
    """A row is 40 KiB: float32 latents 24x16x16 and 32 embeddings of 128 numbers; there are 480 pictures."""
    found = disk.disk(config("quickstart"), tiny)
    side = 64 // tiny.stage.subject.structure.factor
    assert found.record == 4 * (
        24 * side * side + tiny.stage.subject.tokens * tiny.stage.subject.structure.width
    )
    assert found.records == 480 and found.cache == 480 * found.record
    assert found.state == 12 * sum(tiny.stage.weights.lora)
    assert disk.disk(config("quickstart", "data.flip=true"), tiny).records == 960
    assert disk.disk(config("distill/sd15_lcm"), tiny).cache is None


@pytest.mark.slow
@pytest.mark.parametrize("in_student", [False, True])
def test_the_teachers_adapters_are_rehearsed(in_student: bool, tiny: Planner) -> None:
    """A style on every other layer: real tensors hold as much, and only the student that wears it does."""
    modules = [name.removeprefix("unet.") for name in lcm_modules(of_base("asset:tiny-sd"))[::2]]
    teacher_lora = Style(dict.fromkeys(modules, 24), in_student)
    wanted = config("quickstart")
    stage = MetaModel(tiny.stage.subject, wanted.adapter, teacher_lora)
    n = 13
    real = max(m.at(n) for m in real_moments(n, teacher_lora, pair=False, checkpointing=False))
    told = stage.rehearse(64, torch.float32, checkpointing=False)
    assert told.student.highest(n, gradients=True).at(n) == pytest.approx(real, rel=0.02)
    plain = tiny.stage.rehearse(64, torch.float32, checkpointing=False)
    assert told.teacher.flops > plain.teacher.flops
    assert (told.forward > plain.forward) == in_student
    weights = sum(
        24 * (module.in_features + module.out_features)
        if isinstance(module, nn.Linear)
        else 24 * (module.weight[0].numel() + module.out_channels)
        for module in (bases.load_unet(bases.inspect_base("asset:tiny-sd")).get_submodule(m) for m in modules)
    )
    assert Planner(stage)(wanted).staying["teacher's adapters"] == 4 * weights
    assert stage.weights.lora == tiny.stage.weights.lora


def test_the_teachers_adapters_are_as_large_as_their_files_together(tmp_path: Path) -> None:
    place = of_base("asset:tiny-sd")
    modules = lcm_modules(place)
    entries = []
    for name, part, rank in (("one", modules[:20], 4), ("two", modules[10:30], 6)):
        file = tmp_path / f"{name}.safetensors"
        lora = random_lora(place, part, ranks=(rank,))
        write.write(file, lora, place, "kohya", "float32", Provenance("lora"))
        entries.append(Weighted(str(file)))
    wanted = replace(config("quickstart"), teacher=Teacher(tuple(entries)))
    found, lacking = style.find(wanted, place)
    info = bases.inspect_base("asset:tiny-sd")
    unet = bases.load_unet(info)
    add_teacher_adapters(AdaptedUNet(unet), wanted.teacher, info)
    real = {n: p.shape[0] for n, p in unet.named_parameters() if ".lora_A." in n}
    assert found and not lacking
    assert {f"{name}.lora_A.style.weight": rank for name, rank in found.ranks.items()} == real
    gone = replace(config("quickstart"), teacher=Teacher((Weighted(str(tmp_path / "gone")),)))
    assert style.find(gone, place)[0] is None and "not counted" in style.find(gone, place)[1]
    assert style.find(tune(), place) == (None, "")


# -- Fine-tuning, and the shares of the loss -----------------------------------------------------------------


def test_fine_tuning_has_no_teacher(tiny: Planner) -> None:
    """Its student is that of a distillation of the same adapter; it measures and draws with the LoRA on."""
    found, distilled = tiny(tune("batch_size=16")), tiny(config("quickstart", "batch_size=16"))
    assert list(found.phases) == ["student pass", "optimizer step", "held-out loss", "validation"]
    assert found.phases["student pass"] == distilled.phases["student pass"]
    assert found.staying == distilled.staying
    assert found.flops == {key: distilled.flops[key] for key in ("student forward", "student backward")}
    drawn = tiny.stage.drawing(64, torch.float16, lora=True)
    assert found.phases["held-out loss"]["activations"] == round(drawn.highest(16).at(16))
    many = tiny(tune("validation.count=64")).phases["validation"]["activations"]
    assert many == round(
        max(drawn.highest(128).at(128), tiny.stage.pictures(64, torch.float16).decode.highest(64).at(64))
    )
    assert "held-out loss" not in tiny(tune("validation.held_out=0")).phases
    without = tiny(tune("validation.prompts=null", "validation.control=null"))
    assert "validation" not in without.phases
    # control prompts are encoded beside the pipeline, in float32
    plain, control = tiny(tune("validation.control=null")), tiny(tune("validation.control=asset:tiny-sd"))
    text = tiny.stage.subject.text
    assert plain.phases["validation"]["text encoders"] == 2 * text
    assert control.phases["validation"]["text encoders"] == (2 + 4) * text


def test_prior_preservation_costs_a_step_as_much_again(tiny: Planner) -> None:
    alone, pair = tiny(tune()), tiny(tune("prior.prompts=asset:general"))
    assert pair.flops == pytest.approx({key: 2 * count for key, count in alone.flops.items()})
    small, large = (each.phases["student pass"] for each in (alone, pair))
    assert large["conditions"] == 2 * small["conditions"]
    # what a forward keeps is there twice, what a backward makes on its way once
    assert 1.7 * small["activations"] < large["activations"] < 2 * small["activations"]
    assert pair.phases["held-out loss"] == alone.phases["held-out loss"]


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_passes_of_a_step_are_those_of_the_loss(weight: float, tiny: Planner) -> None:
    """Counted as `consistency_loss` makes them."""
    calls = {"teacher": 0, "target": 0, "student": 0}

    def counted(name: str) -> Any:
        def predict(x: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            calls[name] += 1
            return x, x

        return predict

    wanted = config(
        "quickstart", f"teacher.weight={weight}", *(["guidance.min=3", "guidance.max=8"] * (weight == 0))
    )
    method = LCM(sigma_data=0.5, timestep_scaling=10.0)
    schedule = Schedule.from_config(
        {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    )
    consistency_loss(
        method=method, solver=SOLVERS["ddim"], loss=lambda a, b: (a - b).square().mean((1, 2, 3)),
        schedule=schedule, teacher=counted("teacher"), target=counted("target"), student=counted("student"),
        x0=torch.ones(1, 1, 2, 2), noise=torch.zeros(1, 1, 2, 2), teacher_weight=weight,
        times=method.times(schedule, 50, 1, torch.Generator().manual_seed(0)),
    )  # fmt: skip
    found, passes = tiny(wanted), tiny.rehearse(wanted)
    assert ("teacher pass" in found.phases) == bool(calls["teacher"])
    assert found.flops.get("teacher", 0) == 16 * 2 * calls["teacher"] * passes.teacher.flops
    assert found.flops["target"] == 16 * calls["target"] * passes.forward
    assert found.flops["student forward"] == 16 * calls["student"] * passes.forward


def test_an_adapter_that_is_started_from_costs_nothing_more(tiny: Planner) -> None:
    stage = tiny.stage
    wanted = config("quickstart")
    started = replace(wanted, adapter=replace(wanted.adapter, start="runs/quickstart"))
    assert tiny(started).peak == tiny(wanted).peak and tiny.stage is stage


def test_conditions_are_the_captions_embeddings(tiny: Planner) -> None:
    """32 tokens of 128 numbers; guidance has two of them, a CPU the whole step's as well."""
    one = 32 * 128
    found = tiny(config("quickstart", "batch_size=4", "accumulation=3"))
    assert found.phases["teacher pass"]["conditions"] == 2 * 4 * one * 2
    assert found.phases["student pass"]["conditions"] == 2 * 4 * one
    here = Planner(tiny.stage, "cpu")(tune("batch_size=4", "accumulation=3"))
    assert here.phases["student pass"]["conditions"] == 4 * (4 + 12) * one


def test_what_is_drawn_besides(tiny: Planner) -> None:
    """docs/finetuning.md: 10 of 96 pictures are held out, and in 400 steps measured at 0, 100, ... 400."""
    wanted = tune("validation.every=100", "steps=400", "validation.count=4", "validation.control=null")
    held = disk.disk(wanted, tiny).held
    pictures, loss = work.while_training(wanted, {"teacher": 1.0, "student": 3.0}, held)
    assert held == 10 and (loss.passes, loss.flops) == (5 * 10 * 8, 3 * 5 * 10 * 8)
    # the base once and the LoRA four times, each four pictures by 30 steps of two passes
    assert (pictures.passes, pictures.flops) == (5 * 4 * 60, (1 + 4 * 3) * 4 * 60)
    few = work.while_training(replace(wanted, steps=150), {"teacher": 1.0, "student": 3.0}, None)
    assert [aside.passes for aside in few] == [3 * 4 * 60]  # at 100 and at the end
    distilled = config(
        "quickstart", "validation.every=0", "validation.count=3", "validation.guidance_scale=1"
    )
    (drawn,) = work.while_training(distilled, {"teacher": 1.0, "student": 1.0}, None)
    assert drawn.passes == 3 * (50 + 1 + 2 + 4)
    assert work.while_encoding(distilled, {"teacher": 1.0}) == []
    # with control prompts: two of them below the pictures, all of them at the start too
    asked = ("validation.control=asset:tiny-sd", "validation.control_count=8", "validation.count=4")
    flops = {"teacher": 1.0, "student": 1.0}
    pictures, control = work.while_training(tune("steps=400", "validation.every=100", *asked), flops, None)
    assert pictures.passes == (4 + 4 * 6) * 60 and control.passes == 8 * 60 + 5 * 8 * 8
    held_out = ("steps=200", "batch_size=16", "validation.every=100", "validation.held_out=0.1")
    own = config("quickstart", *held_out, *asked)
    pictures, loss, control = work.while_training(own, flops, 10)
    assert pictures.passes == 4 * 100 + 2 * 6 * 7 and control.passes == 8 * 100 + 3 * 8
    assert loss.passes == 3 * 10 * 8 * (2 + 1 + 1)  # teacher with guidance, target, student
    found, teacher = tiny(own), tiny.stage.drawing(64, torch.float16)
    assert found.phases["held-out loss"]["activations"] == round(teacher.highest(32).at(32))
    (samples,) = work.while_encoding(styled(), {"teacher": 1.0})
    (prior,) = work.while_encoding(tune("prior.prompts=asset:general"), {"teacher": 1.0})
    assert (samples.passes, prior.passes) == (384 * 25 * 2, 128 * 30 * 2)


def test_forwards_with_and_without_the_lora(tiny: Planner) -> None:
    for wanted in (tune(), tune("prior.prompts=asset:general")):
        found = work.of_forwards(wanted, tiny.rehearse(wanted))
        assert found["teacher"] == tiny.stage.drawing(64, torch.float16).flops
        assert found["student"] == pytest.approx(tiny.stage.drawing(64, torch.float16, lora=True).flops)


@pytest.mark.slow  # rehearses a whole pipeline
def test_encoding_draws_with_the_whole_pipeline(tiny: Planner) -> None:
    """The teacher's samples: never decoded, captions encoded beside it; the prior's: decoded by eights."""
    numbers, text = tiny.stage.weights, tiny.stage.subject.text
    vae = tiny.stage.pictures(64, torch.float16)
    drawn = tiny.stage.drawing(64, torch.float16)
    teacher = tiny(styled("data.batch_size=64")).encode
    assert list(teacher) == [encoding.SAMPLES]
    parts = teacher[encoding.SAMPLES]
    assert (parts["UNet"], parts["VAE"]) == (2 * numbers.base, 4 * vae.weights)
    assert parts["text encoders"] == (2 + 4) * text
    assert parts["activations"] == round(drawn.highest(128).at(128))
    one = tiny(styled("data.batch_size=64", "data.samples.guidance_scale=1")).encode
    assert one[encoding.SAMPLES]["activations"] == round(drawn.highest(64).at(64))
    few = tiny(styled("data.batch_size=64", "data.samples.count=32")).encode
    assert few[encoding.SAMPLES]["activations"] == one[encoding.SAMPLES]["activations"]
    prior = tiny(tune("prior.prompts=asset:general", "data.batch_size=64")).encode
    assert list(prior) == [encoding.PICTURES, encoding.PRIOR]
    assert prior[encoding.PRIOR]["text encoders"] == 2 * text
    expected = max(drawn.highest(16).at(16), vae.decode.highest(8).at(8))
    assert prior[encoding.PRIOR]["activations"] == round(expected)
    mixed = tiny(styled("data.source=mix"))
    assert list(mixed.encode) == [encoding.PICTURES, encoding.SAMPLES]
    assert mixed.encode_peak == max(sum(parts.values()) for parts in mixed.encode.values())
    # float16 is stored: on a CPU the file is there beside what was made of it
    here = Planner(tiny.stage, "cpu")(styled("data.batch_size=1")).encode
    assert here[encoding.SAMPLES]["activations"] >= 2 * numbers.base
    assert here[encoding.SAMPLES]["UNet"] == 4 * numbers.base


def test_disk_of_every_source(tiny: Planner) -> None:
    assert disk.disk(styled(), tiny).records == 384
    assert disk.disk(styled("data.source=mix", "data.flip=true"), tiny).records == 2 * 96 + 384
    assert disk.disk(styled("data.source=mix", "data.path=./nowhere"), tiny).records is None
    found = disk.disk(tune("prior.prompts=asset:general", "data.regularization=asset:general"), tiny)
    assert found.records == 96 + 384 + 128
    assert found.held == 10  # general pictures are never held out
    lora = 4 * sum(tiny.stage.weights.lora)
    assert found.adapters == 2 * lora and disk.disk(config(), tiny).adapters == lora
    assert disk.disk(tune("validation.held_out=0", "validation.control=null"), tiny).adapters == lora


@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_the_cpus_allocator_keeps(checkpointing: bool, tiny: Planner) -> None:
    """0.62 of the student pass's activations without checkpointing, even where checkpointing is on."""
    wanted = tune("batch_size=64", f"gradient_checkpointing={checkpointing}".lower())
    kept, returned = Planner(tiny.stage, "cpu")(wanted), Planner(tiny.stage, "cpu", returning=True)(wanted)
    plain = tiny.stage.rehearse(64, torch.float32, checkpointing=False).student
    assert kept.gaps == round(0.62 * plain.highest(64).at(64)) and returned.gaps == 0 == tiny(wanted).gaps
    assert kept.resident == returned.peak + kept.gaps and returned.resident == returned.peak
    card = card_of((kept.resident - kept.gaps / 2) / GIB)
    assert returned.fits(card) and not kept.fits(card)


@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_trained_text_encoders_are_rehearsed(checkpointing: bool, tiny: Planner) -> None:
    """As `train/finetune` encodes captions in its step: with real tensors, at most 2% between them."""
    wanted = tune("text_encoder.rank=8", f"gradient_checkpointing={checkpointing}".lower())
    base = bases.inspect_base(wanted.base.path)
    text, unet = text_lora.load(base, wanted, torch.device("cpu")), bases.load_unet(base)
    assert text is not None
    adapted = AdaptedUNet(unet)
    adapted.add_lora(wanted.adapter)
    text_lora.joined(adapted, text, wanted)
    assert adapted.make_fast()
    if checkpointing:
        unet.enable_gradient_checkpointing()
    trained, n = adapted.parameters(), 13
    x = torch.randn(n, unet.config.in_channels, 16, 16)
    frozen = [p for e in text.encoders.values() for p in e.parameters()]
    ledger = Ledger(n, frozenset(adapted.gradient_bytes()))
    ledger.ignore([*unet.parameters(), *frozen, x])
    with ledger:
        captions = text_lora.Captions.of(["a red ball"] * n, text)
        t = torch.zeros(n, dtype=torch.int64)
        unet(x, t, **captions.kwargs()).sample.square().mean().backward()
    stage = MetaModel(tiny.stage.subject, wanted.adapter, text_rank=8)
    assert sum(stage.weights.lora) == sum(p.numel() for p in trained)
    told = stage.rehearse(64, torch.float32, checkpointing=checkpointing).student
    for batch in (1, n):
        real = max(m.at(batch) for m in ledger.moments)
        assert told.highest(batch, gradients=True).at(batch) == pytest.approx(real, rel=0.02)
    found = Planner(stage)(wanted)
    assert found.staying["text encoders"] == 4 * stage.subject.text
    assert sum(found.parts.values()) == found.peak
    without = Planner(stage)(replace(wanted, validation=replace(wanted.validation, control=None)))
    assert "text encoders" not in without.phases["validation"]
    assert found.staying["optimizer moments"] == 2 * 4 * sum(p.numel() for p in trained)


def test_a_planner_takes_the_stage_that_a_config_asks_for(tiny: Planner) -> None:
    planner = Planner(tiny.stage)
    assert planner.stage_of(tune()) is tiny.stage
    trained = planner.stage_of(tune("text_encoder.rank=4"))
    assert trained.text_rank == 4 and planner.stage_of(tune("text_encoder.rank=4")) is trained
    assert planner.stage_of(tune()).text_rank is None


# -- Which base ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "label"),
    [
        ("stabilityai/stable-diffusion-xl-base-1.0", "SDXL"),
        ("segmind/SSD-1B", "SSD-1B"),
        ("stabilityai/stable-diffusion-2-1", "Stable Diffusion 2.x"),
        ("someone/dreams-v2", "Stable Diffusion 1.x"),
    ],
)
def test_a_base_that_is_not_at_hand_is_told_by_its_name(path: str, label: str) -> None:
    found = base_profile.find(Base(path))
    assert found.structure.label == label and found.note is not None and "--structure" in found.note
    assert base_profile.find(Base(path), "sdxl").note is None


def test_a_base_at_hand_is_what_its_files_say(sdxl_base: Path, sd_base: Any) -> None:
    xl, sd = base_profile.find(Base(str(sdxl_base))), base_profile.find(Base(str(sd_base("epsilon"))))
    assert (xl.structure.family.name, xl.tokens, xl.pooled, xl.note) == ("sdxl", 24, 32, None)
    assert (sd.structure.family.name, sd.tokens, sd.pooled) == ("sd", 24, 0)
    with pytest.raises(UserError, match="there is no such folder"):
        base_profile.find(Base("./nowhere"))


# -- Fits, and what to change --------------------------------------------------------------------------------


def test_a_card_keeps_a_gibibyte_for_cuda_and_a_tenth_of_the_rest(tiny: Planner) -> None:
    assert estimate.room(11) == 9
    found = tiny(config())
    card = found.peak / GIB / 0.9 + 1
    assert found.fits(card + 1e-6) and not found.fits(card - 1e-6)


def card_of(gibibytes: float) -> float:
    """The card of which a plan may fill so much."""
    return gibibytes / 0.9 + 1


def test_the_smallest_change_that_fits_comes_first(tiny: Planner) -> None:
    wanted = config("quickstart", "batch_size=128", "validation.count=1")
    before = tiny(wanted).peak / GIB
    tried = advice.what_to_change(tiny, wanted, card_of(0.8 * before))
    assert [option.typed for option in tried] == ["gradient_checkpointing=true"]
    assert tried[0].estimate.config.gradient_checkpointing and tried[0].estimate.peak < 0.8 * before * GIB
    card = card_of(0.3 * before)
    small = advice.what_to_change(tiny, wanted, card)
    assert small[-1].estimate.fits(card) and not any(option.estimate.fits(card) for option in small[:-1])
    assert small[-1].overrides["batch_size"] * small[-1].overrides["accumulation"] == 128
    # what rounds nothing comes before what does
    rounding = [bool(o.overrides.keys() & {"memory.quantize", "optimizer.name"}) for o in small]
    assert rounding == sorted(rounding) and True in rounding and not rounding[2]
    hopeless = advice.what_to_change(tiny, wanted, 1.001)
    assert not hopeless[-1].estimate.fits(1.001) and hopeless[-1].overrides["batch_size"] == 1


def test_too_many_validation_pictures_are_what_to_change(tiny: Planner) -> None:
    wanted = config("quickstart", "validation.count=512")
    assert tiny(wanted).phase == "validation"
    card = card_of(tiny(config("quickstart", "validation.count=1")).peak / GIB * 1.01)
    assert [o.typed for o in advice.what_to_change(tiny, wanted, card)] == ["validation.count=1"]
    found = advice.preset(tiny, wanted, card)
    assert found and found.overrides["validation.count"] == 1


def test_a_preset_saves_as_little_as_it_can_then_takes_the_largest_batch(tiny: Planner) -> None:
    wanted = config("quickstart", "batch_size=32", "accumulation=4", "validation.count=1")
    planned = tiny(wanted).peak / GIB
    found = [advice.preset(tiny, wanted, card_of(share * planned)) for share in (6.0, 1.01, 0.8, 0.65)]
    typed = [option.typed if option else "" for option in found]
    assert typed[:2] == ["batch_size=128 accumulation=1", ""]
    assert typed[2] == "gradient_checkpointing=true" and "optimizer.name=adamw8bit" in typed[3]
    for option in found:
        # the overrides as typed give the config that was planned, at the same samples a step
        assert option and option.estimate.config.batch_size * option.estimate.config.accumulation == 128
        again = ["batch_size=32", "accumulation=4", "validation.count=1", *option.typed.split()]
        assert config("quickstart", *again) == option.estimate.config
    assert [option.fits_unchanged for option in found if option] == [True, True, False, False]
    assert advice.preset(tiny, wanted, 1.001) is None


@pytest.mark.slow
def test_presets_of_sd15(sd1: MetaModel) -> None:
    planner, wanted = Planner(sd1), config("distill/sd15_lcm")
    found = advice.presets(planner, wanted)
    assert list(found) == [8, 12, 16, 24, 48, 80]
    for card, option in found.items():
        assert option and option.estimate.fits(card) and option.fits_unchanged
    # what the config's comments say of cards
    assert found[12] and not found[12].estimate.config.gradient_checkpointing
    assert found[12].estimate.config.batch_size == 8


# -- The command ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("kept_stage")
def test_the_command_prints_the_plan() -> None:
    done = plan("quickstart", "batch_size=8")
    assert done.exit_code == 0
    for words in (
        "5.3M of the UNet",
        "1.98M of the LoRA",
        "peak, in the phase",
        "480 rows",
        " 8 GB: fits",
        "80 GB: fits",
    ):
        assert words in done.output, words
    assert re.search(r"a step of 8 samples: [\d.]+ GFLOPs", done.output)
    # no device to hold it against
    assert "training fits" not in done.output


@pytest.mark.usefixtures("kept_stage")
def test_a_card_that_is_too_small_is_exit_code_1_and_advice() -> None:
    done = plan("quickstart", "batch_size=512", "validation.count=1", "--device-memory", "2.2")
    assert done.exit_code == 1 and "to make it fit, add: gradient_checkpointing=true" in done.output
    assert plan("quickstart", "batch_size=512", "--device-memory", "80").exit_code == 0
    large = plan("quickstart", "data.batch_size=1024", "--device-memory", "1.5")
    assert large.exit_code == 1 and "encode (pictures) does not fit" in large.output
    assert "training fits" in large.output and "to make it fit, add: data.batch_size=" in large.output


@pytest.mark.usefixtures("kept_stage")
def test_a_plan_for_the_cpu_is_held_against_this_machines_memory() -> None:
    done = plan("quickstart", "--device", "cpu")
    total = float(re.search(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())[1]) / 2**20  # type: ignore[index]
    assert "frozen weights in float32" in done.output and "GB: fits" not in done.output
    assert done.exit_code == 0 and f"of {total:.3g} GiB" in done.output


@pytest.mark.usefixtures("kept_stage")
def test_a_probe_that_memory_does_not_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lcm_kit.cli.plan._free", lambda: 2**20)
    done = plan("quickstart", "--probe")
    assert isinstance(done.exception, UserError) and "1.00 MiB are free" in str(done.exception)


def test_another_recipe_and_another_structure_are_refused() -> None:
    refused = plan("evaluation/quality")
    assert isinstance(refused.exception, UserError) and "train/distill" in str(refused.exception)
    odd = plan("quickstart", "--structure", "sd3")
    assert isinstance(odd.exception, UserError)
    assert "'sd3' is unknown; choose one of sd1, sd2, sdxl, ssd1b" in str(odd.exception)


@pytest.mark.usefixtures("kept_stage")
def test_the_plan_of_a_style(tiny: Planner) -> None:
    alone = ("data.regularization=null", "data.regularization_share=null")
    asked = ("prior.prompts=asset:general", "batch_size=8", "steps=400", "validation.every=50", *alone)
    done = plan("finetune/tiny_brand", *asked)
    assert done.exit_code == 0
    for words in (
        "a step of 8 samples and as many of the base's own",
        "loss on 10 held-out pictures, 9 times: 720 passes of the UNet",
        "draws 128 pictures of the base's own: 7680 passes of the UNet",
        "the prior's pictures",
        "held-out loss",
        "224 rows",
        " 8 GB: fits",
    ):
        assert words in done.output, words
    refused = plan("finetune/tiny_brand", "prior.prompts=asset:general", "--device-memory", "1.01")
    assert (
        refused.exit_code == 1 and "leave out the base's own pictures (prior.prompts=null)" in refused.output
    )


@pytest.mark.usefixtures("kept_stage")
def test_the_plan_of_a_teacher_that_is_not_trained_yet() -> None:
    done = plan("distill/tiny_styled", *OF_SAMPLES, "teacher.adapters=[{path: runs/nothing}]")
    assert done.exit_code == 0 and "note: the teacher's adapters are not counted: " in done.output
    assert "encode draws 384 samples of the teacher: 19200 passes of the UNet" in done.output


def test_the_last_resort_is_one_that_there_is() -> None:
    assert show._last_resort(tune()) == "lower data.resolution or lower adapter.rank"
    started = replace(config(), adapter=Adapter(16, 16.0, start="runs/quickstart"))
    assert show._last_resort(started) == (
        "lower data.resolution or lower adapter.rank and start from a LoRA of that rank at most"
    )


# -- Measured ------------------------------------------------------------------------------------------------


def test_the_probe_of_a_base_at_hand(tmp_path: Path) -> None:
    """In this process: two real steps with the embedded base's own weights, and the export."""
    wanted = config(
        "quickstart", "batch_size=2", "accumulation=3", "ema=0.9", f"output={tmp_path}", "logging.trackers=[]"
    )
    found = probe.measure(wanted, None)
    assert (found.device, found.weights, found.micro) == ("cpu", "real", 2)
    assert found.exported == 129 and found.seconds > 0
    assert found.phases.keys() == {"loading", "teacher pass", "target pass", "student pass", "optimizer step"}


@pytest.mark.parametrize(
    ("name", "overrides", "phases"),
    [
        ("finetune/tiny_brand", ("prior.prompts=asset:general", "ema=0.9"), set()),
        ("lcf/tiny_brand", ("teacher.weight=0", "guidance={}", "adapter.start=null"), {"target pass"}),
    ],
)
def test_the_probe_of_other_losses(
    name: str, overrides: tuple[str, ...], phases: set[str], tmp_path: Path
) -> None:
    given = ("batch_size=2", f"output={tmp_path}", "logging.trackers=[]")
    wanted = load(shipped.config_path(name), (*given, *overrides))
    assert isinstance(wanted, Training)
    found = probe.measure(wanted, None)
    assert found.exported == 129 and found.seconds > 0
    assert found.phases.keys() == {"loading", "student pass", "optimizer step"} | phases


def test_random_weights_are_of_the_structure_and_of_unit_gain() -> None:
    shape = dict(base_profile.published("sdxl").unet_config) | probe._SMALL
    unet = trial.random_unet(
        {**shape, "addition_embed_type": None, "transformer_layers_per_block": 1}, torch.float32
    )
    weight = unet.conv_in.weight
    assert not any(p.is_meta or p.requires_grad or not p.isfinite().all() for p in unet.parameters())
    assert weight.var().item() * weight[0].numel() == pytest.approx(1, rel=0.15)


@pytest.mark.slow
def test_the_probe_measures_what_was_estimated() -> None:
    """A process of its own, two real steps, export and reload; about 15 s."""
    wanted = config("quickstart", "batch_size=24")
    measured = probe.run(wanted, None)
    found = Planner(MetaModel(base_profile.find(wanted.base), wanted.adapter), "cpu")(wanted)
    assert measured.device == "cpu" and measured.exported == 129 and measured.seconds > 0
    assert measured.peak is not None
    assert found.resident == pytest.approx(measured.peak, rel=0.2)
    assert measured.peak == max(measured.phases.values())


@pytest.mark.slow
def test_a_probe_that_fails_says_why(tmp_path: Path) -> None:
    wanted = replace(config("quickstart"), base=Base(str(tmp_path / "nothing")))
    with pytest.raises(UserError, match="there is no such folder"):
        probe.run(wanted, None)


def of_channels(folder: Path, unet: int, vae: int) -> Base:
    """The embedded base's configuration files, with other numbers of latent channels, and no weights."""
    for part, changes in (
        ("unet", {"in_channels": unet, "out_channels": vae}),
        ("vae", {"latent_channels": vae}),
    ):
        source = assets.path("tiny-sd") / part / "config.json"
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps({**json.loads(source.read_text()), **changes}))
    for part in ("text_encoder", "scheduler"):
        shutil.copytree(assets.path("tiny-sd") / part, folder / part)
    shutil.copy(assets.path("tiny-sd") / "model_index.json", folder)
    return Base(str(folder))


def test_a_base_may_have_other_latents_but_unet_and_vae_must_agree(tmp_path: Path) -> None:
    found = base_profile.find(of_channels(tmp_path / "36", 36, 36))
    own, wider = (MetaModel(each, config().adapter) for each in (base_profile.find(config().base), found))
    assert (own.subject.channels, wider.subject.channels) == (24, 36)
    # the first and the last convolution, 3 by 3 between 48 channels and 12 more at 16 by 16 places
    more = 2 * (2 * 9 * 48 * 12 * 16 * 16)
    passes = [stage.drawing(64, torch.float32).flops for stage in (own, wider)]
    assert passes[1] - passes[0] == more
    records = [disk.disk(config(), Planner(stage)).record for stage in (own, wider)]
    assert records[1] - records[0] == 4 * 12 * 16 * 16  # bytes of a row of the cache
    with pytest.raises(UserError, match="its UNet takes 9 channels, its VAE gives 4; inpainting and depth"):
        base_profile.find(of_channels(tmp_path / "9", 9, 4))
