"""`lcm-kit plan`: counts against published figures, memory against closed forms and a measured peak."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner, Result

from lcm_kit import shipped
from lcm_kit.cli_plan import verbs
from lcm_kit.config.load import load
from lcm_kit.config.schema import Adapter, Base, Distill, Optimizer
from lcm_kit.errors import UserError
from lcm_kit.plan import advice, estimate, probe, subject
from lcm_kit.plan.estimate import GIB, Planner
from lcm_kit.plan.rehearsal import Stage, teacher_calls
from lcm_kit.plan.tracker import Held, Kernels, Ledger, a_prime, largest

TERA = 1e12

pytestmark = pytest.mark.slow  # more than a minute on two cores


def config(name: str = "quickstart", *overrides: str) -> Distill:
    loaded = load(shipped.config_path(name), overrides)
    assert isinstance(loaded, Distill)
    return loaded


def plan(*arguments: str | Path) -> Result:
    return CliRunner().invoke(verbs, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def sd1() -> Stage:
    return Stage(subject.published("sd1"), Adapter())


@pytest.fixture(scope="module")
def sdxl() -> Stage:
    return Stage(subject.published("sdxl"), Adapter())


@pytest.fixture(scope="module")
def tiny() -> Planner:
    quickstart = config()
    return Planner(Stage(subject.find(quickstart.base), quickstart.adapter))


# -- Counts --------------------------------------------------------------------------------------------------


def test_weights_of_sd15_and_sdxl(sd1: Stage, sdxl: Stage) -> None:
    """The published sizes, and those of the published LCM-LoRAs."""
    assert (sd1.weights.base, sum(sd1.weights.lora)) == (859_520_964, 67_252_224)
    assert (sdxl.weights.base, sum(sdxl.weights.lora)) == (2_567_463_684, 196_751_360)
    # shares that bitsandbytes reaches, shared/FACTS.md; two embeddings are kept by ours
    assert sd1.weights.quantizable / sd1.weights.base == pytest.approx(0.31, abs=0.01)
    assert sdxl.weights.quantizable / sdxl.weights.base == pytest.approx(0.87, abs=0.01)


def test_ssd1b_has_1_3_billion_weights() -> None:
    assert Stage(subject.published("ssd1b"), Adapter(4)).weights.base == pytest.approx(1.3e9, rel=0.03)


def test_flops_of_sd15(sd1: Stage) -> None:
    """shared/FACTS.md: batch 1, 512 pixels, a multiply-add counts as two; the LoRA adds 12%."""
    plain = sd1.rehearse(512, torch.float32, cuda=False, checkpointing=False)
    assert plain.teacher.flops / TERA == pytest.approx(0.80, abs=0.005)
    assert plain.forward / plain.teacher.flops == pytest.approx(1.12, abs=0.005)
    assert plain.target.flops == plain.forward
    # fused attention's backward repeats its first product, so a little more than the 2.00 without it
    assert plain.student.flops / TERA == pytest.approx(2.00, rel=0.04)
    repeated = sd1.rehearse(512, torch.float32, cuda=False, checkpointing=True)
    assert repeated.student.flops / TERA == pytest.approx(2.78, rel=0.04)


@pytest.mark.slow
def test_flops_of_sdxl(sdxl: Stage) -> None:
    found = sdxl.rehearse(1024, torch.float16, cuda=True, checkpointing=True)
    assert found.teacher.flops / TERA == pytest.approx(6.76, abs=0.005)
    assert found.forward / found.teacher.flops == pytest.approx(1.08, abs=0.005)
    assert found.student.flops / TERA == pytest.approx(22.8, rel=0.03)


@pytest.mark.parametrize(("solver", "calls"), [("ddim", 1), ("heun", 2), ("dpmpp_2s", 2)])
def test_flops_of_a_step_count_every_teacher_pass(solver: str, calls: int, tiny: Planner) -> None:
    wanted = config("quickstart", f"solver={solver}", "accumulation=3", "batch_size=2")
    assert teacher_calls(wanted) == calls
    passes = tiny.stage.rehearse(64, torch.float16, cuda=True, checkpointing=False)
    flops = tiny(wanted).flops
    assert flops["teacher"] == pytest.approx(passes.teacher.flops * 2 * calls * 6)
    assert flops["target"] == pytest.approx(flops["student forward"])


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


def test_autocast_of_a_gpu_has_norms_in_float32() -> None:
    x, w = (torch.empty(13, 32, device="meta", dtype=torch.float16) for _ in range(2))
    with Kernels(torch.float16, cuda=True):
        assert nn.functional.layer_norm(x, (32,)).dtype == torch.float32
        assert nn.functional.linear(x.float(), w.float()).dtype == torch.float16
    with Kernels(torch.float16, cuda=False):
        assert nn.functional.layer_norm(x, (32,)).dtype == torch.float16


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
    from lcm_kit.memory import _quantized

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
    assert estimate.base_bytes(wanted, weights, torch.float16) == pytest.approx(real, rel=0.002)


def test_bytes_of_8_bit_moments_are_those_of_bitsandbytes(tiny: Planner) -> None:
    from lcm_kit.memory import make_optimizer

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
        found = estimate.moment_bytes(config("quickstart", f"optimizer.name={name}"), weights)
        assert found == pytest.approx(real, rel=1e-3) and found >= per * sum(weights.lora)


def test_parts_in_closed_form(tiny: Planner) -> None:
    numbers = tiny.stage.weights
    lora = sum(numbers.lora)
    found = tiny(config("quickstart", "precision=float32", "ema=0.9", "accumulation=2"))
    assert found.staying == {
        "base weights": 4 * numbers.base, "LoRA weights": 4 * lora, "optimizer moments": 8 * lora,
        "EMA of the LoRA": 4 * lora, "accumulated gradients": 4 * lora,
    }  # fmt: skip
    assert found.peak == sum(found.staying.values()) + max(found.phases.values())
    assert found.phase == "student pass"
    half = tiny(config("quickstart", "precision=bfloat16"))
    assert half.staying["base weights"] == 2 * numbers.base
    assert half.staying["accumulated gradients"] == half.staying["EMA of the LoRA"] == 0
    assert half.phases["optimizer step"] == 4 * lora


def test_activations_grow_with_the_batch_and_nothing_else_does(tiny: Planner) -> None:
    found = [tiny(config("quickstart", f"batch_size={n}")) for n in (64, 128, 256)]
    assert found[0].staying == found[1].staying
    for phase in ("teacher pass", "student pass"):
        small, middle, big = (f.phases[phase] for f in found)
        assert big - middle == pytest.approx(2 * (middle - small), rel=0.01)


@pytest.mark.parametrize(
    "override",
    ["gradient_checkpointing=true", "memory.quantize=nf4", "optimizer.name=adamw8bit", "precision=bfloat16"],
)
def test_every_saving_saves(override: str, tiny: Planner) -> None:
    before = tiny(config("quickstart", "precision=float32"))
    after = tiny(config("quickstart", "precision=float32", override))
    assert after.peak < before.peak


def test_disk_of_the_embedded_base(tiny: Planner) -> None:
    """A row is 20 KiB: float32 latents 4x16x16 and 32 embeddings of 128 numbers; there are 480 pictures."""
    found = estimate.disk(config("quickstart"), tiny)
    side = 64 // tiny.stage.subject.structure.factor
    assert found.record == 4 * (
        4 * side * side + tiny.stage.subject.tokens * tiny.stage.subject.structure.width
    )
    assert found.records == 480 and found.cache == 480 * found.record
    assert found.state == 12 * sum(tiny.stage.weights.lora)
    assert estimate.disk(config("quickstart", "data.flip=true"), tiny).records == 960
    assert estimate.disk(config("distill/sd15_lcm"), tiny).cache is None


# -- Which base ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "label"),
    [
        ("stabilityai/stable-diffusion-xl-base-1.0", "SDXL"),
        ("segmind/SSD-1B", "SSD-1B"),
        ("stabilityai/stable-diffusion-2-1", "Stable Diffusion 2.x"),
        ("someone/dreams", "Stable Diffusion 1.x"),
    ],
)
def test_a_base_that_is_not_at_hand_is_told_by_its_name(path: str, label: str) -> None:
    found = subject.find(Base(path))
    assert found.structure.label == label and found.note is not None and "--structure" in found.note
    assert subject.find(Base(path), "sdxl").note is None


def test_a_base_at_hand_is_what_its_files_say(sdxl_base: Path, sd_base: Any) -> None:
    xl, sd = subject.find(Base(str(sdxl_base))), subject.find(Base(str(sd_base("epsilon"))))
    assert (xl.structure.family, xl.tokens, xl.pooled, xl.note) == ("sdxl", 24, 32, None)
    assert (sd.structure.family, sd.tokens, sd.pooled) == ("sd", 24, 0)
    with pytest.raises(UserError, match="there is no such folder"):
        subject.find(Base("./nowhere"))


# -- Fits, and what to change --------------------------------------------------------------------------------


def test_a_card_keeps_a_gibibyte_for_cuda(tiny: Planner) -> None:
    found = tiny(config())
    assert found.fits(found.peak / GIB + 1) and not found.fits(found.peak / GIB + 0.999)


def test_the_smallest_change_that_fits_comes_first(sd1: Stage) -> None:
    planner, wanted = Planner(sd1), config("distill/sd15_lcm", "gradient_checkpointing=false")
    tried = advice.what_to_change(planner, wanted, 12)
    assert [option.typed for option in tried] == ["gradient_checkpointing=true"]
    assert tried[0].estimate.config.gradient_checkpointing and tried[0].estimate.fits(12)
    small = advice.what_to_change(planner, wanted, 5)
    assert small[-1].estimate.fits(5) and not any(o.estimate.fits(5) for o in small[:-1])
    assert small[-1].overrides["batch_size"] * small[-1].overrides["accumulation"] == 16
    hopeless = advice.what_to_change(planner, wanted, 1.5)
    assert not hopeless[-1].estimate.fits(1.5) and hopeless[-1].overrides["batch_size"] == 1


def test_presets_have_the_largest_batch_that_fits_and_the_same_samples_a_step(sd1: Stage) -> None:
    planner, wanted = Planner(sd1), config("distill/sd15_lcm")
    found = advice.presets(planner, wanted)
    estimates = [option.estimate for option in found.values() if option]
    assert len(estimates) == 6
    assert all(e.config.batch_size * e.config.accumulation == 16 for e in estimates)
    assert all(e.fits(card) for card, e in zip(found, estimates, strict=True))
    sizes = [e.config.batch_size for e in estimates]
    assert sizes == sorted(sizes)
    # the overrides as typed give the config that was planned
    for option in found.values():
        assert option and config("distill/sd15_lcm", *option.typed.split()) == option.estimate.config


# -- The command ---------------------------------------------------------------------------------------------


def test_the_command_prints_the_plan() -> None:
    done = plan("quickstart", "batch_size=8")
    assert done.exit_code == 0
    for words in ("5.3M of the UNet", "0.99M of the LoRA", "peak", "480 rows", "8 GB card: fits", "80 GB"):
        assert words in done.output, words
    assert re.search(r"a step of 8 samples: [\d.]+ GFLOPs", done.output)


def test_a_card_that_is_too_small_is_exit_code_1_and_advice() -> None:
    done = plan("quickstart", "batch_size=512", "--device-memory", "2")
    assert done.exit_code == 1 and "To fit into 2 GB add: gradient_checkpointing=true" in done.output
    assert plan("quickstart", "batch_size=512", "--device-memory", "80").exit_code == 0


def test_another_recipe_and_another_structure_are_refused() -> None:
    refused = plan("evaluation/quality")
    assert isinstance(refused.exception, UserError) and "train/distill" in str(refused.exception)
    assert plan("quickstart", "--structure", "sd3").exit_code == 2


# -- Measured ------------------------------------------------------------------------------------------------


def test_the_probe_measures_what_was_estimated() -> None:
    """A process of its own, two real steps, export and reload; about 15 s."""
    wanted = config("quickstart", "batch_size=24")
    measured = probe.run(wanted, None)
    found = Planner(Stage(subject.find(wanted.base), wanted.adapter), "cpu")(wanted)
    assert measured.device == "cpu" and measured.exported == 129 and measured.seconds > 0
    assert measured.peak is not None
    assert found.peak == pytest.approx(measured.peak, rel=0.2)
