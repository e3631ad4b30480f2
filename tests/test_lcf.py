"""Consistency training: against a straight-line derivation, against distillation, and against the truth."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from lcm_kit.core.losses import LOSSES
from lcm_kit.core.methods import LCM
from lcm_kit.core.prediction import KINDS, Predict, predictor
from lcm_kit.core.schedule import grid, interval_weight
from lcm_kit.core.solvers import SOLVERS
from lcm_kit.core.step import consistency_loss
from lcm_kit.errors import UserError
from tests import test_closed_form as closed_form
from tests.gaussians import BRAND, Gaussian
from tests.test_step import HUBER, SCHEDULE, TIMES, ZERO_SNR, C, Denoiser, latents, predictors

L2 = partial(LOSSES["l2"], c=0.0)
IMPROVED = {"teacher_weight": 0.0, "distance": partial(LOSSES["huber_norm"], c=0.00054), "weighted": True}
POINT = Gaussian(mu=(0.8, -0.4), spread=(0.0, 0.0), turn=0.0)


def gradient(network: nn.Module, loss: Tensor) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss.mean(), list(network.parameters()))])


# -- The formula ---------------------------------------------------------------------------------------------


def training_loss(kind: str, student: nn.Module, z: Tensor, noise: Tensor) -> Tensor:
    """Algorithm 3 of arXiv:2303.01469, variance preserving, in float64, without a line of lcm_kit."""
    abar = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).cumprod(0)
    alpha, sigma = abar.sqrt().double(), (1 - abar).sqrt().double()
    frozen = copy.deepcopy(student).requires_grad_(False)
    losses = []
    for i in range(len(z)):

        def f(model: nn.Module, n: Tensor, i: int = i) -> Tensor:
            x = alpha[n] * z[i : i + 1].double() + sigma[n] * noise[i : i + 1].double()
            output = model(x, n.view(1))
            if kind == "epsilon":
                output = (x - sigma[n] * output) / alpha[n]
            elif kind == "v_prediction":
                output = alpha[n] * x - sigma[n] * output
            u = n.double() * 10
            return 0.25 / (u**2 + 0.25) * x + u / (u**2 + 0.25).sqrt() * output

        difference = f(student, TIMES.t[i]) - f(frozen, TIMES.s[i])
        losses.append((torch.sqrt(difference**2 + C**2) - C).mean())
    return torch.stack(losses)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient_are_those_of_consistency_training(kind: str) -> None:
    network, _, student = predictors(kind)
    loss = step(student, teacher_weight=0.0)
    reference = Denoiser(0).double()
    wanted = training_loss(kind, reference, latents(0), latents(1))
    torch.testing.assert_close(loss.double(), wanted, atol=1e-6, rtol=1e-6)
    ours, papers = gradient(network, loss), gradient(reference, wanted)
    torch.testing.assert_close(ours.double(), papers, atol=1e-6, rtol=1e-6)


def step(student: Predict, teacher: Predict | None = None, **changes: object) -> Tensor:
    """The loss of the four latents at TIMES; a teacher that is not given must not be asked."""
    settings = {
        "method": LCM(), "solver": SOLVERS["ddim"], "loss": HUBER, "schedule": SCHEDULE,
        "teacher": teacher, "target": student, "student": student,
        "x0": latents(0), "noise": latents(1), "times": TIMES,
    }  # fmt: skip
    return consistency_loss(**(settings | changes))


def test_the_teacher_term_is_mixed_in_by_its_weight() -> None:
    network, teacher, student = predictors("v_prediction")
    found = {w: step(student, teacher, teacher_weight=w) for w in (0.0, 0.3, 1.0)}
    torch.testing.assert_close(found[0.3], 0.3 * found[1.0] + 0.7 * found[0.0])
    slopes = {w: gradient(network, loss) for w, loss in found.items()}
    torch.testing.assert_close(slopes[0.3], 0.3 * slopes[1.0] + 0.7 * slopes[0.0])
    assert (found[0.0] - found[1.0]).abs().max() > 1e-2  # and the two are different losses
    assert torch.equal(found[1.0], step(student, teacher))


def test_what_weighs_nothing_is_not_computed() -> None:
    _, teacher, student = predictors("epsilon")
    asked: list[int] = []

    def target(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        asked.append(int(t[-1]))
        return student(x, t)

    step(student, None, target=target, teacher_weight=0.0)
    step(student, teacher, target=target, teacher_weight=1.0)
    assert asked == [979, 979]
    step(student, teacher, target=target, teacher_weight=0.5)
    assert asked == [979] * 4


# -- Where it equals distillation ----------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
def test_for_data_that_is_one_point_it_is_distillation(solver: str) -> None:
    """There x_t says what its noise was: the same noise is the exact solution, for any network and loss."""
    torch.manual_seed(0)
    network = nn.Linear(2, 2)
    student = predictor(
        lambda x, t: torch.tanh(network(x[..., 0, 0]))[..., None, None], SCHEDULE, "v_prediction"
    )
    x0 = POINT.draw(4, torch.Generator().manual_seed(0))
    noise = torch.randn(4, 2, 1, 1, generator=torch.Generator().manual_seed(1))
    given = {"solver": SOLVERS[solver], "x0": x0, "noise": noise}
    distilled = step(student, POINT.predict(SCHEDULE), **given)
    trained = step(student, None, **given, teacher_weight=0.0)
    torch.testing.assert_close(trained, distilled, atol=1e-5, rtol=1e-4)
    slopes = gradient(network, trained), gradient(network, distilled)
    torch.testing.assert_close(*slopes, atol=1e-5, rtol=1e-4)


def posterior(x_t: Tensor, timestep: int) -> tuple[Tensor, Tensor]:
    """(x0, noise) [4, 2, 1, 1] that all give x_t [2], with BRAND's mean and covariance of x0 given x_t.

    The posterior of a Gaussian is N(m, S), S = (cov^-1 + alpha^2 / sigma^2)^-1 (textbook conditioning); m
    plus and minus sqrt(2) times the columns of S's root have these moments exactly.
    """
    mu, axes, spread = BRAND.frame(torch.float64)
    alpha, sigma = SCHEDULE.alpha[timestep].double(), SCHEDULE.sigma[timestep].double()
    covariance = axes @ torch.diag(spread) @ axes.T
    s = torch.linalg.inv(torch.linalg.inv(covariance) + torch.eye(2).double() * alpha**2 / sigma**2)
    m = s @ (torch.linalg.inv(covariance) @ mu + alpha / sigma**2 * x_t.double())
    root = 2**0.5 * torch.linalg.cholesky(s)
    x0 = torch.stack([m + root[:, 0], m - root[:, 0], m + root[:, 1], m - root[:, 1]])
    noise = (x_t.double() - alpha * x0) / sigma
    return x0.float()[..., None, None], noise.float()[..., None, None]


@pytest.mark.parametrize(("t", "s"), [(999, 979), (519, 499), (519, 259)])
def test_for_gaussian_data_its_mean_gradient_is_that_of_distillation_by_ddim(t: int, s: int) -> None:
    """With l2 and a network that is affine in x, as the true consistency function is; the loss is larger.

    The mean of x_s given x_t is DDIM's step of the optimal denoiser. What its spread adds to the loss is the
    variance of the target, which no student can lower.
    """
    torch.manual_seed(0)
    network = nn.Linear(2, 2)
    student = predictor(lambda x, t: network(x[..., 0, 0])[..., None, None], SCHEDULE, "v_prediction")
    x0, noise = posterior(torch.tensor([0.6, -1.1]), t)
    where = torch.full((4,), t), torch.full((4,), s), torch.zeros(4).long()
    given = {"loss": L2, "x0": x0, "noise": noise, "times": type(TIMES)(*where)}
    distilled = step(student, BRAND.predict(SCHEDULE), **given)
    trained = step(student, None, **given, teacher_weight=0.0)
    slopes = gradient(network, trained), gradient(network, distilled)
    torch.testing.assert_close(*slopes, atol=1e-4, rtol=1e-4)

    x_s = SCHEDULE.alpha[s] * x0 + SCHEDULE.sigma[s] * noise
    with torch.no_grad():
        targets = LCM().endpoint(SCHEDULE, x_s, *student(x_s, where[1]), where[1], where[2])
    spread = targets.var(0, correction=0).mean()
    assert float(spread) > 2e-5
    torch.testing.assert_close(trained.mean() - distilled.mean(), spread, atol=1e-6, rtol=1e-3)


def test_its_mean_step_is_the_exact_solution_to_second_order() -> None:
    """So a finer grid repairs what is left: the error of a step falls to a quarter with half the interval."""
    x_t = torch.tensor([0.6, -1.1])
    found = []
    for s in (439, 479, 499):
        x0, noise = posterior(x_t, 519)
        mean = (SCHEDULE.alpha[s] * x0 + SCHEDULE.sigma[s] * noise).mean(0, keepdim=True)
        exact = BRAND.flow(SCHEDULE, x_t[None, :, None, None], torch.tensor([519]), torch.tensor([s]))
        found.append(float((mean - exact).norm()))
    assert 3.4 < found[0] / found[1] < 4.6 and 3.4 < found[1] / found[2] < 4.6, found


def test_training_finds_the_true_consistency_function() -> None:
    """By the data alone, with the distance, constant and weight of improved consistency training."""
    found = closed_form.errors(closed_form.distil(1.0, "ddim", **IMPROVED), 1.0)  # type: ignore[arg-type]
    assert max(found) < closed_form.BOUND, dict(zip(closed_form.CHECKED, found, strict=True))


# -- What improved consistency training adds -----------------------------------------------------------------


def test_the_norms_huber_is_that_of_the_paper_in_rms() -> None:
    a, b = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    d = 4 * 8 * 8
    c = 0.00054 * d**0.5
    norm = (a - b).double().flatten(1).square().sum(1)
    wanted = ((norm + c**2).sqrt() - c) / d**0.5
    torch.testing.assert_close(LOSSES["huber_norm"](a, b, 0.00054).double(), wanted, atol=1e-6, rtol=1e-6)


def test_the_weight_is_one_over_the_difference_of_sigmas() -> None:
    abar = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000).double() ** 2).cumprod(0)
    sigma = ((1 - abar) / abar).sqrt()  # of x0 + sigma noise
    t = grid(1000, 50)
    s = torch.cat([torch.zeros(1, dtype=torch.int64), t[:-1]])
    found = interval_weight(SCHEDULE, t, s)
    torch.testing.assert_close(found.double(), 1 / (sigma[t] - sigma[s]), atol=0, rtol=1e-3)
    with pytest.raises(UserError, match="zero terminal SNR; set loss.weighting=none"):
        interval_weight(ZERO_SNR, t, s)
