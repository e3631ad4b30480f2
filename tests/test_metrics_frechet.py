"""Intervals of the Frechet distance on Gaussians whose distance is known."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from lcm_kit.evaluation.metrics.bootstrap import Resamples, interval
from lcm_kit.evaluation.metrics.frechet import ENOUGH, frechet, frechet_interval, frechet_jackknife


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def coverage(n: int, features: int, shift: float, per: int = 1, paired: bool = False) -> float:
    """How often the 95% interval holds |m|^2, for N(m, I); a prompt is half of the variance."""
    held, truth = [], features * shift**2
    reference = normal(4000, features, seed=999)
    for seed in range(40):
        shared = normal(n // per, features, seed=1000 + seed).repeat_interleave(per, 0)
        a = (normal(n, features, seed=seed) + shared) / 2**0.5 if per > 1 else shared
        b = normal(n, features, seed=5000 + seed) if paired else reference
        _, low, high = frechet_interval(a + shift, b, Resamples.draw(n // per, per, 1), 0.95, paired)
        held.append(low <= truth <= high)
    return float(np.mean(held))


def test_few_samples_go_another_way_to_the_same_number() -> None:
    """Fewer samples than features: by singular values; against scipy's matrix root."""
    a, b = normal(12, 40), 0.5 * normal(15, 40, seed=1) + 0.2
    ca, cb = (np.cov(each.numpy().T) for each in (a, b))
    # the root of a product with the eigenvalues of a symmetric one; a small ridge, for it is singular
    root = scipy.linalg.sqrtm(ca @ cb + 1e-12 * np.eye(40))
    wanted = float((a.mean(0) - b.mean(0)).square().sum()) + np.trace(ca + cb) - 2 * np.trace(root).real
    assert frechet(a, b) == pytest.approx(wanted, rel=1e-4)
    assert frechet(a, a) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("n", "features", "shift", "options"),
    [(96, 8, 0.5, {}), (96, 8, 0.5, {"per": 4}), (96, 8, 0.0, {}), (96, 8, 0.5, {"paired": True})],
)
def test_the_interval_holds_the_distance(
    n: int, features: int, shift: float, options: dict[str, int]
) -> None:
    assert n >= ENOUGH * features
    assert coverage(n, features, shift, **options) >= 0.85


def test_the_value_has_little_bias_left_where_the_estimate_has_much() -> None:
    truth, reference = 8 * 0.3**2, normal(8000, 8, seed=999)
    found = [frechet_jackknife(normal(64, 8, seed=s) + 0.3, reference, 1) for s in range(40)]
    bias, left = np.mean([f.whole for f in found]) - truth, np.mean([f.value for f in found]) - truth
    assert bias > 0.3 * truth and abs(left) < bias / 5


def test_bounds_where_samples_are_too_few() -> None:
    """With 2, 1 and half a sample a feature the jackknife is off, to either side, and says less: bounds."""
    for n, features in ((48, 24), (48, 48), (48, 96)):
        held, inside = [], []
        for seed in range(8):
            a, b = normal(n, features, seed=seed) + 0.2, normal(1000, features, seed=99)
            truth = features * 0.2**2
            _, low, high = frechet_interval(a, b, Resamples.draw(n, 1, 1), 0.95)
            held.append(low <= truth <= high)
            alone = frechet_jackknife(a, b, 1).interval(0.95)
            inside.append(alone[0] <= truth <= alone[1])
        assert np.mean(held) >= 0.9
        assert features < 48 or np.mean(inside) == 0  # which is why


def test_the_percentile_bootstrap_would_be_wrong() -> None:
    a, b = normal(64, 8) + 0.3, normal(4000, 8, seed=99)
    low, _ = interval(lambda index: frechet(a[index], b), Resamples.draw(64, 1, 60), 0.95)
    assert low > 8 * 0.3**2


def test_paired_sets_know_their_difference() -> None:
    """A student that is the teacher plus a little: the interval is narrower than for strangers."""
    teacher = normal(200, 6)
    student = teacher + 0.3 + 0.05 * normal(200, 6, seed=1)
    drawn = Resamples.draw(100, 2, 1)
    value, low, high = frechet_interval(student, teacher, drawn, 0.95, paired=True)
    assert low <= value <= high and value == pytest.approx(6 * 0.09, abs=0.03)
    strangers = frechet_interval(student, teacher, drawn, 0.95)
    assert high - low < (strangers[2] - strangers[1]) / 3
