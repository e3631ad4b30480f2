"""Distribution matching in the real recipe: two LoRAs on one UNet, alternating updates, their state."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from lcm_kit import bases, sample
from lcm_kit.adapter.adapted_unet import TRAINED, AdaptedUNet
from lcm_kit.adapter.matching import FAKE, Matching
from lcm_kit.adapter.roles import Given, Objective, Roles
from lcm_kit.bases.condition import Condition
from lcm_kit.core.guidance import guide
from lcm_kit.core.matching import Draws, timesteps
from lcm_kit.core.methods import DMD, Times
from lcm_kit.core.prediction import from_x0_eps, to_x0_eps
from lcm_kit.core.schedule import Schedule, add_noise
from lcm_kit.core.solvers import landed
from lcm_kit.training import checkpoints, randomness, turns
from tests.recipes.small import configure, contents, interrupted
from train import distill

SETTINGS: dict[str, Any] = {
    "steps": 7,
    "method": {"name": "dmd", "steps": [1, 2, 4], "fake_updates": 2, "fake_lr": 0.5},
    "optimizer": {"schedule": "cosine", "warmup_steps": 2, "betas": (0.0, 0.99)},
    "logging": {"every": 3},
    "checkpoint": {"every": 2},
}


@pytest.fixture(autouse=True)
def _cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def test_a_run_that_was_stopped_goes_on_bit_for_bit_with_two_optimizers(
    distill_keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = distill.main(configure(distill_keys, tmp_path / "straight", **SETTINGS))
    config = configure(distill_keys, tmp_path / "stopped", **SETTINGS)
    interrupted(config, monkeypatch, at=5)
    torch.manual_seed(99)
    stopped = distill.main(config)
    assert contents(stopped) == contents(straight)
    folder = checkpoints.newest(straight)
    assert folder is not None
    state = checkpoints.read(folder)
    assert set(state.optimizers) == {TRAINED, FAKE}
    moved = [key for key in state.lora if key.startswith(f"{FAKE}/") and "lora_B" in key]
    assert moved and all(state.lora[key].any() for key in moved)  # B began at zero
    made = {name: each["state"][0]["step"] for name, each in state.optimizers.items()}
    assert made == {TRAINED: 7, FAKE: 14}  # two of the fake score's for one of the student


def test_the_file_of_a_run_holds_the_student_alone(distill_keys: dict[str, Any], tmp_path: Path) -> None:
    run = distill.main(configure(distill_keys, tmp_path, **{**SETTINGS, "steps": 2}))
    unet = bases.load_unet(bases.inspect_base(distill_keys["base"]["path"]))
    plain = AdaptedUNet(unet)
    plain.add_lora(configure(distill_keys, tmp_path, **SETTINGS).adapter)
    from safetensors.torch import load_file

    assert load_file(run / "adapter/lora.safetensors").keys() == plain.state().keys()


def test_the_fake_score_learns_at_its_own_rate(
    distill_keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: dict[str, list[float]] = {TRAINED: [], FAKE: []}
    turn = turns.Learner.turn

    def seen(self: Any, number: int, rate: float, losses: Any, ids: Any) -> None:
        turn(self, number, rate, losses, ids)
        rates[self.name].append(self.guard.optimizer.param_groups[0]["lr"])

    monkeypatch.setattr(turns.Learner, "turn", seen)
    distill.main(configure(distill_keys, tmp_path, **{**SETTINGS, "steps": 3}))
    assert rates[FAKE] == [0.5e-2] * 6  # half of optimizer.lr, to the end
    assert rates[TRAINED][1] == 1e-2 and rates[TRAINED][0] == 0.5e-2  # the warm-up


def test_a_turn_is_where_its_own_trajectory_leads_and_the_students_walks_no_second_time(
    distill_keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    walked, walk = [], Matching.arrived

    def counted(self: Matching, given: Given, draws: Draws) -> tuple[Tensor, Tensor]:
        walked.append(len(draws.noise))
        return walk(self, given, draws)

    def checked(name: str) -> Any:
        losses = getattr(Matching, name)

        def check(self: Matching, given: Given, draws: Draws, arrived: tuple[Tensor, Tensor]) -> Tensor:
            assert all(torch.equal(a, b) for a, b in zip(arrived, walk(self, given, draws), strict=True))
            return losses(self, given, draws, arrived)

        return check

    monkeypatch.setattr(Matching, "arrived", counted)
    for name in ("losses", "fake_losses"):
        monkeypatch.setattr(Matching, name, checked(name))
    keys = {**SETTINGS, "steps": 3, "batch_size": 2, "accumulation": 2}
    distill.main(configure(distill_keys, tmp_path, **keys))
    assert walked == [2] * 3 * 2 * 2  # of 3 steps 2 turns of the fake score, of each two micro-batches


def test_the_fake_score_learns_where_t_is_chosen_by_another_distribution_too(
    distill_keys: dict[str, Any], tmp_path: Path
) -> None:
    keys = {"method": {"name": "dmd", "consistency": 0.5}, "grid": {"sampling": "lognormal"}, "steps": 1}
    distill.main(configure(distill_keys, tmp_path, **keys))
    folder = checkpoints.newest(tmp_path)
    assert folder is not None
    state = checkpoints.read(folder)
    assert set(state.optimizers) == {TRAINED, FAKE}
    assert any(state.lora[key].any() for key in state.lora if key.startswith(f"{FAKE}/") and "lora_B" in key)


# -- One step in a straight line -----------------------------------------------------------------------------


class Small:
    """A random UNet with both LoRAs, whose B are no zeros, a batch and its randomness."""

    def __init__(self, keys: dict[str, Any], method: DMD, *, fast: bool, place: int = 1) -> None:
        base = bases.inspect_base(keys["base"]["path"])
        self.kind, self.schedule = base.prediction_type, Schedule.from_config(base.scheduler_config)
        self.adapted = AdaptedUNet(bases.load_unet(base))
        config = configure(keys, Path("none"), method={"name": "dmd"})
        for k, name in enumerate((TRAINED, FAKE)):
            self.adapted.add_lora(config.adapter, name=name, seed=k, on_teacher=name == FAKE)
        g = torch.Generator().manual_seed(3)
        for name in self.adapted.trained:
            for p in self.adapted.parameters(name):
                p.data.copy_(0.1 * torch.randn(p.shape, generator=g))
        if fast:
            assert self.adapted.make_fast()
        unet, b = self.adapted.unet, 3
        width, shape = unet.config.cross_attention_dim, (unet.config.in_channels, 8, 8)
        self.named, empty = (Condition(torch.randn(n, 7, width, generator=g)) for n in (b, 1))
        self.empty, self.method = empty, method
        steps = method.steps[-1]
        self.draws = Draws(
            steps, place, torch.randn(b, *shape, generator=g), torch.randn(b, place, *shape, generator=g),
            torch.tensor([50, 400, 900]), torch.randn(b, *shape, generator=g),
        )  # fmt: skip
        self.guidance = torch.tensor([2.0, 3.0, 5.0])
        zeros = torch.zeros(b, dtype=torch.int64)
        times = Times(zeros + 999, zeros + 499, zeros)
        self.given = Given(
            torch.randn(b, *shape, generator=g), torch.randn(b, *shape, generator=g), times, self.guidance,
            self.named,
        )  # fmt: skip
        objective = Objective.of(config)
        self.roles = Roles(self.adapted, unet, [], empty, self.schedule, self.kind, objective, torch.float32)

    def losses(self, name: str) -> Tensor:
        matching = Matching(self.roles, self.method)
        losses = matching.losses if name == TRAINED else matching.fake_losses
        return losses(self.given, self.draws, matching.arrived(self.given, self.draws))

    def gradient(self, name: str) -> list[Tensor]:
        with self.adapted.using(name):
            self.losses(name).mean().backward()
        assert all(p.grad is None for p in self.adapted.parameters(FAKE if name == TRAINED else TRAINED))
        return [p.grad for p in self.adapted.parameters(name) if p.grad is not None]

    # the same with peft's own functions and the papers' formulas, step by step
    def says(self, on: str | None, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        for layer in self.adapted._layers:
            layer._disable_adapters, layer._active_adapter = on is None, [on or TRAINED]
        return self.adapted.unet(x, t, **condition.kwargs()).sample

    def straight(self, name: str) -> Tensor:
        draws, b = self.draws, len(self.draws.noise)
        points = timesteps(self.schedule, self.method.sampler, draws.steps)
        if self.method.conditioning_timestep:
            points = [self.method.conditioning_timestep]
        x, renew = draws.noise, self.method.sampler == "lcm"
        for i in range(draws.step + 1):
            t = torch.full((b,), points[i])
            last = i == draws.step
            with torch.set_grad_enabled(last and name == TRAINED):
                raw = self.says(TRAINED, x, t, self.named)
                x0, eps = to_x0_eps(self.schedule, self.kind, raw, x, t)
            if not last:
                s = torch.full((b,), points[i + 1])
                x = (
                    add_noise(self.schedule, x0, draws.renewed[:, i], s)
                    if renew
                    else landed(self.schedule, x0, eps, s)
                )
        x_t = add_noise(self.schedule, x0.detach(), draws.diffused, draws.t)
        if name == FAKE:
            mine = to_x0_eps(
                self.schedule, self.kind, self.says(FAKE, x_t, draws.t, self.named), x_t, draws.t
            )
            v, wanted = (
                from_x0_eps(self.schedule, "v_prediction", *pair, draws.t)
                for pair in (mine, (x0.detach(), draws.diffused))
            )
            return (v - wanted).square().mean()
        with torch.no_grad():
            plain = self.says(None, x_t, draws.t, self.empty.expand(b))
            guided = guide(plain, self.says(None, x_t, draws.t, self.named), self.guidance)
            real = to_x0_eps(self.schedule, self.kind, guided, x_t, draws.t)[0]
            fake = to_x0_eps(
                self.schedule, self.kind, self.says(FAKE, x_t, draws.t, self.named), x_t, draws.t
            )[0]
            weight = (x0.detach() - real).abs().mean((1, 2, 3), keepdim=True)
        self.says(TRAINED, x_t, draws.t, self.named)  # the flags as they are for the backward
        return (x0 * (fake - real) / weight).mean()  # its gradient in x0 is the one that is wanted


@pytest.mark.parametrize("name", [TRAINED, FAKE])
@pytest.mark.parametrize("sampler", ["ddim", "lcm"])
@pytest.mark.parametrize("way", ["fast", "peft", "checkpointed"])
def test_a_turns_gradient_is_that_of_the_formulas(
    distill_keys: dict[str, Any], name: str, sampler: Any, way: str
) -> None:
    method = DMD(steps=(3,), sampler=sampler)
    mine = Small(distill_keys, method, fast=way != "peft")
    if way == "checkpointed":
        mine.adapted.unet.enable_gradient_checkpointing()
        mine.adapted.unet.train()
    found = mine.gradient(name)
    theirs = Small(distill_keys, method, fast=False)
    theirs.straight(name).backward()
    wanted = [p.grad for p in theirs.adapted.parameters(name)]
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        assert b is not None
        torch.testing.assert_close(a, b, atol=2e-6 + 2e-4 * float(b.abs().max()), rtol=1e-3)


def test_one_step_may_be_told_another_timestep(
    distill_keys: dict[str, Any],
) -> None:
    method = DMD(steps=(1,), conditioning_timestep=399)
    mine, theirs = (Small(distill_keys, method, fast=fast, place=0) for fast in (True, False))
    found = mine.gradient(TRAINED)
    theirs.straight(TRAINED).backward()
    for a, p in zip(found, theirs.adapted.parameters(TRAINED), strict=True):
        assert p.grad is not None
        torch.testing.assert_close(a, p.grad, atol=2e-6 + 2e-4 * float(p.grad.abs().max()), rtol=1e-3)


def test_what_the_one_step_learned_is_what_diffusers_draws(distill_keys: dict[str, Any]) -> None:
    method = DMD(steps=(1,), conditioning_timestep=399)
    mine = Small(distill_keys, method, fast=False, place=0)
    with torch.no_grad(), mine.adapted.using(TRAINED):
        arrived = Matching(mine.roles, method).arrived(mine.given, mine.draws)
        wanted, _ = mine.roles.student(mine.given)(*arrived)
        pipe = sample.pipeline(distill_keys["base"]["path"], unet=mine.adapted.unet)
        scheduler = sample.scheduler(method.samplers[0], pipe.scheduler.config)
        settings = sample.call_settings(method.samplers[0], 1, 1.0)
        scheduler.set_timesteps(timesteps=settings["timesteps"])
        raw = mine.adapted.unet(mine.draws.noise, scheduler.timesteps[0], **mine.named.kwargs()).sample
        found = scheduler.step(raw, scheduler.timesteps[0], mine.draws.noise).denoised
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_a_picture_of_one_step_at_a_timestep_of_its_own(
    distill_keys: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    pipe = sample.pipeline(distill_keys["base"]["path"])
    diffusers.utils.logging.enable_propagation()
    try:
        drawn = sample.latents(pipe, ["picture a"], sampler="lcm:399", steps=1, seed=5)
    finally:
        diffusers.utils.logging.disable_propagation()
    assert not caplog.records  # diffusers warns of such timesteps, which are what is wanted
    schedule, t = Schedule.from_config(pipe.scheduler.config), torch.tensor([399])
    noise = torch.randn(drawn.shape[1:], generator=sample.generators(5, 0, 1)[0])[None]
    with torch.no_grad():
        text = pipe.encode_prompt("picture a", "cpu", 1, False)[0]
        raw = pipe.unet(noise, t, text).sample
    x0, _ = to_x0_eps(schedule, pipe.scheduler.config.prediction_type, raw, noise, t)
    torch.testing.assert_close(drawn, x0, atol=1e-4, rtol=1e-4)


def test_the_consistency_loss_stays_on_at_its_weight(distill_keys: dict[str, Any]) -> None:
    both, alone = (Small(distill_keys, DMD(steps=(2,), consistency=c), fast=True) for c in (0.7, 0.0))
    with torch.no_grad():
        torch.testing.assert_close(
            both.losses(TRAINED), alone.losses(TRAINED) + 0.7 * alone.roles.losses(alone.given)
        )


def test_the_fake_score_has_the_teachers_style_and_the_student_has_not(
    mixed: tuple[dict[str, Any], Any],
) -> None:
    from lcm_kit.adapter.styles import add_teacher_adapters

    keys, styled = mixed
    config = configure(keys, Path("none"), method={"name": "dmd"})
    base = bases.inspect_base(keys["base"]["path"])
    adapted = AdaptedUNet(bases.load_unet(base))
    add_teacher_adapters(adapted, config.teacher, base)
    for name in (TRAINED, FAKE):
        adapted.add_lora(config.adapter, name=name, on_teacher=name == FAKE)
    plain = bases.load_unet(base)
    x = torch.randn(2, plain.config.in_channels, 8, 8)
    text = torch.randn(2, 7, plain.config.cross_attention_dim)
    with torch.no_grad():
        said = partial(lambda unet: unet(x, torch.tensor([20, 700]), text).sample)
        with adapted.using(FAKE):
            torch.testing.assert_close(said(adapted.unet), said(styled), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(said(adapted.unet), said(plain), atol=1e-6, rtol=1e-5)


# -- The randomness of a turn --------------------------------------------------------------------------------


def test_a_samples_randomness_is_the_same_in_any_split(distill_keys: dict[str, Any]) -> None:
    config = configure(distill_keys, Path("none"), method={"name": "dmd", "fake_updates": 3})
    schedule = Schedule.from_config({})
    whole = randomness.turns_of(config, schedule, (4, 8, 8), 5, range(6))
    assert len(whole) == 4
    for k in range(3):
        part = randomness.turns_of(config, schedule, (4, 8, 8), 5, range(2 * k, 2 * k + 2))
        for a, b in zip(whole, part, strict=True):
            mine = a.of(slice(2 * k, 2 * k + 2))
            assert (mine.steps, mine.step) == (b.steps, b.step)
            assert all(torch.equal(x, y) for x, y in zip(mine[2:], b[2:], strict=True))
    *before, last = whole
    noises = [each.noise[i] for each in before for i in range(6)]
    noises += [each.diffused[i] for each in whole for i in range(6)]
    assert all(not torch.equal(a, b) for i, a in enumerate(noises) for b in noises[:i])
    # the fake score has just seen the pictures that the student then learns by
    assert (last.steps, last.step) == (before[-1].steps, before[-1].step)
    assert torch.equal(last.noise, before[-1].noise) and torch.equal(last.renewed, before[-1].renewed)


def test_all_steps_of_all_trajectories_are_taught(distill_keys: dict[str, Any]) -> None:
    config = configure(distill_keys, Path("none"), method={"name": "dmd", "steps": [1, 2, 4]})
    schedule = Schedule.from_config({})
    seen = [randomness.turns_of(config, schedule, (1, 1, 1), step, range(1))[-1] for step in range(300)]
    wanted = {(n, k) for n in (1, 2, 4) for k in range(n)}
    assert {(each.steps, each.step) for each in seen} == wanted
    ones = sum(each.steps == 1 for each in seen) / len(seen)
    assert abs(ones - 1 / 3) < 0.08  # three standard deviations
    t = torch.cat([each.t for each in seen])
    assert int(t.min()) >= 20 and int(t.max()) <= 980
