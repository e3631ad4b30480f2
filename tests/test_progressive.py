"""Progressive distillation: against the paper's algorithm 2 in straight lines, and on Gaussian data."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from lcm_kit.adapter import roles as roles_module
from lcm_kit.adapter.adapted_unet import AdaptedUNet
from lcm_kit.adapter.roles import Given, Objective, Roles
from lcm_kit.adapter.stages import stage_at
from lcm_kit.bases.condition import Condition
from lcm_kit.config.load import RECIPES
from lcm_kit.config.schema import Distill
from lcm_kit.core.methods import Progressive, Stage, Times
from lcm_kit.core.prediction import KINDS, predictor
from lcm_kit.core.schedule import Schedule, add_noise, trailing
from lcm_kit.core.solvers import ddim
from lcm_kit.training.runtime import learning_rate
from tests.gaussians import ALL, BRAND, SD, guided_flow

SCHEDULE = Schedule.from_config(SD)
ZERO_SNR = Schedule.from_config(SD | {"rescale_betas_zero_snr": True})
WEIGHTINGS = ("truncated_snr", "snr_plus_one", "landing")


def configured(**keys: Any) -> Distill:
    """A config of progressive distillation with `keys`; those of the method under their own names."""
    method = {key: keys.pop(key) for key in ("start", "finish", "parts", "weighting", "name") if key in keys}
    given = {"recipe": "train/distill", "output": "x", "loss": {"name": "l2"}, **keys}
    return TypeAdapter(RECIPES["train/distill"]).validate_python(
        given | {"method": {"name": "progressive"} | method}
    )


# -- The loss ------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """A stand-in for a UNet: nonlinear in x, different at every t and for every caption."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, encoder_hidden_states: Tensor) -> Any:
        told = (t.to(x.dtype) / 1000 + encoder_hidden_states.mean((1, 2))).view(-1, 1, 1, 1)
        return SimpleNamespace(sample=self.b(torch.tanh(self.a(x) + told)))


TIMES = Times(
    t=torch.tensor([124, 499, 999]), s=torch.tensor([61, 436, 936]), end=torch.tensor([0, 374, 874])
)
SCALES = torch.tensor([1.0, 3.0, 5.5])


def given(times: Times = TIMES, scales: Tensor = SCALES) -> Given:
    g, n = torch.Generator().manual_seed(0), len(times.t)
    x0, noise = torch.randn(n, 4, 4, 4, generator=g), torch.randn(n, 4, 4, 4, generator=g)
    return Given(x0, noise, times, scales, Condition(torch.randn(n, 3, 5, generator=g)))


def in_training(kind: str, config: Distill, schedule: Schedule = SCHEDULE) -> tuple[Roles, Net]:
    """Roles of a net that moved away from its base in one stage, and then from that."""
    net = Net()
    adapted = AdaptedUNet(net)
    adapted.train_own_weights()
    snapshot = [p.detach().clone() for p in adapted.parameters()]
    empty = Condition(torch.zeros(1, 3, 5))
    roles = Roles(adapted, net, snapshot, empty, schedule, kind, Objective.of(config), torch.float32)
    moved(net, 1)
    return roles, net


@torch.no_grad()
def moved(net: Net, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p += 0.1 * torch.randn(p.shape, generator=g)


def papers_loss(kind: str, student: Net, teacher: Any, weighting: str, given: Given) -> Tensor:
    """Algorithm 2 of arXiv:2202.00512 in float64, x_hat by x_hat, without a line of lcm_kit."""
    abar = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).cumprod(0)
    alpha, sigma = abar.sqrt().double(), (1 - abar).sqrt().double()
    losses = []
    for i in range(len(given.x0)):
        t, t1, t2 = (int(times[i]) for times in given.times)  # the paper's t, t', t''
        z = alpha[t] * given.x0[i : i + 1].double() + sigma[t] * given.noise[i : i + 1].double()

        def x_hat(model: Any, z: Tensor, t: int, i: int = i) -> Tensor:
            output = model(z, torch.tensor([t]), i)
            if kind == "epsilon":
                return (z - sigma[t] * output) / alpha[t]
            return alpha[t] * z - sigma[t] * output if kind == "v_prediction" else output

        with torch.no_grad():
            x = x_hat(teacher, z, t)
            z1 = alpha[t1] * x + sigma[t1] / sigma[t] * (z - alpha[t] * x)
            x = x_hat(teacher, z1, t1)
            z2 = alpha[t2] * x + sigma[t2] / sigma[t1] * (z1 - alpha[t1] * x)
            ratio = sigma[t2] / sigma[t]
            aim = (z2 - ratio * z) / (alpha[t2] - ratio * alpha[t])

        def plain(z: Tensor, t: Tensor, i: int) -> Tensor:
            return student(z, t, given.condition.embeds[i : i + 1].double()).sample

        snr = alpha[t] ** 2 / sigma[t] ** 2
        weight = {
            "truncated_snr": max(float(snr), 1.0), "snr_plus_one": snr + 1,
            "landing": (alpha[t2] - ratio * alpha[t]) ** 2,
        }[weighting]  # fmt: skip
        losses.append(weight * (x_hat(plain, z, t) - aim).square().mean())
    return torch.stack(losses)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient_are_those_of_the_paper(kind: str, stage: int, weighting: str) -> None:
    """In the first stage the teacher is the base under guidance, then the student as it was, as it is."""
    config, batch = configured(weighting=weighting, start=16, finish=4), given()
    roles, net = in_training(kind, config)
    before = copy.deepcopy(net).double()
    roles.begin(config.stages[stage].first, config.stages[stage])
    moved(net, 2)
    student, base = copy.deepcopy(net).double(), Net().double()

    def guided(z: Tensor, t: Tensor, i: int) -> Tensor:
        captions = batch.condition.embeds[i : i + 1].double()
        none, said = (base(z, t, told).sample for told in (0 * captions, captions))
        return none + SCALES[i].double() * (said - none)

    def as_it_was(z: Tensor, t: Tensor, i: int) -> Tensor:
        return before(z, t, batch.condition.embeds[i : i + 1].double()).sample

    loss = roles.losses(batch)
    loss.mean().backward()
    wanted = papers_loss(kind, student, as_it_was if stage else guided, weighting, batch)
    wanted.mean().backward()
    torch.testing.assert_close(loss.double(), wanted, atol=1e-6, rtol=1e-4)
    for ours, papers in zip(net.parameters(), student.parameters(), strict=True):
        assert ours.grad is not None and papers.grad is not None
        torch.testing.assert_close(ours.grad.double(), papers.grad, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_the_weight_is_finite_where_there_is_noise_alone(weighting: str) -> None:
    """With zero terminal SNR alpha is 0 at t = 999: max(snr, 1) = snr + 1 = 1, and eps is x_t itself."""
    config = configured(weighting=weighting)
    times = Times(torch.tensor([999]), torch.tensor([874]), torch.tensor([749]))
    unit = float(config.method.unit(ZERO_SNR, times))
    assert unit == pytest.approx(1.0 if weighting == "landing" else 1 / float(ZERO_SNR.alpha[749]))
    roles, _ = in_training("v_prediction", config, ZERO_SNR)
    assert roles.losses(given(times, SCALES[:1])).isfinite().all()


def test_a_student_that_is_there_has_no_loss() -> None:
    """Every velocity is what the base's is for data that is one point: two steps are one, at any guidance."""
    point = torch.randn(1, 4, 1, 1, generator=torch.Generator().manual_seed(3))

    class Exact(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(1))

        def forward(self, x: Tensor, t: Tensor, encoder_hidden_states: Tensor) -> Any:
            alpha, sigma = SCHEDULE.at(t)
            eps = (x - alpha * point) / sigma
            return SimpleNamespace(sample=alpha * eps - sigma * point + self.bias)

    net, config = Exact(), configured(start=16, finish=4)
    adapted = AdaptedUNet(net)
    adapted.train_own_weights()
    roles = Roles(
        adapted, net, [torch.zeros(1)], Condition(torch.zeros(1, 3, 5)), SCHEDULE, "v_prediction",
        Objective.of(config), torch.float32,
    )  # fmt: skip
    for stage in config.stages:
        roles.begin(stage.first, stage)
        assert float(roles.losses(given()).detach().max()) < 1e-9
        with torch.no_grad():
            net.bias += 0.1
        assert float(roles.losses(given()).detach().min()) > 1e-5, "this test could not fail"
        with torch.no_grad():
            net.bias -= 0.1


# -- Stages --------------------------------------------------------------------------------------------------


def timesteps(n: int) -> list[int]:
    """0, and those of diffusers' DDIMScheduler with trailing spacing, ascending."""
    scheduler = DDIMScheduler(num_train_timesteps=1000, timestep_spacing="trailing")
    scheduler.set_timesteps(n)
    return [0, *sorted(scheduler.timesteps.tolist())]


@pytest.mark.parametrize("n_grid", [1, 2, 3, 4, 8, 16])
def test_a_step_of_the_student_is_two_of_its_teacher(n_grid: int) -> None:
    """Between the timesteps of diffusers' DDIM; all of the student's steps are trained."""
    times = Progressive().times(SCHEDULE, n_grid, 4000, torch.Generator().manual_seed(0))
    own, twice = timesteps(n_grid), timesteps(2 * n_grid)
    wanted = [(own[i + 1], twice[2 * i + 1], own[i]) for i in range(n_grid)]
    drawn = list(zip(*(time.tolist() for time in times), strict=True))
    assert set(drawn) == set(wanted) and twice[::2] == own
    for each in wanted:  # uniform: within five standard deviations
        chance = 1 / n_grid
        assert abs(drawn.count(each) - 4000 * chance) <= 5 * (4000 * chance * (1 - chance)) ** 0.5


@pytest.mark.parametrize(
    ("start", "finish", "parts", "steps", "wanted"),
    [
        (16, 4, (), 200, [(0, 100, 8), (100, 200, 4)]),
        (8, 1, (), 200, [(0, 67, 4), (67, 133, 2), (133, 200, 1)]),
        (8, 1, (2.0, 1.0, 1.0), 200, [(0, 100, 4), (100, 150, 2), (150, 200, 1)]),
        (6, 3, (5.0,), 7, [(0, 7, 3)]),
        (32, 1, (), 5, [(0, 1, 16), (1, 2, 8), (2, 3, 4), (3, 4, 2), (4, 5, 1)]),
    ],
)
def test_stages_share_the_run(
    start: int, finish: int, parts: tuple[float, ...], steps: int, wanted: list[tuple[int, int, int]]
) -> None:
    config = configured(start=start, finish=finish, parts=parts, steps=steps)
    assert config.stages == tuple(Stage(k, *each) for k, each in enumerate(wanted))
    held = [stage_at(config, step) for step in range(steps)]
    assert [(held.index(stage), held.index(stage) + held.count(stage)) for stage in config.stages] == [
        each[:2] for each in wanted
    ]
    assert config.method.steps == (finish,) and config.second_set


def test_the_rate_begins_anew_in_each_stage() -> None:
    config = configured(start=8, finish=2, steps=20, optimizer={"schedule": "linear", "warmup_steps": 2})
    rates = []
    for step in range(20):
        stage = stage_at(config, step)
        rates.append(learning_rate(config.optimizer, step - stage.first, stage.steps))
    assert rates[:10] == rates[10:] and rates[0] == 0.5e-4 and rates[9] == pytest.approx(1e-4 / 8)


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"ema": 0.9}, "ema has no place in method progressive: its target is the teacher"),
        ({"solver": "heun"}, "solver has no place in method progressive"),
        ({"grid": {"steps": 16}}, "grid has no place in method progressive"),
        ({"loss": {"weighting": "interval"}}, "loss.weighting has no place in method progressive"),
        ({"teacher": {"weight": 0.5}}, "teacher.weight has no place in method progressive"),
        ({"teacher": {"reuse": 2}}, "teacher.reuse has no place in method progressive"),
        ({"validation": {"held_out": 0.1}}, "validation.held_out has no place in method progressive"),
        ({"validation": {"control": "asset:everyday"}}, "validation.control has no place in method"),
        ({"start": 12, "finish": 4}, "start 12 does not become finish 4 by halving"),
        ({"start": 4, "finish": 4}, "start 4 does not become finish 4 by halving"),
        ({"start": 8, "finish": 2, "parts": [1.0]}, "parts has 1 entries for 2 stages"),
        ({"start": 32, "finish": 1, "steps": 4}, "of 4 steps none is left for stage"),
        (
            {"optimizer": {"warmup_steps": 40}, "steps": 90},
            "optimizer.warmup_steps 40 is larger than a stage",
        ),
    ],
)
def test_what_has_no_effect_or_no_sense_is_refused(keys: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError) as caught:
        configured(**keys)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(("parts", "share"), [((), 0.5), ((3.0, 1.0), 0.75)])
def test_passes_are_those_of_the_mean_step(parts: tuple[float, ...], share: float) -> None:
    """The guided base takes four rows for two steps; the student of the stage before two."""
    config = configured(start=16, finish=4, parts=parts)
    found = roles_module.passes(config)
    assert found == {"teacher": 4 * share, "target": 2 * (1 - share), "student": 1}


def test_what_a_step_asks_for_is_what_is_counted() -> None:
    config = configured(start=16, finish=4)
    roles, net = in_training("epsilon", config)
    rows: list[int] = []

    def call(x: Tensor, t: Tensor, **told: Tensor) -> Any:
        rows.append(len(x))
        return net(x, t, **told)

    roles.call = call
    for stage, wanted in zip(config.stages, ([6, 6, 3], [3, 3, 3]), strict=True):
        rows.clear()
        roles.begin(stage.first, stage)
        roles.losses(given())
        assert rows == wanted


def test_the_snapshot_is_taken_where_a_stage_begins_and_stays() -> None:
    config = configured(start=16, finish=4, steps=10)
    roles, net = in_training("epsilon", config)
    for step in range(10):
        stage = stage_at(config, step)
        roles.begin(step, stage)
        if step == 5:
            taken = [p.detach().clone() for p in net.parameters()]
        if step >= 5:
            assert all(torch.equal(a, b) for a, b in zip(roles.ema, taken, strict=True))
        moved(net, step)
    assert not any(torch.equal(a, b) for a, b in zip(roles.ema, net.parameters(), strict=True))


# -- The closed form -----------------------------------------------------------------------------------------

GUIDANCE, STEPS, BATCH = 2.0, 1000, 128
BOUND = 0.08  # RMS in units of the data, whose own spread is 0.8


class World(nn.Module):
    """The exact velocities of two Gaussians, with and without a caption, and a network that is added."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Linear(4, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2)
        )
        nn.init.zeros_(self.body[-1].weight)
        nn.init.zeros_(self.body[-1].bias)

    def forward(self, x: Tensor, t: Tensor, encoder_hidden_states: Tensor) -> Any:
        alpha, sigma = SCHEDULE.alpha[t][:, None], SCHEDULE.sigma[t][:, None]
        flat, said = x[..., 0, 0], encoder_hidden_states[:, 0, :1]
        known = torch.where(said > 0, BRAND.v(flat, alpha, sigma), ALL.v(flat, alpha, sigma))
        corrected = known + self.body(torch.cat([flat, alpha, sigma], 1))
        return SimpleNamespace(sample=corrected[..., None, None])


def distilled(finish: int, *, start: int = 32, kind: type[Roles] = Roles) -> Any:
    """The last student as a function of latents and timesteps, trained as the recipe trains."""
    config = configured(
        start=start, finish=finish, steps=STEPS,
        optimizer={"lr": 4e-3, "schedule": "cosine"},
    )  # fmt: skip
    net, generator = World(), torch.Generator().manual_seed(0)
    adapted = AdaptedUNet(net)
    weights = adapted.train_own_weights()
    snapshot = [p.detach().clone() for p in weights]
    empty, said = Condition(torch.zeros(1, 1, 1)), Condition(torch.ones(BATCH, 1, 1))
    roles = kind(adapted, net, snapshot, empty, SCHEDULE, "v_prediction", Objective.of(config), torch.float32)
    optimizer = torch.optim.Adam(weights, lr=4e-3)
    for step in range(STEPS):
        stage = stage_at(config, step)
        roles.begin(step, stage)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.optimizer, step - stage.first, stage.steps)
        losses = roles.losses(Given(
            BRAND.draw(BATCH, generator), torch.randn(BATCH, 2, 1, 1, generator=generator),
            config.method.times(SCHEDULE, stage.n_grid, BATCH, generator),
            torch.full((BATCH,), GUIDANCE), said,
        ))  # fmt: skip
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
    return lambda x, t: net(x, t, torch.ones(len(x), 1, 1)).sample


@torch.no_grad()
def error(student: Any, steps: int) -> float:
    """RMS distance between the student's sample in `steps` steps of DDIM and the end of the guided ODE."""
    predict = predictor(student, SCHEDULE, "v_prediction")
    g, t = torch.Generator().manual_seed(1), torch.full((1024,), 999)
    start = add_noise(SCHEDULE, BRAND.draw(1024, g), torch.randn(1024, 2, 1, 1, generator=g), t)
    points, x = [0, *trailing(1000, steps).tolist()], start
    for i in reversed(range(steps)):
        x = ddim(predict, SCHEDULE, x, torch.full_like(t, points[i + 1]), torch.full_like(t, points[i]))
    return float((x - guided_flow(SCHEDULE, start, t, GUIDANCE)).square().mean().sqrt())


class Unrenewed(Roles):
    """Takes no snapshot: from the second stage on the teacher is the base without guidance."""

    def begin(self, step: int, stage: Stage) -> None:
        self.stage = stage.number


class GuidedAgain(Roles):
    """Guides the student of the stage before as well."""

    def _as_target(self, condition: Condition, x: Tensor, t: Tensor) -> Tensor:
        said, none = super()._as_target(condition, x, t), super()._as_target(self.empty.expand(len(x)), x, t)
        return none + GUIDANCE * (said - none)


@pytest.mark.parametrize("finish", [1, 2])
def test_the_student_lands_where_the_guided_ode_ends(finish: int) -> None:
    assert error(distilled(finish), finish) < BOUND
    assert error(lambda x, t: World()(x, t, torch.ones(len(x), 1, 1)).sample, finish) > 5 * BOUND


@pytest.mark.parametrize("kind", [Unrenewed, GuidedAgain])
def test_a_wrong_teacher_is_found_out(kind: type[Roles]) -> None:
    assert error(distilled(1, kind=kind), 1) > 2 * BOUND


def test_a_middle_that_is_none_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """One point of the teacher's grid too high: its first step stands still, and it has no second one."""
    right = Progressive.times

    def late(self: Progressive, schedule: Schedule, n_grid: int, batch: int, generator: Any) -> Times:
        times = right(self, schedule, n_grid, batch, generator)
        return times._replace(s=times.t)

    monkeypatch.setattr(Progressive, "times", late)
    assert error(distilled(1), 1) > 2 * BOUND
