"""TCD and PCM: against derivations from their papers, at exact ends, and drawn by diffusers' schedulers."""

from __future__ import annotations

import copy
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, TCDScheduler
from torch import Tensor, nn

from lcm_kit.core.guidance import guide
from lcm_kit.core.losses import LOSSES
from lcm_kit.core.methods import PCM, TCD, Method, Times, info
from lcm_kit.core.prediction import KINDS, Predict, from_x0_eps, predictor
from lcm_kit.core.schedule import add_noise, grid
from lcm_kit.core.solvers import SOLVERS
from lcm_kit.core.step import consistency_loss
from lcm_kit.samplers import sampler_of
from tests.gaussians import BRAND, SD, Gaussian, guided_flow
from tests.test_closed_form import BOUND, SCHEDULE, distil
from tests.test_step import Denoiser, latents

METHODS: list[Method] = [TCD(), PCM(phases=4)]
C = 0.1  # of the pseudo-Huber distance: at 0.001 gradients would show float32 rounding magnified
NAMES = [type(method).__name__ for method in METHODS]
EACH = pytest.mark.parametrize("method", METHODS, ids=NAMES)


def drawn(method: Method, n: int, n_grid: int = 50, seed: int = 0) -> Times:
    return method.times(SCHEDULE, n_grid, n, torch.Generator().manual_seed(seed))


# -- The intervals -------------------------------------------------------------------------------------------


def test_a_trajectory_may_end_anywhere_before_s() -> None:
    """arXiv:2402.19159, algorithm 1: u uniform below n. Of n points below t each is an end as often."""
    times, points = drawn(TCD(), 60_000, 10), [0, *grid(1000, 10).tolist()]
    counts = {t: torch.zeros(len(points)) for t in points[1:]}
    for t, s, end in zip(*(each.tolist() for each in times), strict=True):
        below = points.index(t)
        assert s == points[below - 1] and points.index(end) < below
        counts[t][points.index(end)] += 1
    for below, (t, found) in enumerate(counts.items(), start=1):
        expected = 60_000 / 10 / below
        assert float((found[:below] - expected).abs().max()) < 5 * expected**0.5, t
        assert not found[below:].any()


@pytest.mark.parametrize("phases", range(1, 51))
def test_phases_begin_where_ddims_trailing_steps_do(phases: int) -> None:
    """By diffusers itself. Each t steps within its phase, and lands at the lower edge of that."""
    scheduler = DDIMScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(phases)
    edges = [0, *sorted(scheduler.timesteps.tolist())]
    times = drawn(PCM(phases=phases), 5000)
    assert set(times.end.tolist()) == set(edges[:-1])
    for low, high in pairwise(edges):
        within = (times.t > low) & (times.t <= high)
        assert bool((times.end[within] == low).all()) and bool((times.s[within] >= low).all())
        assert bool((times.t[within] == high).any()) and bool((times.s[within] == low).any())
    points = sorted({*grid(1000, 50).tolist(), *edges} | {0})
    below = dict(zip(points[1:], points, strict=False))
    assert [below[t] for t in times.t.tolist()] == times.s.tolist()
    assert set(times.t.tolist()) == set(points[1:]) or len(points) > 60


def test_pcm_serves_the_steps_that_it_has_phases() -> None:
    for phases in (1, 2, 4, 8):
        found = info("pcm", {"phases": phases})
        assert (found.judged_steps, found.usual_steps, found.sampler) == ((phases,), phases, "ddim")
    assert info("pcm", {"phases": "many"}).judged_steps == (4,) and info("tcd").sampler == "tcd"


# -- The formula ---------------------------------------------------------------------------------------------

ABAR = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).cumprod(0)
ALPHA, SIGMA = ABAR.sqrt().double(), (1 - ABAR).sqrt().double()


def moved(kind: str, x: Tensor, output: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """The exponential integrator of first order from t to s, written for each prediction type by itself.

    epsilon: x_s = alpha_s / alpha_t x - alpha_s eps (integral of e^-lambda from lambda_t to lambda_s), which
    is eq. 9 of arXiv:2405.18407 and, with k = 1, eq. 15 of arXiv:2402.19159; lambda = log(alpha / sigma).
    v: a rotation of (x, v) by the angle between the times (arXiv:2202.00512, appendix D). x0: the line
    through x and x0.
    """
    if kind == "v_prediction":
        angle = torch.atan2(SIGMA[t], ALPHA[t]) - torch.atan2(SIGMA[s], ALPHA[s])
        return angle.cos() * x - angle.sin() * output
    if kind == "sample":
        ratio = SIGMA[s] / SIGMA[t]
        return ratio * x + (ALPHA[s] - ratio * ALPHA[t]) * output
    lam_t, lam_s = (ALPHA[t] / SIGMA[t]).log(), (ALPHA[s] / SIGMA[s]).log()
    return ALPHA[s] / ALPHA[t] * x - ALPHA[s] * output * ((-lam_t).exp() - (-lam_s).exp())


# What can go wrong: each is another loss than the paper's
WRONG = (
    "the edge of a phase off by one",
    "the end of another phase",
    "guidance twice",
    "the teacher's target",
)


def paper(
    kind: str,
    times: Times,
    scales: Tensor,
    nets: tuple[nn.Module, ...],
    z: Tensor,
    noise: Tensor,
    wrong: str = "",
) -> Tensor:
    """Losses of both papers' algorithms in float64, in the raw outputs, without a line of lcm_kit."""
    student = nets[0].double()
    target, cond, uncond = (copy.deepcopy(net).double().requires_grad_(False) for net in nets)
    losses = []
    for i in range(len(z)):
        (t, s, end), scale = (time[i] for time in times), scales[i].double()
        if wrong == WRONG[0]:
            end = (end - 1).clamp(min=0) if end > 0 else end + 1
        if wrong == WRONG[1]:
            end = end - 250 if end > 0 else torch.tensor(0)
        x = ALPHA[t] * z[i : i + 1].double() + SIGMA[t] * noise[i : i + 1].double()

        def guided(x: Tensor, t: Tensor, scale: Tensor = scale) -> Tensor:
            by = scale * scale if wrong == WRONG[2] else scale
            return uncond(x, t.view(1)) + by * (cond(x, t.view(1)) - uncond(x, t.view(1)))

        with torch.no_grad():
            x_s = moved(kind, x, guided(x, t), t, s)
            output = guided(x_s, s) if wrong == WRONG[3] else target(x_s, s.view(1))
            aim = moved(kind, x_s, output, s, end)
        difference = moved(kind, x, student(x, t.view(1)), t, end) - aim
        losses.append((torch.sqrt(difference**2 + C**2) - C).mean())
    return torch.stack(losses)


def ours(
    method: Method,
    kind: str,
    times: Times,
    scales: Tensor,
    nets: tuple[nn.Module, ...],
    z: Tensor,
    noise: Tensor,
) -> Tensor:
    student, cond, uncond = nets
    teacher = predictor(lambda x, t: guide(uncond(x, t), cond(x, t), scales), SCHEDULE, kind)
    mine = predictor(student, SCHEDULE, kind)
    return consistency_loss(
        method=method, solver=SOLVERS["ddim"], loss=partial(LOSSES["huber"], c=C), schedule=SCHEDULE,
        teacher=teacher, target=mine, student=mine, x0=z, noise=noise, times=times,
    )  # fmt: skip


def gradient(net: nn.Module, losses: Tensor) -> Tensor:
    return torch.cat(
        [g.flatten().double() for g in torch.autograd.grad(losses.mean(), list(net.parameters()))]
    )


@EACH
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("guided", [True, False])
def test_loss_and_gradient_are_those_of_the_paper(method: Method, kind: str, guided: bool) -> None:
    """Of samples in all phases, with guidance in the target and without; what is wrong is noticed."""
    times = replaced(drawn(method, 400, 50), method)
    scales = torch.tensor([1.5, 3.0, 5.5, 8.0]) if guided else torch.ones(4)
    z, noise = latents(3), latents(4)
    # epsilon is divided by alpha, 0.068 at t = 999, and so is its rounding
    close: dict[str, Any] = {"rtol": 2e-4, "atol": 1e-5}

    def nets() -> tuple[nn.Module, ...]:
        return Denoiser(0), Denoiser(1), Denoiser(2)

    mine, theirs = nets(), nets()
    found = ours(method, kind, times, scales, mine, z, noise)
    truth = paper(kind, times, scales, theirs, z, noise)
    torch.testing.assert_close(found.double(), truth, **close)
    slope = gradient(theirs[0], truth)
    assert float((gradient(mine[0], found) - slope).norm() / slope.norm()) < 1e-4
    for wrong in WRONG:
        if wrong == WRONG[2] and not guided:
            continue
        other = paper(kind, times, scales, theirs, z, noise, wrong)
        apart = float((gradient(theirs[0], other) - slope).norm() / slope.norm())
        assert apart > 1e-3, f"{wrong}: {apart}"


def replaced(times: Times, method: Method) -> Times:
    """Four of many draws, one of each quarter of time, ends above 0 but for the first."""
    chosen = []
    for low in (0, 250, 500, 750):
        fits = (
            (times.t > low + 30)
            & (times.t <= low + 249)
            & (times.s > times.end)
            & ((times.end > 0) | (low == 0))
        )
        chosen.append(int(fits.nonzero()[0, 0]))
    return Times(*(time[chosen] for time in times))


# -- Exact ends ----------------------------------------------------------------------------------------------


@EACH
def test_where_the_end_is_reached_nothing_moves(method: Method) -> None:
    """f(x, t, t) = x whatever the model says: what it says is (x0, eps) of that very x."""
    t = torch.tensor([0, 249, 499, 749, 999] * 20)
    x = 3 * torch.randn(100, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    output = torch.randn(100, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    for kind in KINDS:
        landed = method.endpoint(SCHEDULE, x, *predictor(lambda x, t: output, SCHEDULE, kind)(x, t), t, t)
        assert (
            float((landed - x).abs().max()) < 5e-6
        )  # of values up to 13: a few units of float32's last place


@EACH
def test_an_exact_teacher_has_no_loss(method: Method) -> None:
    """One picture, one noise: x0 and eps are constant, all points of the line have the same endpoint."""
    times, n = drawn(method, 2000), 2000
    picture = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0)).expand(n, -1, -1, -1)
    noise = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(1)).expand(n, -1, -1, -1)

    def exact(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = SCHEDULE.at(t)
        return picture, (x - alpha * picture) / sigma

    x = add_noise(SCHEDULE, picture, noise, times.t)
    landed = method.endpoint(SCHEDULE, x, *exact(x, times.t), times.t, times.end)
    torch.testing.assert_close(landed, add_noise(SCHEDULE, picture, noise, times.end), atol=2e-5, rtol=0)
    losses = consistency_loss(
        method=method, solver=SOLVERS["ddim"], loss=partial(LOSSES["l2"], c=0.0), schedule=SCHEDULE,
        teacher=exact, target=exact, student=exact, x0=picture, noise=noise, times=times,
    )  # fmt: skip
    assert float(losses.max()) < 1e-9


# -- As diffusers draws it -----------------------------------------------------------------------------------

WORLD = BRAND


def exact_output(kind: str, method: Method, x: Tensor, t: int, end: int) -> Tensor:
    """What a student must output at (x, t) to land at the true `end`: found by trying our endpoint on two.

    The endpoint is linear in eps once x0 follows from x, so that two trials say where it is right.
    """
    n = len(x)
    times, ends = torch.full((n,), t), torch.full((n,), end)
    wanted = WORLD.flow(SCHEDULE, x.float(), times, ends).double()
    alpha, sigma = (table[t].double() for table in (SCHEDULE.alpha, SCHEDULE.sigma))

    def lands(eps: Tensor) -> Tensor:
        return method.endpoint(SCHEDULE, x, (x - sigma * eps) / alpha, eps, times, ends).double()

    zero, one = lands(torch.zeros_like(x)), lands(torch.ones_like(x))
    eps = (wanted - zero) / (one - zero)
    return from_x0_eps(SCHEDULE, kind, (x - sigma * eps) / alpha, eps, times)


def noisy(n: int) -> Tensor:
    """Points at t = 999 as the forward process has them: `alpha` is 0.068 there, and not 0."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(n, 2, 1, 1, generator=generator)
    return add_noise(SCHEDULE, WORLD.draw(n, generator), noise, torch.full((n,), 999))


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    flat = x[..., 0, 0].double()
    return flat.mean(0), flat.T.cov()


def truth_of(world: Gaussian) -> tuple[Tensor, Tensor]:
    mu, axes, spread = world.frame(torch.float64)
    return mu, axes @ spread.diag() @ axes.T


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("phases", [1, 2, 4, 8])
def test_ddim_draws_a_perfect_pcm_student_along_the_true_trajectory(phases: int, kind: str) -> None:
    """At every edge it is the exact solution; the last step drops the noise that t = 0 has."""
    scheduler = DDIMScheduler(**SD, prediction_type=kind, **sampler_of("ddim").settings)
    scheduler.set_timesteps(phases)
    method, edges = PCM(phases=phases), [*scheduler.timesteps.tolist(), 0]
    start = noisy(20_000)
    x = start
    for t, end in pairwise(edges):
        x = scheduler.step(exact_output(kind, method, x, t, end), t, x).prev_sample.float()
        true = WORLD.flow(SCHEDULE, start, torch.full((len(x),), 999), torch.full((len(x),), end))
        off = float((x - true).square().mean().sqrt())
        assert off < (2e-4 if end else 0.04), (t, end, off)  # sigma at t = 0 is 0.029
    for found, wanted in zip(moments(x), truth_of(WORLD), strict=True):
        torch.testing.assert_close(found, wanted, atol=0.05, rtol=0)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_tcds_scheduler_draws_a_perfect_student_from_the_true_distribution(steps: int, gamma: float) -> None:
    """Without renewed noise it is the exact solution; with it mean and covariance are those of the data.

    The scheduler lands at (1 - gamma) of its next timestep, and takes the noise back up from there.
    """
    scheduler = TCDScheduler(**SD, **sampler_of("tcd").settings)
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(1)
    edges = [*scheduler.timesteps.tolist(), 0]
    start = noisy(20_000)
    x = start
    for t, following in pairwise(edges):
        landing = int((1 - gamma) * following)
        output = exact_output("epsilon", TCD(), x, t, landing)
        x = scheduler.step(output, t, x, eta=gamma, generator=generator).prev_sample.float()
    if gamma == 0:
        true = WORLD.flow(SCHEDULE, start, torch.full((len(x),), 999), torch.zeros(len(x)).long())
        torch.testing.assert_close(x, true, atol=2e-4, rtol=0)
    for found, wanted in zip(moments(x), truth_of(WORLD), strict=True):
        torch.testing.assert_close(found, wanted, atol=0.03, rtol=0)


# -- Learned -------------------------------------------------------------------------------------------------

EDGES = [(999, 749), (874, 749), (749, 499), (499, 249), (249, 0)]
ENDS = [(999, 0), (999, 499), (999, 749), (749, 0), (749, 249), (499, 0), (499, 249), (249, 0), (249, 124)]


def points(t: int, n: int = 1024) -> tuple[Tensor, Tensor]:
    generator, times = torch.Generator().manual_seed(t), torch.full((n,), t)
    noise = torch.randn(n, 2, 1, 1, generator=generator)
    return add_noise(SCHEDULE, BRAND.draw(n, generator), noise, times), times


@torch.no_grad()
def errors(student: Predict, method: Method, scale: float, where: list[tuple[int, int]]) -> list[float]:
    """RMS distance from where the student lands to the true end, of each (t, end)."""
    found = []
    for t, end in where:
        x, times = points(t)
        ends = torch.full_like(times, end)
        landed = method.endpoint(SCHEDULE, x, *student(x, times), times, ends)
        true = guided_flow(SCHEDULE, x, times, scale, ends)
        found.append(float((landed - true).square().mean().sqrt()))
    return found


GUIDANCE = pytest.mark.parametrize(("scale", "solver"), [(1.0, "heun"), (2.0, "ddim")])


def affine(f: Any) -> Tensor:
    """The affine map f of latents [n, 2, 1, 1] as a matrix [2, 3]: its linear part, then the constant."""
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])[..., None, None]
    y = f(x)[..., 0, 0].double()
    return torch.cat([(y[:2] - y[2]).T, y[2][:, None]], 1)


def compromise(scale: float, n_grid: int = 32) -> dict[tuple[int, int], Tensor]:
    """Where a student ends that TCD has trained to the end, by (t, end), as `affine`; no gradient is needed.

    A model says one (x0, eps) at (x, t), and so cannot land rightly at each of the ends, all as likely, below
    it. The best x0, by least squares against where the point before lands from the true solution there:
    with alpha x0 + sigma eps = x it is c x0 + sigma_end / sigma x, c = alpha_end - sigma_end alpha / sigma.
    """
    times = [0, *grid(1000, n_grid).tolist()]
    landings = {(0, 0): torch.eye(2, 3, dtype=torch.float64)}
    unit = torch.eye(2, 3, dtype=torch.float64)
    for s, t in pairwise(times):
        at = [torch.full((3,), time) for time in (t, s)]
        step = affine(lambda x, at=at: guided_flow(SCHEDULE, x, at[0], scale, at[1]))
        below = [end for end in times if end <= s]
        after = {end: joined(landings[s, end], step) for end in below}
        alpha, sigma = SCHEDULE.alpha.double(), SCHEDULE.sigma.double()
        c = {end: alpha[end] - sigma[end] * alpha[t] / sigma[t] for end in below}
        top = sum(c[end] * (after[end] - sigma[end] / sigma[t] * unit) for end in below)
        x0 = top / sum(c[end] ** 2 for end in below)
        landings |= {(t, end): c[end] * x0 + sigma[end] / sigma[t] * unit for end in below}
        landings[t, t] = unit
    return landings


def joined(second: Tensor, first: Tensor) -> Tensor:
    """One affine map after another."""
    return torch.cat([second[:, :2] @ first[:, :2], second[:, :2] @ first[:, 2:] + second[:, 2:]], 1)


@torch.no_grad()
def beside(student: Predict, wanted: dict[tuple[int, int], Tensor]) -> list[float]:
    """RMS distance from where a TCD student lands to `compromise`, of each of `ENDS`."""
    found = []
    for t, end in ENDS:
        x, times = points(t)
        landed = TCD().endpoint(SCHEDULE, x, *student(x, times), times, torch.full_like(times, end))
        line = wanted[t, end]
        best = x[..., 0, 0].double() @ line[:, :2].T + line[:, 2]
        found.append(float((landed[..., 0, 0] - best).square().mean().sqrt()))
    return found


@GUIDANCE
def test_tcd_learns_the_best_ends_that_one_answer_allows(scale: float, solver: str) -> None:
    """And how far that is from the truth: 0.26 and 0.31 from pure noise to a picture, less for near ends."""
    wanted = compromise(scale)
    found = beside(distil(scale, solver, method=TCD()), wanted)
    assert max(found) < BOUND, dict(zip(ENDS, found, strict=True))
    for (t, end), most in (((999, 0), 0.33), ((999, 749), 0.11), ((249, 0), 0.07), ((249, 124), 0.055)):
        x, times = points(t)
        line, true = wanted[t, end], guided_flow(SCHEDULE, x, times, scale, torch.full_like(times, end))
        best = x[..., 0, 0].double() @ line[:, :2].T + line[:, 2]
        off = float((best - true[..., 0, 0]).square().mean().sqrt())
        assert most / 2 < off < most, (t, end, off)


@GUIDANCE
def test_pcm_learns_the_true_edges(scale: float, solver: str) -> None:
    method = PCM(phases=4)
    found = errors(distil(scale, solver, method=method), method, scale, EDGES)
    assert max(found) < BOUND, dict(zip(EDGES, found, strict=True))


@GUIDANCE
def test_a_target_taken_from_the_teacher_is_found_out(scale: float, solver: str) -> None:
    """PCM in one phase, where a teacher's two steps of DDIM are far from the end; TCD beside its best."""
    method, clean = PCM(phases=1), [(t, 0) for t in (249, 499, 749, 999)]
    found = errors(distil(scale, solver, method=method, wrong_target=True), method, scale, clean)
    assert min(found) > BOUND and max(found) > 5 * BOUND, dict(zip(clean, found, strict=True))
    off = beside(distil(scale, solver, method=TCD(), wrong_target=True), compromise(scale))
    assert max(off) > 5 * BOUND, dict(zip(ENDS, off, strict=True))


def test_guidance_added_twice_is_found_out() -> None:
    """A student of guidance 2 is not where the guided flow of 4 ends, nor where that of 1 does."""
    method = PCM(phases=4)
    student = distil(2.0, "ddim", method=method)
    assert (
        max(errors(student, method, 4.0, EDGES)) > 2 * BOUND
        and max(errors(student, method, 1.0, EDGES)) > BOUND
    )
