"""Metrics of sets and of pairs, each against a closed form or a slow reference."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
import torch
from torch import Tensor

from lcm_kit.evaluation.metrics import diversity, in_style, kernel, sharpness, similarity
from lcm_kit.evaluation.metrics.bootstrap import Resamples, percentiles, two_sided_p
from lcm_kit.evaluation.metrics.saturation import chroma, clipped_shares


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- Resampling ----------------------------------------------------------------------------------------------


def test_all_pictures_of_a_prompt_come_along() -> None:
    drawn = Resamples.draw(5, 3, rounds=40, seed=1)
    assert drawn.index.shape == (40, 15) and torch.equal(drawn.index, Resamples.draw(5, 3, 40, 1).index)
    for row in drawn.index.unflatten(1, (5, 3)):
        assert all(r.tolist() == [r[0] // 3 * 3 + k for k in range(3)] for r in row)
    assert torch.equal(drawn.counts.sum(1), torch.full((40,), 15.0, dtype=torch.float64))


def test_the_interval_of_a_mean_is_the_normal_one() -> None:
    values = normal(400)
    means = values[Resamples.draw(400, rounds=4000).index].mean(1)
    half = 1.96 * float(values.std()) / 20
    low, high = percentiles(means, 0.95)
    assert (low, high) == pytest.approx((float(values.mean()) - half, float(values.mean()) + half), abs=0.01)


def test_p_is_that_of_a_normal_difference() -> None:
    rounds = normal(200_000) + 1.5
    assert two_sided_p(rounds) == pytest.approx(2 * scipy.stats.norm.sf(1.5), abs=0.005)
    assert two_sided_p(torch.zeros(10)) == 1.0


# -- Kernel and Frechet distances ----------------------------------------------------------------------------


def slow_mmd(a: Tensor, b: Tensor, weights: list[int], paired: bool) -> float:
    """By loops over all pairs of different samples, each as often as both are there."""
    f = a.shape[1]

    def k(x: Tensor, y: Tensor) -> float:
        return (float(x @ y) / f + 1) ** 3

    def mean(x: Tensor, y: Tensor, u: list[int], v: list[int], off: bool) -> float:
        pairs = [(i, j) for i in range(len(x)) for j in range(len(y)) if not off or i != j]
        return sum(u[i] * v[j] * k(x[i], y[j]) for i, j in pairs) / sum(u[i] * v[j] for i, j in pairs)

    ones = weights if paired else [1] * len(b)
    return (
        mean(a, a, weights, weights, True)
        + mean(b, b, ones, ones, True)
        - 2 * mean(a, b, weights, ones, paired)
    )


@pytest.mark.parametrize("paired", [True, False])
def test_the_kernel_distance_is_the_sum_over_pairs(paired: bool) -> None:
    a, b = normal(6, 4), normal(6 if paired else 9, 4, seed=1) + 0.5
    drawn = Resamples.draw(6, rounds=5, seed=3)
    value, rounds = kernel.kernel_distance(a, b, drawn, paired=paired)
    assert value == pytest.approx(slow_mmd(a, b, [1] * 6, paired))
    for counts, found in zip(drawn.counts.int().tolist(), rounds.tolist(), strict=True):
        assert found == pytest.approx(slow_mmd(a, b, counts, paired))


def test_kid_is_that_of_torchmetrics() -> None:
    poly_mmd = pytest.importorskip("torchmetrics.image.kid").poly_mmd
    a, b = normal(30, 8).float(), normal(30, 8, seed=1).float() + 0.3
    found, _ = kernel.kernel_distance(a, b, Resamples.draw(30, rounds=1), paired=False)
    assert found == pytest.approx(float(poly_mmd(a, b)), rel=1e-4)


def test_the_kernel_distance_has_no_bias_and_resamples_add_none() -> None:
    """Of N(0, 1) and N(m, 1) in one dimension: E k = E (x y + 1)^3, from the moments."""
    m = 0.7
    cross = 1.0  # E over x ~ N(0, 1), y ~ N(m, 1) of 1 + 3 xy + 3 x^2 y^2 + x^3 y^3
    cross += 3 * (1 + m * m)
    own = 1 + 3 * 1
    second, third = 1 + m * m, m**3 + 3 * m
    other = 1 + 3 * m * m + 3 * second**2 + third**2
    truth = own + other - 2 * cross
    found, resampled = [], []
    for seed in range(300):
        a, b = normal(20, 1, seed=seed), normal(20, 1, seed=10_000 + seed) + m
        value, rounds = kernel.kernel_distance(a, b, Resamples.draw(20, rounds=50, seed=seed), paired=True)
        found.append(value)
        resampled.append(float(rounds.mean()))
    error = float(np.std(found) / math.sqrt(len(found)))
    assert np.mean(found) == pytest.approx(truth, abs=3 * error)
    assert np.mean(resampled) == pytest.approx(truth, abs=3 * error)


def test_cmmd_is_the_gaussian_kernel_on_unit_vectors() -> None:
    a, b = normal(5, 3), normal(5, 3, seed=1)
    k = kernel.gram(a, b, "gaussian")
    x, y = a[2] / a[2].norm(), b[4] / b[4].norm()
    assert float(k[2, 4]) == pytest.approx(math.exp(-float((x - y) @ (x - y)) / 200))
    value, _ = kernel.kernel_distance(a, b, Resamples.draw(5, rounds=1), paired=False, kernel="gaussian")
    inside = [kernel.gram(z, z, "gaussian") for z in (a, b)]
    off = [float((z.sum() - z.diagonal().sum()) / 20) for z in inside]
    assert value == pytest.approx(1000 * (sum(off) - 2 * float(k.mean())), rel=1e-9)


# -- Diversity, sharpness, colours ---------------------------------------------------------------------------


def test_diversity_is_the_mean_distance_of_pairs() -> None:
    features = normal(6, 5)
    expected = [
        np.mean(
            [
                float((features[p + i] - features[p + j]).norm())
                for i, j in itertools.combinations(range(3), 2)
            ]
        )
        for p in (0, 3)
    ]
    assert diversity.within_prompts(features, 3).tolist() == pytest.approx(expected)
    same = normal(2, 5).repeat_interleave(3, 0)
    assert diversity.within_prompts(same, 3).tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match="no pairs"):
        diversity.within_prompts(features, 1)


def test_the_laplacian_is_scipys() -> None:
    images = normal(2, 3, 16, 16).clamp(-1, 1)
    for image, found in zip(images, sharpness.laplacian_energy(images), strict=True):
        y = (image * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(0).numpy()
        assert float(found) == pytest.approx(scipy.ndimage.laplace(y)[1:-1, 1:-1].var())


@pytest.mark.parametrize("slope", [-1.0, -2.0, -3.0])
def test_the_slope_of_a_known_spectrum(slope: float) -> None:
    side = 64
    f = np.fft.fftfreq(side, 1 / side)
    radius = np.round(np.hypot(f[:, None], f[None]))
    power = np.where(radius > 0, np.maximum(radius, 1) ** slope, 0.0)
    phases = np.fft.fft2(np.random.default_rng(0).standard_normal((side, side)))
    picture = np.fft.ifft2(np.sqrt(power) * phases / np.abs(phases)).real
    images = torch.from_numpy(picture / np.abs(picture).max()).expand(1, 3, side, side)
    assert float(sharpness.spectral_slope(images)) == pytest.approx(slope, abs=1e-6)


def test_a_colour_shift_is_measured() -> None:
    """Chroma is max - min: stretched about grey by 1.5 it is 1.5 times as large."""
    images = 0.4 * normal(4, 3, 8, 8).clamp(-1, 1)
    assert chroma(1.5 * images).tolist() == pytest.approx((1.5 * chroma(images)).tolist())
    shifted = (2.5 * images).clamp(-1, 1)
    expected = (images.abs() >= 0.4 * (1 - 1 / 255)).double().mean((1, 2, 3))
    assert clipped_shares(shifted).tolist() == pytest.approx(expected.tolist())
    assert clipped_shares(images).tolist() == [0.0] * 4


# -- Brand ---------------------------------------------------------------------------------------------------


def test_brand_similarity_is_between_its_ends() -> None:
    brand, control = normal(20, 8) + torch.tensor([3.0] + [0.0] * 7), normal(30, 8, seed=1)
    floor, ceiling = similarity.ends(brand, control)
    inside = similarity.brand_similarity(
        normal(50, 8, seed=2) + torch.tensor([3.0] + [0.0] * 7), brand, control
    )
    outside = similarity.brand_similarity(normal(50, 8, seed=3), brand, control)
    assert float(inside.mean()) == pytest.approx(ceiling, abs=0.08)
    assert float(outside.mean()) == pytest.approx(floor, abs=0.08)
    assert ceiling > 0.4 and floor < 0.1


def test_towards_the_style_by_hand() -> None:
    """Spread of 4 along x and 1 along y, half of it shrunk to 2.5 in both: weights 1/3.25 and 1/1.75."""
    base = torch.tensor([[-2.0, -1.0], [2.0, 1.0], [-2.0, 1.0], [2.0, -1.0]])
    brand = base + torch.tensor([1.0, 1.0])
    x, y = 1 / 3.25, 1 / 1.75
    found = in_style.towards_style(
        torch.tensor([[0.0, 0.0], [1.0, 1.0], [1.0, 0.0], [0.0, 1.0]]), brand, base
    )
    assert found.tolist() == pytest.approx([0, 1, x / (x + y), y / (x + y)])
    same = torch.ones(3, 2)
    assert in_style.towards_style(same, 2 * same, same).tolist() == [0, 0, 0]  # without any spread
    assert in_style.towards_style(2 * same, 2 * same, same).tolist() == pytest.approx([1, 1, 1])
    assert in_style.towards_style(brand, base, base).tolist() == [0] * 4
    with pytest.raises(ValueError, match="2 pictures or more"):
        in_style.towards_style(base, brand[:1], base)


def test_the_style_is_told_whatever_pictures_show() -> None:
    """Features: one of two grounds, far apart, 23 of other content, and one of style, narrow."""

    def drawn(style: float, n: int, seed: int) -> Tensor:
        content = normal(n, 24, seed=seed)
        content[:, 0] += 20 * (normal(n, seed=seed + 1) > 0)
        return torch.cat([content, style + 0.2 * normal(n, 1, seed=seed + 2)], 1)

    brand, base = drawn(3, 20, 1), drawn(0, 24, 11)
    pictures = torch.cat([drawn(3, 200, 21), drawn(0, 200, 31)])
    way = in_style.towards_style(pictures, brand, base)
    assert (way[:200] >= 0.5).double().mean() > 0.98 and (way[200:] < 0.5).double().mean() > 0.98
    away = torch.cdist(pictures, torch.stack([brand.mean(0), base.mean(0)]))
    assert (away[:200, 0] < away[:200, 1]).double().mean() < 0.6  # by distance alone the grounds decide


def test_brand_similarity_by_hand() -> None:
    brand, control = torch.tensor([[2.0, 1.0]]), torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    # centre (1, 0): brand (1, 1), control (0, 1) and (0, -1), the picture (0, 2)
    found = similarity.brand_similarity(torch.tensor([[1.0, 2.0]]), brand, control)
    assert found.tolist() == pytest.approx([math.sqrt(0.5) - 0.0])
