"""The step against a straight-line derivation from arXiv:2310.04378, and its promises on order and dtype."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from lcm_kit.core.guidance import guide
from lcm_kit.core.losses import LOSSES
from lcm_kit.core.methods import LCM, METHODS, Times
from lcm_kit.core.prediction import KINDS, Predict, predictor
from lcm_kit.core.schedule import Schedule
from lcm_kit.core.solvers import SOLVERS
from lcm_kit.core.step import consistency_loss, diffusion_loss, snr_weight
from lcm_kit.errors import UserError
from tests.gaussians import SD

SCHEDULE = Schedule.from_config(SD)
ZERO_SNR = Schedule.from_config(SD | {"rescale_betas_zero_snr": True})
TIMES = Times(
    t=torch.tensor([19, 39, 519, 999]), s=torch.tensor([0, 19, 499, 979]), end=torch.zeros(4).long()
)
SCALES = torch.tensor([1.0, 3.0, 5.5, 8.0])
# Not the usual 0.001: gradients turn at differences of that size, and would show float32 rounding magnified.
C = 0.1
HUBER = partial(LOSSES["huber"], c=C)


class Denoiser(nn.Module):
    """A stand-in for a UNet: nonlinear in x, different at every t."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        shift = (t.to(x.dtype) / 1000).view(-1, 1, 1, 1)
        return self.b(torch.tanh(self.a(x) + shift))


def latents(seed: int) -> Tensor:
    return torch.randn(4, 4, 4, 4, generator=torch.Generator().manual_seed(seed))


def paper_loss(
    kind: str, student: nn.Module, cond: nn.Module, uncond: nn.Module, z: Tensor, noise: Tensor
) -> Tensor:
    """Algorithm 1 with the paper's own w and solver increment Psi, in float64, without a line of lcm_kit."""
    abar = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).cumprod(0)
    alpha, sigma = abar.sqrt().double(), (1 - abar).sqrt().double()
    student, target = student.double(), copy.deepcopy(student).double().requires_grad_(False)
    cond, uncond = copy.deepcopy(cond).double(), copy.deepcopy(uncond).double()
    losses = []
    for i in range(len(z)):
        t, s, w = TIMES.t[i], TIMES.s[i], SCALES[i].double() - 1
        z_t = alpha[t] * z[i : i + 1].double() + sigma[t] * noise[i : i + 1].double()

        def eps_of(model: nn.Module, x: Tensor, n: Tensor) -> Tensor:
            output = model(x, n.view(1))
            if kind == "v_prediction":
                return alpha[n] * output + sigma[n] * x
            return output if kind == "epsilon" else (x - alpha[n] * output) / sigma[n]

        def psi(model: nn.Module, x: Tensor, t: Tensor = t, s: Tensor = s) -> Tensor:
            """Eq. 14 with DDIM (appendix C): the increment of the solver from t to s."""
            eps = eps_of(model, x, t)
            return (
                alpha[s] / alpha[t] * x
                - sigma[s] * (sigma[t] * alpha[s] / (alpha[t] * sigma[s]) - 1) * eps
                - x
            )

        def f(model: nn.Module, x: Tensor, n: Tensor) -> Tensor:
            """Eq. 9, with sigma_data 0.5 and timesteps scaled by 10."""
            c_skip = 0.5**2 / ((n * 10.0).double() ** 2 + 0.5**2)
            c_out = (n * 10.0).double() / ((n * 10.0).double() ** 2 + 0.5**2).sqrt()
            return c_skip * x + c_out * (x - sigma[n] * eps_of(model, x, n)) / alpha[n]

        with torch.no_grad():
            z_s = z_t + (1 + w) * psi(cond, z_t) - w * psi(uncond, z_t)
            aim = f(target, z_s, s)
        difference = f(student, z_t, t) - aim
        losses.append((torch.sqrt(difference**2 + C**2) - C).mean())
    return torch.stack(losses)


def predictors(kind: str, schedule: Schedule = SCHEDULE) -> tuple[nn.Module, Predict, Predict]:
    """(student network, teacher guided between two networks, student)."""
    student, cond, uncond = Denoiser(0), Denoiser(1), Denoiser(2)
    teacher = predictor(lambda x, t: guide(uncond(x, t), cond(x, t), SCALES), schedule, kind)
    return student, teacher, predictor(student, schedule, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient_are_those_of_the_paper(kind: str) -> None:
    network, teacher, student = predictors(kind)
    loss = consistency_loss(
        method=LCM(),
        solver=SOLVERS["ddim"],
        loss=HUBER,
        schedule=SCHEDULE,
        teacher=teacher,
        target=student,
        student=student,
        x0=latents(0),
        noise=latents(1),
        times=TIMES,
    )
    loss.mean().backward()
    reference = Denoiser(0).double()
    wanted = paper_loss(kind, reference, Denoiser(1), Denoiser(2), latents(0), latents(1))
    wanted.mean().backward()
    torch.testing.assert_close(loss.double(), wanted, atol=1e-6, rtol=1e-6)
    for ours, papers in zip(network.parameters(), reference.parameters(), strict=True):
        assert ours.grad is not None and papers.grad is not None
        torch.testing.assert_close(ours.grad.double(), papers.grad, atol=1e-6, rtol=1e-6)


def test_no_grad_passes_come_first_and_the_students_last() -> None:
    calls: list[tuple[str, bool, int]] = []

    def spy(name: str, predict: Predict) -> Predict:
        def called(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            calls.append((name, torch.is_grad_enabled(), int(t[-1])))
            return predict(x, t)

        return called

    _, teacher, student = predictors("epsilon")
    consistency_loss(
        method=LCM(),
        solver=SOLVERS["heun"],
        loss=HUBER,
        schedule=SCHEDULE,
        teacher=spy("teacher", teacher),
        target=spy("target", student),
        student=spy("student", student),
        x0=latents(0),
        noise=latents(1),
        times=TIMES,
    )
    teacher_calls = [("teacher", False, 999), ("teacher", False, 979)]
    assert calls == [*teacher_calls, ("target", False, 979), ("student", True, 999)]


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_zero_terminal_snr_has_a_finite_loss_and_gradient(kind: str, solver: str) -> None:
    network, teacher, student = predictors(kind, ZERO_SNR)
    loss = consistency_loss(
        method=LCM(),
        solver=SOLVERS[solver],
        loss=HUBER,
        schedule=ZERO_SNR,
        teacher=teacher,
        target=student,
        student=student,
        x0=latents(0),
        noise=latents(1),
        times=TIMES,
    )
    loss.mean().backward()
    assert bool(loss.isfinite().all())
    assert all(bool(p.grad.isfinite().all()) for p in network.parameters() if p.grad is not None)


def test_a_half_precision_network_has_a_float32_loss() -> None:
    network = Denoiser(0).bfloat16()
    predict = predictor(lambda x, t: network(x.bfloat16(), t), SCHEDULE, "v_prediction")
    loss = consistency_loss(
        method=LCM(),
        solver=SOLVERS["ddim"],
        loss=HUBER,
        schedule=SCHEDULE,
        teacher=predict,
        target=predict,
        student=predict,
        x0=latents(0).bfloat16(),
        noise=latents(1),
        times=TIMES,
    )
    assert loss.dtype == torch.float32 and loss.shape == (4,)


@pytest.mark.parametrize("kind", KINDS)
def test_the_denoising_loss_compares_raw_outputs(kind: str) -> None:
    network, x0, noise, t = Denoiser(0), latents(0), latents(1), TIMES.t
    alpha, sigma = (table[t].view(-1, 1, 1, 1) for table in (SCHEDULE.alpha, SCHEDULE.sigma))
    loss = diffusion_loss(
        kind=kind,
        loss=partial(LOSSES["l2"], c=0.0),
        schedule=SCHEDULE,
        student=predictor(network, SCHEDULE, kind),
        x0=x0,
        noise=noise,
        t=t,
    )
    output = network(alpha * x0 + sigma * noise, t)
    wanted = {"epsilon": noise, "sample": x0, "v_prediction": alpha * noise - sigma * x0}[kind]
    torch.testing.assert_close(loss, (output - wanted).square().mean((1, 2, 3)), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_snr_weights_are_those_of_diffusers_snr(kind: str) -> None:
    """As diffusers' training scripts write them, from `compute_snr` of its own scheduler."""
    from diffusers import DDPMScheduler
    from diffusers.training_utils import compute_snr

    config = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    snr = compute_snr(DDPMScheduler(**config), torch.arange(1000))
    least = torch.stack([snr, 5.0 * torch.ones_like(snr)], 1).min(1)[0]
    wanted = {"epsilon": least / snr, "v_prediction": least / (snr + 1), "sample": least}[kind]
    weight = snr_weight(Schedule.from_config(config), kind, 5.0)
    torch.testing.assert_close(weight, wanted, rtol=1e-5, atol=0)
    assert torch.equal(snr_weight(Schedule.from_config(config), kind, None), torch.ones(1000))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gamma", [None, 5.0])
def test_an_error_in_x0_counts_at_least_the_floor(kind: str, gamma: float | None) -> None:
    """Truncated SNR, by what an error of 1 in x0 costs in the loss of the raw output."""
    schedule = Schedule.from_config({})
    snr = (schedule.alpha / schedule.sigma).double() ** 2
    of_output = {"epsilon": snr, "v_prediction": 1 / schedule.sigma.double() ** 2, "sample": snr**0}[kind]
    plain = snr.clamp(max=5.0) if gamma else of_output
    found = snr_weight(schedule, kind, gamma, 1.0).double() * of_output
    torch.testing.assert_close(found, plain.clamp(min=1.0), rtol=1e-5, atol=0)
    assert torch.equal(snr_weight(schedule, kind, gamma, 0.0), snr_weight(schedule, kind, gamma))


def test_with_a_floor_pure_noise_of_a_v_base_counts() -> None:
    assert snr_weight(ZERO_SNR, "v_prediction", 5.0, 0.5)[-1] == pytest.approx(0.5)


def test_min_snr_weighs_pure_noise_of_a_v_base_with_nothing() -> None:
    weight = snr_weight(ZERO_SNR, "v_prediction", 5.0)
    assert weight[-1] == 0 and bool((weight[:-1] > 0).all())
    with pytest.raises(UserError, match="zero terminal SNR"):
        snr_weight(ZERO_SNR, "epsilon", 5.0)


def test_lcm_endpoint_at_its_end_is_x_exactly() -> None:
    x, t = latents(0), torch.zeros(4, dtype=torch.int64)
    assert torch.equal(LCM().endpoint(SCHEDULE, x, latents(1), latents(2), t, t), x)


def test_lcm_lets_almost_nothing_of_x_through_on_its_grid() -> None:
    one = torch.ones(981, 1, 1, 1)
    t = torch.arange(19, 1000)
    c_skip = LCM().endpoint(SCHEDULE, one, 0 * one, one, t, 0 * t)
    c_out = LCM().endpoint(SCHEDULE, 0 * one, one, one, t, 0 * t)
    assert c_skip.min() > 0 and c_skip.max() < 1e-5
    assert 1 - c_out.min() < 1e-5


def test_lcm_draws_every_interval_of_its_grid_equally_often() -> None:
    times = METHODS["lcm"]().times(SCHEDULE, 50, 20_000, torch.Generator().manual_seed(0))
    assert times.t.dtype == times.s.dtype == times.end.dtype == torch.int64
    assert set(zip(times.s.tolist(), times.t.tolist(), strict=True)) == {
        (max(t - 20, 0), t) for t in range(19, 1000, 20)
    }
    assert not times.end.any()
    counts = torch.bincount((times.t + 1) // 20 - 1, minlength=50)
    assert counts.min() > 320 and counts.max() < 480  # 400 each, within four standard deviations


def test_lcm_draws_depend_on_the_generator_alone() -> None:
    first, again, other = (LCM().times(SCHEDULE, 50, 64, torch.Generator().manual_seed(i)) for i in (0, 0, 1))
    assert torch.equal(first.t, again.t) and not torch.equal(first.t, other.t)
