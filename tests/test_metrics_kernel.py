"""Kernel distances of pictures that share prompts: closed forms, slow loops, and what the intervals hold."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lcm_kit.evaluation.metrics.bootstrap import Resamples, percentiles
from lcm_kit.evaluation.metrics.kernel import gram, kernel_distance, mmd2


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def prompts_of(n: int, per: int, features: int, seed: int) -> Tensor:
    """N(0, 1) features of which pictures of one prompt share half the variance."""
    own = normal(n * per, features, seed=2 * seed + 1)
    return (normal(n, features, seed=2 * seed).repeat_interleave(per, 0) + own) / math.sqrt(2)


def mean_kernel(a: np.ndarray, b: np.ndarray) -> float:
    """E ((x.y) / F + 1)^3 of independent x ~ N(a, I), y ~ N(b, I), from their moments.

    E x.y = a.b; E (x.y)^2 and (x.y)^3: sums of products of the tensors of second and third moments.
    """

    def moments(m: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        eye = np.eye(len(m))
        third = np.einsum("i,j,k->ijk", m, m, m)
        for pattern in ("i,jk->ijk", "j,ik->ijk", "k,ij->ijk"):
            third = third + np.einsum(pattern, m, eye)
        return m, eye + np.outer(m, m), third

    pairs = zip(moments(a), moments(b), strict=True)
    first, second, third = ((x * y).sum() / len(a) ** (k + 1) for k, (x, y) in enumerate(pairs))
    return float(1 + 3 * first + 3 * second + third)


def to_these(shift: float, b: Tensor) -> float:
    """MMD^2 of N(m, I), m = (shift, ...), to the pictures b [M, F]: x.b is N(m.b, |b|^2)."""
    f = b.shape[1]
    at, spread = shift * b.sum(1) / f + 1, b.square().sum(1) / f**2
    k = (b @ b.T / f + 1) ** 3
    within = (k.sum() - k.diagonal().sum()) / (len(b) * (len(b) - 1))
    m = np.full(f, shift)
    return mean_kernel(m, m) + float(within - 2 * (at**3 + 3 * at * spread).mean())


@pytest.mark.parametrize("kernel", ["polynomial", "gaussian"])
def test_mmd2_is_the_double_loop(kernel: str) -> None:
    a, b = normal(5, 3), normal(7, 3, seed=1) + 0.4

    def k(x: Tensor, y: Tensor) -> float:
        if kernel == "polynomial":
            return (float(x @ y) / 3 + 1) ** 3
        return math.exp(-float((x / x.norm() - y / y.norm()).square().sum()) / (2 * 10**2))

    def mean(x: Tensor, y: Tensor, same: bool) -> float:
        return float(
            np.mean([k(p, q) for i, p in enumerate(x) for j, q in enumerate(y) if not same or i != j])
        )

    slow = mean(a, a, True) + mean(b, b, True) - 2 * mean(a, b, False)
    assert mmd2(a, b, kernel) == pytest.approx(slow * {"polynomial": 1, "gaussian": 1000}[kernel], rel=1e-9)
    with pytest.raises(ValueError, match="not 1 and 7"):
        mmd2(a[:1], b)


def test_mmd2_of_shifted_gaussians_is_the_closed_form() -> None:
    zero, m = np.zeros(4), np.full(4, 0.5)
    truth = mean_kernel(zero, zero) + mean_kernel(m, m) - 2 * mean_kernel(zero, m)
    found = [mmd2(normal(400, 4, seed=s), normal(400, 4, seed=100 + s) + 0.5) for s in range(30)]
    error = float(np.std(found)) / math.sqrt(30)
    assert np.mean(found) == pytest.approx(truth, abs=3 * error) and error < truth / 15


def test_one_picture_a_prompt_is_plain_kid() -> None:
    a, b = normal(12, 5), normal(30, 5, seed=1)
    found, _ = kernel_distance(a, b, Resamples.draw(12, rounds=2), paired=False)
    assert found == pytest.approx(mmd2(a, b), rel=1e-12)


@pytest.mark.parametrize("paired", [True, False])
def test_pairs_of_one_prompt_are_left_out_in_every_round(paired: bool) -> None:
    per, n = 2, 8
    a, b = prompts_of(4, per, 3, seed=1), prompts_of(4, per, 3, seed=2) + 0.3
    drawn = Resamples.draw(4, per, rounds=12, seed=5)
    _, rounds = kernel_distance(a, b, drawn, paired=paired)

    def mean(k: Tensor, rows: list[int], columns: list[int], apart: bool) -> float:
        pairs = [float(k[i, j]) for i in rows for j in columns if not apart or i // per != j // per]
        return float(np.mean(pairs)) if pairs else math.nan

    everyone = list(range(n))
    single = [float(gram(b, b, "polynomial")[i, j]) for i in everyone for j in everyone if i != j]
    for index, found in zip(drawn.index.tolist(), rounds.tolist(), strict=True):
        slow = mean(gram(a, a, "polynomial"), index, index, True)
        if paired:
            slow += mean(gram(b, b, "polynomial"), index, index, True)
            slow -= 2 * mean(gram(a, b, "polynomial"), index, index, True)
        else:
            slow += float(np.mean(single)) - 2 * mean(gram(a, b, "polynomial"), index, everyone, False)
        assert found == pytest.approx(slow, rel=1e-9, nan_ok=True)


def test_no_bias_from_few_prompts_with_several_pictures() -> None:
    """KID over all pairs would see pictures of a prompt as alike, and call equal laws different."""
    reference = normal(400, 4, seed=9)
    truth = to_these(0.0, reference)
    ours, naive, resampled = [], [], []
    for seed in range(150):
        a = prompts_of(8, 4, 4, seed=100 + seed)
        value, rounds = kernel_distance(a, reference, Resamples.draw(8, 4, 60, seed), paired=False)
        ours.append(value)
        resampled.append(float(rounds.nanmean()))
        naive.append(mmd2(a, reference))
    error = float(np.std(ours)) / math.sqrt(150)
    assert np.mean(ours) == pytest.approx(truth, abs=3 * error)
    assert np.mean(resampled) == pytest.approx(truth, abs=3 * error)  # resamples add no bias either
    assert np.mean(naive) > truth + 6 * error


@pytest.mark.parametrize(("shift", "least", "most"), [(0.0, 0.93, 1.0), (0.5, 0.85, 0.99)])
def test_the_interval_holds_the_distance(shift: float, least: float, most: float) -> None:
    """About as often as it says where there is a distance, and more often near 0, where it is too wide."""
    reference = normal(500, 8, seed=5)
    truth = to_these(shift, reference)
    held = []
    for seed in range(80):
        a = prompts_of(40, 2, 8, seed=seed) + shift
        _, rounds = kernel_distance(a, reference, Resamples.draw(40, 2, 300, seed), paired=False)
        low, high = percentiles(rounds, 0.95)
        held.append(low <= truth <= high)
    assert least <= np.mean(held) <= most


def test_one_prompt_has_no_distance() -> None:
    with pytest.raises(ValueError, match="2 prompts or more"):
        kernel_distance(normal(4, 3), normal(9, 3), Resamples.draw(1, 4), paired=False)
    two = kernel_distance(normal(4, 3), normal(9, 3), Resamples.draw(2, 2, 200), paired=False)
    assert math.isfinite(two[0]) and all(map(math.isfinite, percentiles(two[1], 0.95)))
