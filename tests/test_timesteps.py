"""Which intervals are trained how often: shares by closed forms in math.erf, draws by their counts."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from lcm_kit.adapter.roles import Objective
from lcm_kit.config.load import RECIPES
from lcm_kit.core.methods import LCM, METHODS, Times
from lcm_kit.core.schedule import Schedule, grid
from lcm_kit.core.timesteps import lognormal, reweighed, shifted
from lcm_kit.errors import UserError
from tests.gaussians import SD

SCHEDULE = Schedule.from_config(SD)
ZERO_SNR = Schedule.from_config(SD | {"rescale_betas_zero_snr": True})
DRAWS = 20_000


def log_noise(zero_snr: bool = False) -> list[float]:
    """log(sigma / alpha) of SD's betas, from products in Python."""
    abar, product = [], 1.0
    for i in range(1000):
        root = 0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * i / 999
        product *= 1 - root**2
        abar.append(product)
    if zero_snr:
        first, last = abar[0] ** 0.5, abar[-1] ** 0.5
        abar = [((a**0.5 - last) * first / (first - last)) ** 2 for a in abar[:-1]] + [0.0]
    return [0.5 * math.log((1 - a) / a) if a else math.inf for a in abar]


def normal(log: list[float], mean: float, std: float) -> list[float]:
    return [0.5 * (1 + math.erf((x - mean) / (2**0.5 * std))) for x in log]


def probabilities(share: Any, points: list[int]) -> dict[tuple[int, int], float]:
    """Of the intervals between neighbouring points, by their shares."""
    pairs = list(zip(points, points[1:], strict=False))
    mass = [share[t] - share[s] for s, t in pairs]
    return {pair: m / sum(mass) for pair, m in zip(pairs, mass, strict=True)}


def assert_drawn(times: Times, wanted: dict[tuple[int, int], float]) -> None:
    """The counts of the intervals (s, t) are those that are `wanted`: chi-square below its 99.9% bound."""
    pairs = list(zip(times.s.tolist(), times.t.tolist(), strict=True))
    assert set(pairs) <= set(wanted)
    square = sum((pairs.count(pair) - len(pairs) * p) ** 2 / (len(pairs) * p) for pair, p in wanted.items())
    freedom = len(wanted) - 1
    # Wilson and Hilferty's cube root of a chi-square is normal
    assert square < freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- Shares --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mean", "std"), [(-1.1, 2.0), (0.7, 0.5)])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_lognormal_shares_are_error_functions(mean: float, std: float, zero_snr: bool) -> None:
    found = lognormal(ZERO_SNR if zero_snr else SCHEDULE, mean, std)
    wanted = torch.tensor(normal(log_noise(zero_snr), mean, std), dtype=torch.float64)
    assert found.dtype == torch.float64 and bool(torch.isfinite(found).all())
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=0)
    assert (found[-1].item() == 1.0) == zero_snr  # pure noise has the whole tail


def test_on_a_grid_they_are_the_papers_probabilities() -> None:
    """arXiv:2310.14189, eq. 10, with P_mean -1.1 and P_std 2 on sigma / alpha."""
    sigma = [math.exp(x) for x in log_noise()]
    points = [0, *grid(1000, 16).tolist()]

    def erf(x: float) -> float:
        return math.erf((math.log(x) + 1.1) / (2**0.5 * 2.0))

    raw = [erf(sigma[t]) - erf(sigma[s]) for s, t in zip(points, points[1:], strict=False)]
    found = probabilities(lognormal(SCHEDULE, -1.1, 2.0).tolist(), points)
    assert list(found.values()) == pytest.approx([p / sum(raw) for p in raw], rel=1e-3)
    assert max(found.values()) == found[0, 61] == pytest.approx(0.387, abs=2e-3)  # most where noise is little


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_shifted_shares_are_those_of_a_shifted_uniform(shift: float) -> None:
    found = shifted(SCHEDULE, shift)
    v = torch.rand(200_000, generator=seeded(), dtype=torch.float64)
    u = shift * v / (1 + (shift - 1) * v)
    for t in (0, 250, 500, 750, 999):
        assert found[t].item() == pytest.approx((u <= t / 999).double().mean().item(), abs=5e-3)
    assert found[0] == 0 and found[-1] == 1 and bool((found.diff() > 0).all())
    assert shifted(SCHEDULE, 3.0)[749].item() == pytest.approx(0.5, abs=2e-3)  # half is above 3/4


# -- Draws ---------------------------------------------------------------------------------------------------


CHOICES = {
    "lognormal": ({"sampling": "lognormal"}, normal(log_noise(), -1.1, 2.0)),
    "narrow": ({"sampling": "lognormal", "log_mean": 0.5, "log_std": 1.0}, normal(log_noise(), 0.5, 1.0)),
    "shifted": ({"sampling": "shifted", "shift": 4.0}, [t / 999 / (4 - 3 * t / 999) for t in range(1000)]),
}


def objective(**changes: Any) -> Objective:
    keys = {"recipe": "train/distill", "output": "x", **changes}
    return Objective.of(TypeAdapter(RECIPES["train/distill"]).validate_python(keys))


GRIDDED = [name for name, kind in METHODS.items() if "grid" not in kind().refuses]


@pytest.mark.parametrize("name", sorted(CHOICES))
@pytest.mark.parametrize("method", GRIDDED)
def test_every_method_draws_its_intervals_by_their_shares(method: str, name: str) -> None:
    keys, share = CHOICES[name]
    edges = [249, 499, 749] if method == "pcm" else []  # and its phases', which are points too
    points = sorted({0, *grid(1000, 10).tolist(), *edges})
    plan = objective(method={"name": method}, grid=keys).method
    times = plan.times(SCHEDULE, 10, DRAWS, seeded())
    assert len(times.t) == DRAWS
    assert times.t.dtype == times.s.dtype == times.end.dtype == torch.int64
    assert_drawn(times, probabilities(share, points))
    if method == "pcm":
        lower = torch.tensor([0, 249, 499, 749])
        assert torch.equal(times.end, lower[torch.searchsorted(lower, times.s, right=True) - 1])


def test_what_is_drawn_with_an_interval_stays_as_it_was() -> None:
    """TCD's end is any point up to s, all as likely, however s was chosen."""
    times = objective(method={"name": "tcd"}, grid={"sampling": "shifted"}).method.times(
        SCHEDULE, 8, DRAWS, seeded()
    )
    points = [0, *grid(1000, 8).tolist()]
    for index in (3, 7):
        ends = times.end[times.s == points[index]]
        counts = [int((ends == point).sum()) for point in points[: index + 1]]
        each = len(ends) / len(counts)
        assert sum(counts) == len(ends) > 500
        assert all(abs(count - each) < 4 * each**0.5 for count in counts)


def test_uniform_is_the_method_itself() -> None:
    assert objective().method == LCM()


def test_draws_follow_from_the_generator_alone() -> None:
    plan = reweighed(LCM(), partial(shifted, shift=3.0))
    first, again, other = (plan.times(SCHEDULE, 50, 64, seeded(i)) for i in (0, 0, 1))
    assert torch.equal(torch.stack(first), torch.stack(again)) and not torch.equal(first.t, other.t)
    x = torch.randn(64, 4, 2, 2, generator=seeded())
    landed = plan.endpoint(SCHEDULE, x, x, x, first.t, first.end)
    assert torch.equal(landed, LCM().endpoint(SCHEDULE, x, x, x, first.t, first.end))


def test_pure_noise_is_drawn_as_often_as_its_tail() -> None:
    """alpha is 0 at the last timestep, where sigma / alpha is infinite and one-step sampling starts."""
    times = reweighed(LCM(), partial(lognormal, mean=2.0, std=1.0)).times(ZERO_SNR, 10, DRAWS, seeded())
    points = [0, *grid(1000, 10).tolist()]
    wanted = probabilities(normal(log_noise(zero_snr=True), 2.0, 1.0), points)
    assert wanted[899, 999] > 0.15
    assert_drawn(times, wanted)


@dataclass(frozen=True)
class Halves(LCM):
    """A method of a user's own, which knows nothing of shares: it trains the upper half of time alone."""

    title = "the upper half"

    def times(self, schedule: Schedule, n_grid: int, batch: int, generator: torch.Generator) -> Times:
        index = torch.randint(n_grid // 2, n_grid, (batch,), generator=generator)
        points = torch.cat([torch.zeros(1, dtype=torch.int64), grid(schedule.steps, n_grid)])
        return Times(points[index + 1], points[index], points[index])


def test_a_method_of_the_users_own_is_reweighed_too() -> None:
    times = reweighed(Halves(), partial(shifted, shift=3.0)).times(SCHEDULE, 10, DRAWS, seeded())
    share = shifted(SCHEDULE, 3.0).tolist()
    assert_drawn(times, probabilities(share, [499, *grid(1000, 10).tolist()[5:]]))
    assert torch.equal(times.end, times.s)


def test_shares_that_leave_nothing_are_told() -> None:
    plan = reweighed(Halves(), partial(lognormal, mean=-60.0, std=0.1))
    with pytest.raises(UserError, match="next to nothing of what the method 'the upper half' draws"):
        plan.times(SCHEDULE, 4, 1, seeded())


def test_the_schedule_tells_its_noise_on_the_host_wherever_it_is() -> None:
    there = SCHEDULE.to("meta")
    assert there.alpha.device.type == "meta" and there.log_noise.device.type == "cpu"
    assert torch.equal(there.log_noise, SCHEDULE.log_noise)


# -- Keys ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"grid": {"shift": 2.0}}, "shift has no effect with sampling uniform; set sampling to shifted"),
        (
            {"grid": {"sampling": "shifted", "log_std": 1.0}},
            "log_std has no effect with sampling shifted; set sampling to lognormal",
        ),
        ({"loss": {"adaptive": True}}, "loss.adaptive has no effect on a grid that stays the same"),
        (
            {"loss": {"adaptive": True}, "grid": {"steps": 8, "steps_start": 8}},
            "loss.adaptive has no effect on a grid that stays the same",
        ),
        ({"loss": {"adaptive": True, "name": "l2"}}, "adaptive is of c, which l2 has not"),
        (
            {"method": {"name": "progressive"}, "grid": {"sampling": "shifted"}},
            "grid has no place in method progressive",
        ),
        (
            {"method": {"name": "progressive"}, "loss": {"adaptive": True}},
            "loss.adaptive has no place in method progressive",
        ),
    ],
)
def test_a_key_without_effect_is_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        objective(**changes)


def test_the_distance_adapts_to_the_grid_of_the_step() -> None:
    a, b = torch.ones(1, 4, 2, 2), torch.full((1, 4, 2, 2), 1.5)
    block = {"name": "cauchy", "c": 0.1}
    steady = objective(loss=block, grid={"steps": 16, "steps_start": 4})
    adaptive = objective(loss=block | {"adaptive": True}, grid={"steps": 16, "steps_start": 4})

    def wanted(c: float) -> float:
        return c * math.log(1 + 0.25 / (2 * c**2))

    for intervals, c in ((4, 0.1 * 4**1.15), (8, 0.1 * 2**1.15), (16, 0.1), (None, 0.1)):
        assert adaptive.distance_on(intervals)(a, b).item() == pytest.approx(wanted(c), rel=1e-5)
        assert steady.distance_on(intervals)(a, b).item() == pytest.approx(wanted(0.1), rel=1e-5)
    assert replace(adaptive, on_grid=None).distance_on(4)(a, b).item() == pytest.approx(wanted(0.1), rel=1e-5)
