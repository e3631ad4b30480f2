"""`lcm-kit plan` of distribution matching: FLOPs and bytes against those of the real step."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lcm_kit import bases
from lcm_kit.adapter import matching, roles
from lcm_kit.adapter.adapted_unet import TRAINED, AdaptedUNet
from lcm_kit.adapter.matching import FAKE, Matching
from lcm_kit.adapter.roles import Given, Objective, Roles
from lcm_kit.bases.condition import Condition
from lcm_kit.config import shipped
from lcm_kit.config.load import load
from lcm_kit.config.schema import Distill
from lcm_kit.core.matching import Draws
from lcm_kit.core.methods import DMD, Times
from lcm_kit.core.schedule import Schedule
from lcm_kit.plan import base_profile, disk, phases, probe, show, style, work
from lcm_kit.plan.dry_run import MetaModel
from lcm_kit.plan.estimate import Planner
from lcm_kit.plan.phases import FAKE_TURN, STUDENT_TURN
from lcm_kit.plan.style import Style
from lcm_kit.plan.tracker import Kernels, Ledger, checkpoint
from lcm_kit.training import randomness
from tests.test_plan import plan

N = 13  # samples: the ledger's prime
CONSISTENT = ("method.consistency=0.5", "optimizer.betas=[0.9, 0.99]")


def config(*overrides: str) -> Distill:
    loaded = load(shipped.config_path("distill/tiny_dmd"), overrides)
    assert isinstance(loaded, Distill)
    return loaded


@pytest.fixture(scope="module")
def stage() -> MetaModel:
    wanted = config()
    return MetaModel(base_profile.find(wanted.base), wanted.adapter, fake=True)


@pytest.fixture
def kept_stage(stage: MetaModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command finds the rehearsals done."""
    monkeypatch.setattr("lcm_kit.plan.dry_run.MetaModel", lambda *_: stage)


@pytest.fixture
def planner(stage: MetaModel) -> Planner:
    """One of its own for each test: a planner takes another stage where a config asks for it."""
    return Planner(stage)


class Step:
    """The turns of a config's step on the embedded base, without updates; `n` samples.

    With random numbers, or on the meta device, where torch counts the same operators and computes nothing.
    """

    def __init__(
        self, wanted: Distill, dtype: torch.dtype, n: int, look: Style | None = None, device: str = "meta"
    ) -> None:
        base = bases.inspect_base(wanted.base.path)
        unet = bases.load_unet(base).to(device, dtype)
        self.adapted = AdaptedUNet(unet)
        with torch.device(device):
            style.put_on(self.adapted, look)
            for name in (TRAINED, FAKE):
                self.adapted.add_lora(wanted.adapter, name=name, on_teacher=name == FAKE)
            assert self.adapted.make_fast()
            width, self.shape = unet.config.cross_attention_dim, (unet.config.in_channels, 16, 16)
            condition, empty = (Condition(torch.randn(k, 32, width, dtype=dtype)) for k in (n, 1))
            x0, noise = torch.randn(n, *self.shape), torch.randn(n, *self.shape)
            zeros, guidance = torch.zeros(n, dtype=torch.int64), torch.full((n,), 5.0)
        if wanted.gradient_checkpointing:
            unet.enable_gradient_checkpointing(*([checkpoint] if device == "meta" else []))
        self.given = Given(x0, noise, Times(zeros + 999, zeros + 499, zeros), guidance, condition)
        schedule = Schedule.from_config(base.scheduler_config).to(device)
        of = Roles(self.adapted, unet, [], empty, schedule, base.prediction_type, Objective.of(wanted), dtype)
        assert isinstance(wanted.method, DMD)
        self.matching, self.n, self.device = Matching(of, wanted.method), n, device
        self.held = [*unet.parameters(), x0, noise, condition.embeds, empty.embeds]

    def draws(self, steps: int, step: int) -> Draws:
        with torch.device(self.device):
            start, noise = torch.randn(self.n, *self.shape), torch.randn(self.n, *self.shape)
            renewed, t = torch.randn(self.n, step, *self.shape), torch.full((self.n,), 500)
        return Draws(steps, step, start, renewed, t, noise)

    def turn(self, name: str, draws: Draws) -> None:
        """Of the fake score, which walks; or of the student, from where that has left it."""
        losses = self.matching.losses if name == TRAINED else self.matching.fake_losses
        with self.adapted.using(name):
            with Kernels() if self.device == "meta" else nullcontext():
                if name == FAKE:
                    self.arrived = self.matching.arrived(self.given, draws)
                loss = losses(self.given, draws, self.arrived).mean()
            loss.backward()
        for p in self.adapted.parameters(name):
            p.grad = None


# -- FLOPs ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [(), CONSISTENT])
def test_flops_of_a_step_are_those_of_the_real_one_in_the_mean(
    overrides: tuple[str, ...], planner: Planner
) -> None:
    """Torch's own counter, at every place of a trajectory, as often as each is drawn."""
    wanted = config("method.steps=[2]", "method.fake_updates=3", "precision=bfloat16", "batch_size=1",
                    "accumulation=2", *overrides)  # fmt: skip
    step, counted = Step(wanted, torch.bfloat16, 1), {FAKE: 0.0, TRAINED: 0.0}
    for place in (0, 1):
        for name in counted:
            with FlopCounterMode(display=False) as counter:
                step.turn(name, step.draws(2, place))
            counted[name] += counter.get_total_flops() / 2
    found = work.flops_of_step(wanted, planner.rehearse(wanted), planner.rehearse(wanted, fake=True))
    assert sum(found.values()) == pytest.approx(2 * (counted[TRAINED] + 3 * counted[FAKE]), rel=0.001)
    names = ["trajectory", "teacher", "fake score forward", "fake score backward"]
    names += ["target"] * bool(overrides) + ["student forward", "student backward"]
    assert list(found) == names


def test_places_in_the_mean_are_those_that_are_drawn() -> None:
    wanted = config("method.steps=[1, 4, 8]", "method.fake_updates=1")
    method = wanted.method
    assert isinstance(method, DMD)
    schedule = Schedule.from_config({})
    places = [d.step for k in range(400) for d in randomness.turns_of(wanted, schedule, (1,), k, range(1))]
    # the variance of a place is below 6, so of the mean of 800 below 0.09 squared
    assert matching.place_in_the_mean(method) == pytest.approx(sum(places) / len(places), abs=0.27)
    assert matching.place_in_the_mean(method) == pytest.approx((0 + 1.5 + 3.5) / 3)


@pytest.mark.parametrize(("weight", "guidance"), [(0.0, 5.0), (0.5, 5.0), (0.5, 1.0), (0.0, 1.0)])
def test_passes_of_a_step(weight: float, guidance: float) -> None:
    wanted = config(f"method.consistency={weight}", "method.steps=[2]", "method.fake_updates=3",
                    f"guidance={{min: {guidance}, max: {guidance}}}")  # fmt: skip
    assert isinstance(wanted.method, DMD)
    rows, more = (2 if guidance > 1 else 1), (1 if weight else 0)
    assert roles.passes(wanted) == {"teacher": rows * more, "target": more, "student": more}
    assert matching.passes(wanted, wanted.method) == {
        "teacher": rows * (1 + more), "target": more, "student": 1 + more, "trajectory": 3 * 1.5,
        "fake score": 1, "fake score, trained": 3,
    }  # fmt: skip


# -- Bytes ---------------------------------------------------------------------------------------------------


LOOK = Style({"mid_block.attentions.0.transformer_blocks.0.attn1.to_q": 8}, False)


@pytest.mark.parametrize(
    ("dtype", "overrides", "look", "device", "near"),
    [
        (torch.float32, (), None, "meta", 0.02),
        (torch.bfloat16, ("guidance={min: 1, max: 1}",), None, "meta", 0.02),
        pytest.param(torch.float32, CONSISTENT, None, "meta", 0.02, marks=pytest.mark.slow),
        # what is computed anew in the backward sees the passes between: a twentieth more than planned
        pytest.param(
            torch.bfloat16, ("gradient_checkpointing=true",), None, "meta", 0.06, marks=pytest.mark.slow
        ),
        (torch.float32, (), LOOK, "meta", 0.02),
        pytest.param(torch.float32, (), None, "cpu", 0.02, marks=pytest.mark.slow),
        pytest.param(torch.float32, CONSISTENT, None, "cpu", 0.02, marks=pytest.mark.slow),
    ],
)
def test_a_turn_holds_what_is_planned(
    dtype: torch.dtype,
    overrides: tuple[str, ...],
    look: Style | None,
    device: str,
    near: float,
    planner: Planner,
) -> None:
    """The ledger over both turns of the real code, after turns that left what they leave, to `near`."""
    precision = str(dtype).removeprefix("torch.")
    small = "validation.prompts=null", "validation.diversity=0", f"precision={precision}", f"batch_size={N}"
    wanted = config(*small, *overrides)
    if look:
        planner.stage = replace(planner.stage, style=look, _kept={}, _built={})
    student, fake = planner.rehearse(wanted), planner.rehearse(wanted, fake=True)
    planned = phases.of_training(wanted, student, fake, planner.stage, dtype, "cuda")
    step = Step(wanted, dtype, N, look, device)
    draws = step.draws(4, 3)
    ledger = Ledger(N, frozenset(step.adapted.gradient_bytes()))
    ledger.ignore([*step.held, *draws[2:]])
    with ledger:
        step.turn(FAKE, draws)
        step.turn(TRAINED, draws)
        for name, phase in ((FAKE, FAKE_TURN), (TRAINED, STUDENT_TURN)):
            ledger.moments.clear()
            step.turn(name, draws)
            real = max(m.at(N) for m in ledger.moments)
            parts = planned[phase]
            told = parts["activations"] + parts["gradients"]
            assert told == pytest.approx(real, rel=near), phase


def test_what_stays_is_there_twice(planner: Planner) -> None:
    wanted, plain = config(), config("method={name: lcm}")
    host = Planner(planner.stage, "cpu")(wanted)
    lora = 4 * sum(host.weights.lora)
    assert host.staying == {
        "base weights": 4 * host.weights.base, "teacher's adapters": 0, "LoRA weights": lora,
        "fake score's LoRA": lora, "optimizer moments": 4 * lora, "EMA of the LoRA": 0,
    }  # fmt: skip
    names = [FAKE_TURN, STUDENT_TURN, "optimizer step", "validation", "loading", "saving"]
    assert list(host.phases) == names
    assert host.passing("saving") == 6 * lora
    gathered = Planner(planner.stage, "cpu")(replace(wanted, batch_size=8, accumulation=2))
    for phase in (FAKE_TURN, STUDENT_TURN):
        assert gathered.phases[phase]["gradients"] == host.phases[phase]["gradients"] + lora
    written = disk.disk(wanted, planner)
    assert (written.state, written.adapters) == (2 * 3 * lora, lora)
    assert not planner.stage_of(plain).fake and planner.stage_of(wanted).fake
    forwards = [work.of_forwards(each, planner.rehearse(each)) for each in (wanted, config(*CONSISTENT))]
    assert forwards[0] == pytest.approx(forwards[1])


@pytest.mark.usefixtures("kept_stage")
def test_the_command_names_the_parts() -> None:
    done = plan("distill/tiny_dmd", "--device", "cpu")
    told = " ".join(done.output.split())
    assert done.exit_code == 0, done.output
    for words in ("of the LoRA, and as many of the fake score's, trained", "(trajectory ",
                  "fake score's LoRA", "fake score backward ", "fake score's turn "):  # fmt: skip
        assert words in told, words


# -- The probe -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overrides", [(), CONSISTENT])
def test_the_probe_makes_real_turns(
    overrides: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both LoRAs are updated, by optimizers of their own, the fake score's as often as it has turns."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    made: list[Any] = []
    real = probe.trial.make

    def make(*given: Any) -> Any:
        made.append(real(*given))
        return made[-1]

    monkeypatch.setattr(probe.trial, "make", make)
    wanted = config("batch_size=2", "accumulation=3", "method.fake_updates=2", f"output={tmp_path}",
                    "logging.trackers=[]", *overrides)  # fmt: skip
    found = probe.measure(wanted, None)
    assert found.exported == 129 and found.seconds > 0 and found.micro == 2
    assert found.phases.keys() == {"loading", FAKE_TURN, STUDENT_TURN, "optimizer step"}
    tried = made[-1]
    assert tried.adapted.trained == (TRAINED, FAKE)
    steps = {}
    for name, optimizer in tried.optimizers.items():
        assert any(p.any() for key, p in tried.adapted.named(name).items() if "lora_B" in key)
        steps[name] = int(next(iter(optimizer.state_dict()["state"].values()))["step"])
    assert steps == {TRAINED: probe.STEPS, FAKE: 2 * probe.STEPS}


def test_the_probe_says_which_trajectory_it_tried(
    planner: Planner, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = config("method.steps=[1, 4]")
    measured = probe.Probe("cpu", "real", 2.0, 2.0, False, None, {}, 16, 129)
    show.probe(measured, Planner(planner.stage, "cpu")(wanted))
    told = " ".join(capsys.readouterr().out.split())
    assert "steps of a trajectory before the one that is taught: 1 here, 0.75 in the mean" in told
