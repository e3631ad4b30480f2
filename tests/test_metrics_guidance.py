"""Effective guidance: the slow definition, known truths, and the embedded base at a guidance we know."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lcm_kit import assets, sample
from lcm_kit.evaluation.metrics.bootstrap import Resamples
from lcm_kit.evaluation.metrics.effective_guidance import nearest

SCALES = torch.tensor([1.0, 1.7, 2.9, 4.3, 7.1])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def curve(n: int = 12) -> Tensor:
    """Teachers [G, N, 3, 2] along a bent line."""
    g = SCALES.double()[:, None, None, None]
    return normal(n, 3, 2) + g * normal(n, 3, 2, seed=1) + 0.1 * g**2 * normal(n, 3, 2, seed=2)


def test_it_is_the_least_distance_of_all_points_of_the_line() -> None:
    teachers, student = curve(), curve().mean(0) + 0.5 * normal(12, 3, 2, seed=3)
    drawn = Resamples.draw(6, 2, rounds=8, seed=1)
    found = nearest(student, teachers, SCALES, drawn)
    shares = torch.linspace(0, 1, 4001, dtype=torch.float64)
    points = torch.cat(
        [torch.lerp(teachers[i, None], teachers[i + 1, None], shares.view(-1, 1, 1, 1)) for i in range(4)]
    )
    at = torch.cat([torch.lerp(SCALES[i].double(), SCALES[i + 1].double(), shares) for i in range(4)])
    squared = (points - student).square().sum((2, 3))  # [points, N]
    assert found.value == pytest.approx(float(at[squared.sum(1).argmin()]), abs=2e-3)
    for index, value in zip(drawn.index, found.resampled.tolist(), strict=True):
        assert value == pytest.approx(float(at[squared[:, index].sum(1).argmin()]), abs=2e-3)
    span = (teachers[-1] - teachers[0]).square().sum()
    assert found.distance == pytest.approx(float((squared.sum(1).min() / span).sqrt()), rel=1e-5)
    assert not found.at_edge


def test_a_teacher_is_itself_to_the_bit() -> None:
    teachers = curve().float()  # as latents are kept
    drawn = Resamples.draw(12, rounds=100)
    for k, scale in enumerate(SCALES):
        found = nearest(teachers[k], teachers, SCALES, drawn)
        assert found.value == float(scale) and found.distance == 0
        assert found.interval() == pytest.approx((float(scale),) * 2, abs=1e-9)
        assert found.at_edge == (k in (0, 4))


def test_beyond_the_grid_is_a_bound() -> None:
    line = torch.stack([normal(12, 4) + s * normal(12, 4, seed=1) for s in SCALES.tolist()])
    weaker = normal(12, 4) + 0.5 * normal(12, 4, seed=1)
    found = nearest(weaker, line, SCALES, Resamples.draw(12))
    assert (found.value, found.at_edge) == (1.0, True)
    assert found.distance == pytest.approx(0.5 / 6.1, rel=1e-5)


def test_the_interval_holds_the_guidance_and_ignores_what_is_orthogonal() -> None:
    """Students at 2.4 with each sample's own spread of 0.8, four pictures a prompt that share half of it."""
    held, values = [], []
    for seed in range(200):
        start, way = normal(96, 8, seed=seed), normal(96, 8, seed=1000 + seed)
        teachers = torch.stack([start + s * way for s in SCALES.tolist()])
        own = (
            0.8
            * (normal(24, 1, seed=2000 + seed).repeat_interleave(4, 0) + normal(96, 1, seed=3000 + seed))
            / 2**0.5
        )
        other = normal(96, 8, seed=4000 + seed)
        other -= (other * way).sum(1, keepdim=True) / way.square().sum(1, keepdim=True) * way
        student = start + (2.4 + own) * way + 3 * other
        found = nearest(student, teachers, SCALES, Resamples.draw(24, 4, 300, seed))
        low, high = found.interval(0.95)
        held.append(low <= 2.4 <= high)
        values.append(found.value)
    assert np.mean(values) == pytest.approx(2.4, abs=3 * np.std(values) / 200**0.5)
    assert 0.87 <= np.mean(held) <= 0.99


def test_shapes_and_scales_that_do_not_fit() -> None:
    teachers, drawn = curve(), Resamples.draw(12)
    with pytest.raises(ValueError, match=r"teachers are \(5, 12, 3, 2\), and must be \(5, 11, 3, 2\)"):
        nearest(teachers[0, :11], teachers, SCALES, drawn)
    with pytest.raises(ValueError, match="two or more"):
        nearest(teachers[0], teachers[:1], SCALES[:1], drawn)
    for scales in ([1.0, 1.0], [2.0, 1.0]):
        with pytest.raises(ValueError, match="each larger than the one before"):
            nearest(teachers[0], teachers[:2], torch.tensor(scales), drawn)


def test_the_interval_knows_that_a_curve_is_not_its_chord() -> None:
    """Teachers at g + g^2 / 10 along a line: the chord is off by h^2 u (1 - u) / 10 over its own slope."""
    way = normal(12, 4)

    def at(g: float) -> Tensor:
        return (g + g**2 / 10) * way

    scales, truth = [1.0, 2.0, 4.0, 7.0], 2.8
    teachers = torch.stack([at(g) for g in scales])
    found = nearest(at(truth), teachers, torch.tensor(scales), Resamples.draw(12))
    off = (2.8 - 2) * (4 - 2.8) / 10 / (1 + (2 + 4) / 10)  # h^2 u (1 - u), a tenth, over the chord's slope
    assert abs(found.value - truth) == pytest.approx(off, rel=1e-6)
    assert off <= found.interpolation <= 1.5 * off
    low, high = found.interval()
    assert low <= truth <= high and high - low < 3.1 * off
    assert nearest(teachers[1], teachers, torch.tensor(scales), Resamples.draw(12)).interpolation == 0
    straight = torch.stack([g * way for g in scales])
    assert nearest(truth * way, straight, torch.tensor(scales), Resamples.draw(12)).interpolation < 1e-12


@pytest.mark.slow
def test_the_embedded_base_at_guidances_between_those_of_the_grid() -> None:
    grid = [1.0, 2.0, 3.0, 4.0, 5.0, 7.0]
    pipe, prompts = sample.pipeline("asset:tiny-sd"), assets.prompts("asset:tiny-sd")[:8]

    def drawn(guidance_scale: float) -> Tensor:
        return sample.latents(pipe, prompts, sampler="ddim", steps=4, guidance_scale=guidance_scale, seed=0)

    teachers = torch.stack([drawn(scale) for scale in grid])
    for truth in (3.5, 6.0):
        found = nearest(drawn(truth), teachers, torch.tensor(grid), Resamples.draw(8))
        low, high = found.interval(0.95)
        assert low <= truth <= high and high - low < 0.5
        assert found.value == pytest.approx(truth, abs=0.15)
        assert found.distance < 0.1 and not found.at_edge
