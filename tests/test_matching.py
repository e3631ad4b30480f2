"""Distribution matching: diffusers' own steps, the papers' formulas in a line, Gaussians in closed form."""

from __future__ import annotations

from functools import partial
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from lcm_kit.core.guidance import guide
from lcm_kit.core.losses import LOSSES
from lcm_kit.core.matching import (
    Draws,
    fake_loss,
    matching_gradient,
    matching_loss,
    timesteps,
    walk,
)
from lcm_kit.core.prediction import Predict, from_x0_eps, predictor
from lcm_kit.core.schedule import Schedule
from tests.gaussians import ALL, BRAND, SD, Gaussian
from tests.test_closed_form import Correction, velocity

SCHEDULE = Schedule.from_config(SD)
L2 = partial(LOSSES["l2"], c=0.0)
SHAPE = (2, 1, 1)


def drawn(n: int, place: int, batch: int, seed: int) -> Draws:
    g = torch.Generator().manual_seed(seed)
    return Draws(
        n, place, torch.randn(batch, *SHAPE, generator=g), torch.randn(batch, place, *SHAPE, generator=g),
        torch.randint(20, 981, (batch,), generator=g), torch.randn(batch, *SHAPE, generator=g),
    )  # fmt: skip


# -- The steps are diffusers' --------------------------------------------------------------------------------


def scheduler(sampler: str) -> Any:
    kind = {"ddim": "DDIMScheduler", "lcm": "LCMScheduler", "tcd": "TCDScheduler"}[sampler]
    more: dict[str, Any] = {"timestep_spacing": "trailing"} if sampler == "ddim" else {}
    return getattr(diffusers, kind).from_config(
        {**SD, "clip_sample": False, "set_alpha_to_one": True, **more}
    )


@pytest.mark.parametrize("sampler", ["ddim", "lcm", "tcd"])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 8])
def test_a_step_begins_where_diffusers_scheduler_has_it(sampler: str, n: int) -> None:
    theirs = scheduler(sampler)
    theirs.set_timesteps(n)
    assert timesteps(SCHEDULE, sampler, n) == theirs.timesteps.tolist()


@pytest.mark.parametrize("sampler", ["ddim", "lcm"])
@pytest.mark.parametrize("place", [0, 1, 3])
def test_a_walk_is_what_diffusers_draws_until_then(sampler: str, place: int) -> None:
    n, batch = 4, 5
    draws, theirs = drawn(n, place, batch, 1), scheduler(sampler)
    theirs.set_timesteps(n)
    x, fresh = draws.noise, iter(draws.renewed.unbind(1))
    for t in theirs.timesteps[:place]:
        eps = BRAND.predict(SCHEDULE)(x, t.expand(batch))[1]
        if sampler == "ddim":
            x = theirs.step(eps, t, x).prev_sample
        else:  # its step takes the noise from torch's global state: here the noise that we were given
            x0 = theirs.step(eps, t, x).denoised
            x = theirs.add_noise(x0, next(fresh), theirs.timesteps[theirs.step_index].expand(batch))
    mine, t = walk(
        BRAND.predict(SCHEDULE), SCHEDULE, timesteps(SCHEDULE, sampler, n), draws, renew=sampler == "lcm"
    )
    assert t.tolist() == [int(theirs.timesteps[place])] * batch
    torch.testing.assert_close(mine, x, atol=2e-4, rtol=0)  # LCM's c_skip, which is below 1e-5


# -- The gradient and the losses are the papers' -------------------------------------------------------------


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_gradient_is_that_of_the_paper_in_terms_of_scores(kind: str) -> None:
    """arXiv:2311.18828, eqs. 3, 7 and 8, written with scores: s = -(x_t - alpha mu) / sigma^2."""
    g = torch.Generator().manual_seed(2)
    x0, draws = torch.randn(7, *SHAPE, generator=g), drawn(1, 0, 7, 3)
    means = {"real": torch.randn(7, *SHAPE, generator=g), "fake": torch.randn(7, *SHAPE, generator=g)}

    def model(name: str, x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = SCHEDULE.at(t)
        return from_x0_eps(SCHEDULE, kind, means[name], (x - alpha * means[name]) / sigma, t)

    real, fake = (predictor(partial(model, name), SCHEDULE, kind) for name in ("real", "fake"))
    found = matching_gradient(real, fake, SCHEDULE, x0, draws)

    alpha = SCHEDULE.alpha[draws.t].double()[:, None]
    sigma = SCHEDULE.sigma[draws.t].double()[:, None]
    flat = {name: mean[..., 0, 0].double() for name, mean in means.items()}
    x_t = alpha * x0[..., 0, 0].double() + sigma * draws.diffused[..., 0, 0].double()
    score = {name: -(x_t - alpha * mean) / sigma**2 for name, mean in flat.items()}
    norm = (flat["real"] - x0[..., 0, 0].double()).abs().sum(1, keepdim=True)
    weight = sigma**2 / alpha * 2 / norm  # C S of eq. 8: 2 elements
    wanted = weight * (score["fake"] - score["real"])
    torch.testing.assert_close(found[..., 0, 0].double(), wanted, atol=2e-4, rtol=2e-4)

    sample = x0.clone().requires_grad_()
    losses = matching_loss(sample, found)
    losses.sum().backward()
    torch.testing.assert_close(losses, 0.5 * found.square().flatten(1).mean(1))
    assert sample.grad is not None
    torch.testing.assert_close(sample.grad, found / 2, atol=1e-6, rtol=1e-5)  # 2 elements


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_fake_scores_loss_weighs_an_error_in_x0_by_snr_and_one(kind: str) -> None:
    g = torch.Generator().manual_seed(4)
    x0, wrong, draws = (
        torch.randn(6, *SHAPE, generator=g),
        torch.randn(6, *SHAPE, generator=g),
        drawn(1, 0, 6, 5),
    )

    def model(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = SCHEDULE.at(t)
        return from_x0_eps(SCHEDULE, kind, wrong, (x - alpha * wrong) / sigma, t)

    sample = x0.clone().requires_grad_()
    found = fake_loss(predictor(model, SCHEDULE, kind), SCHEDULE, sample, draws, L2)
    snr = (SCHEDULE.alpha[draws.t] / SCHEDULE.sigma[draws.t]) ** 2
    wanted = (snr + 1) * (wrong - x0).square().flatten(1).mean(1)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-3)
    assert not found.requires_grad  # the student learns nothing from it


def test_where_fake_and_real_agree_nothing_moves() -> None:
    draws, truth = drawn(2, 1, 9, 6), BRAND.predict(SCHEDULE)
    x0 = torch.randn(9, *SHAPE, generator=torch.Generator().manual_seed(7))
    assert not matching_gradient(truth, truth, SCHEDULE, x0, draws).any()


# -- Gaussians: the student's pictures become the guided teacher's ------------------------------------------

# of BRAND's covariance, so that guidance gives a Gaussian of it again, around mu + w (mu_brand - mu) at any t
NEAR = Gaussian(mu=(0.3, 0.1), spread=BRAND.spread, turn=BRAND.turn)
GUIDED = 2.0
BATCH, STEPS = 256, 450


def guided_mean(world: Gaussian, guidance_scale: float) -> Tensor:
    mine, its = torch.tensor(BRAND.mu), torch.tensor(world.mu)
    return its + guidance_scale * (mine - its)


def matched(
    n: int,
    sampler: str = "ddim",
    guidance_scale: float = 1.0,
    *,
    start: Gaussian = ALL,
    wrong: str = "",
) -> Tensor:
    """Samples [4096, 2] of a small student that begins as the denoiser of `start` and is matched to BRAND."""
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(0)
    networks = {"student": Correction(), "fake": Correction()}
    student, fake = (
        predictor(lambda x, t, net=net: velocity(start, x, t) + net(x, t), SCHEDULE, "v_prediction")
        for net in networks.values()
    )
    scales = torch.full((BATCH,), guidance_scale)

    def teacher(x: Tensor, t: Tensor) -> Tensor:
        named, empty = velocity(BRAND, x, t), velocity(NEAR, x, t)
        raw = guide(empty, named, scales)
        return guide(empty, raw, scales) if wrong == "guided twice" else raw

    real = predictor(teacher, SCHEDULE, "v_prediction")
    optimizers = {
        name: torch.optim.Adam(net.parameters(), lr=4e-3, betas=(0.0, 0.99)) for name, net in networks.items()
    }
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizers["student"], STEPS)
    points = timesteps(SCHEDULE, sampler, n)

    def sample(turn: int) -> tuple[Tensor, Draws]:
        place = int(torch.randint(n, (1,), generator=g))
        draws = drawn(n, place, BATCH, turn)
        return student(*walk(student, SCHEDULE, points, draws, renew=sampler == "lcm"))[0], draws

    for step in range(STEPS):
        for turn in range(2):
            x0, draws = sample(4 * step + turn)
            optimizers["fake"].zero_grad()
            fake_loss(fake, SCHEDULE, x0, draws, L2).mean().backward()
            if wrong != "fake not updated":
                optimizers["fake"].step()
        x0, draws = sample(4 * step + 2)
        pair: tuple[Predict, Predict] = (fake, real) if wrong == "swapped" else (real, fake)
        optimizers["student"].zero_grad()
        matching_loss(x0, matching_gradient(*pair, SCHEDULE, x0.detach(), draws)).mean().backward()
        torch.nn.utils.clip_grad_norm_(networks["student"].parameters(), 1.0)
        optimizers["student"].step()
        decay.step()
    with torch.no_grad():
        draws = drawn(n, n - 1, 4096, 99)
        x, t = walk(student, SCHEDULE, points, draws, renew=sampler == "lcm")
        return student(x, t)[0][..., 0, 0]


def errors(samples: Tensor, guidance_scale: float = 1.0) -> tuple[float, float]:
    """Largest errors of the mean and of the covariance, in units of the data, whose spread is 0.5 to 1."""
    _, axes, spread = BRAND.frame(torch.float32)
    wanted = axes @ torch.diag(spread) @ axes.T
    mean = (samples.mean(0) - guided_mean(NEAR, guidance_scale)).abs().max()
    return float(mean), float((samples.T.cov() - wanted).abs().max())


@pytest.mark.parametrize("scale", [1.0, GUIDED])
def test_mean_and_covariance_of_one_step_become_the_guided_targets(scale: float) -> None:
    mean, covariance = errors(matched(1, "ddim", scale), scale)
    assert mean < 0.05
    assert covariance < 0.1


@pytest.mark.parametrize(("sampler", "scale"), [("ddim", GUIDED), ("lcm", 1.0)])
def test_of_two_steps_they_are_near(sampler: str, scale: float) -> None:
    """The fake score knows both steps' samples as one distribution, so that each is right to within this."""
    mean, covariance = errors(matched(2, sampler, scale), scale)
    assert mean < 0.2
    assert covariance < 0.5


@pytest.mark.parametrize("wrong", ["fake not updated", "swapped", "guided twice"])
def test_what_is_wrong_on_purpose_misses(wrong: str) -> None:
    mean, covariance = errors(matched(1, "ddim", GUIDED, wrong=wrong), GUIDED)
    assert not (mean < 0.4 and covariance < 0.8), (mean, covariance)
