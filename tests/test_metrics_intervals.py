"""Bootstrap and jackknife against scipy, closed forms, and how often the truth is inside."""

from __future__ import annotations

import math

import pytest
import scipy.stats
import torch
from torch import Tensor

from lcm_kit.evaluation.metrics.bootstrap import (
    Resamples,
    interval,
    paired_difference,
    percentiles,
    two_sided_p,
)
from lcm_kit.evaluation.metrics.jackknife import jackknife, student_t, t_share


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_resamples_are_a_function_of_their_arguments() -> None:
    a, b, c = (Resamples.draw(7, 2, 50, seed) for seed in (3, 3, 4))
    assert torch.equal(a.index, b.index) and not torch.equal(a.index, c.index)
    assert a.index.min() == 0 and a.index.max() == 13


def test_the_three_ways_to_a_mean_agree() -> None:
    values, drawn = normal(30), Resamples.draw(10, 3, rounds=200)
    slow = interval(lambda index: float(values[index].mean()), drawn, 0.9)
    assert percentiles(drawn.means(values), 0.9) == pytest.approx(slow, abs=1e-12)
    assert torch.allclose(drawn.counts @ values / 30, drawn.means(values), atol=1e-12)


def test_pictures_of_one_prompt_are_not_new_evidence() -> None:
    """With each value there k times the interval is that of one: not shorter by sqrt(k)."""
    values = normal(25)
    alone = percentiles(Resamples.draw(25, 1, 400, 1).means(values), 0.95)
    four = percentiles(Resamples.draw(25, 4, 400, 1).means(values.repeat_interleave(4)), 0.95)
    assert four == pytest.approx(alone, abs=1e-12)


def test_the_interval_agrees_with_scipys() -> None:
    values = normal(40) ** 2
    theirs = scipy.stats.bootstrap(
        (values.numpy(),), statistic=lambda x, axis: x.std(axis=axis), n_resamples=4000, method="percentile",
        rng=0,
    ).confidence_interval  # fmt: skip
    ours = interval(lambda index: float(values[index].std(correction=0)), Resamples.draw(40, 1, 4000), 0.95)
    assert ours == pytest.approx((theirs.low, theirs.high), rel=0.03)


def test_a_paired_difference_knows_what_cancels() -> None:
    """Prompts differ by 10, cells by 0.3: only the pairs show it."""
    prompts, noise = 10 * normal(60), 0.5 * normal(60, seed=1)
    a, b = prompts + 0.3 + noise, prompts - noise
    drawn = Resamples.draw(60, 1, 4000)
    found = paired_difference(a, b, drawn)
    test = scipy.stats.ttest_rel(a.numpy(), b.numpy())
    low, high = test.confidence_interval()
    assert found.difference == pytest.approx(float((a - b).mean()))
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.03)
    assert found.p == pytest.approx(test.pvalue, abs=0.01)
    apart = drawn.means(a).std() ** 2 + drawn.means(b).std() ** 2  # as if they were not paired
    assert found.high - found.low < float(apart.sqrt())


def test_p_is_never_zero_and_rounds_without_a_value_do_not_count() -> None:
    assert two_sided_p(torch.ones(999)) == pytest.approx(2 / 1000)
    holes = torch.tensor([math.nan] * 500 + [1.0] * 999)
    assert two_sided_p(holes) == pytest.approx(2 / 1000)
    assert percentiles(holes, 0.95) == (1.0, 1.0)


def test_the_interval_of_a_mean_holds_it() -> None:
    """As the docs say: about 90% instead of 95% with 10 prompts, 93% and more from 20 on."""
    held = {}
    for prompts in (10, 40):
        rows = normal(600, prompts, seed=prompts)
        drawn = Resamples.draw(prompts, 1, 400)
        found = [percentiles(drawn.means(row), 0.95) for row in rows]
        held[prompts] = sum(low <= 0 <= high for low, high in found) / len(rows)
    assert 0.86 < held[10] < 0.93 < held[40] + 0.01 < 0.98


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 15, 16, 99])
def test_students_t_is_scipys(freedom: int) -> None:
    for p in (0.6, 0.95, 0.975, 0.999):
        assert student_t(p, freedom) == pytest.approx(scipy.stats.t.ppf(p, freedom), rel=1e-7)
    assert t_share(1.7, freedom) == pytest.approx(1 - 2 * scipy.stats.t.sf(1.7, freedom), abs=1e-12)


def test_the_jackknife_of_a_mean_is_the_textbook() -> None:
    """Leaving one out: value and error are those of the t-test."""
    values = normal(30) + 0.4
    found = jackknife(lambda index: float(values[index].mean()), 30, groups=30)
    test = scipy.stats.ttest_1samp(values.numpy(), 0)
    assert found.value == pytest.approx(float(values.mean()), abs=1e-12)
    assert found.error == pytest.approx(float(values.std()) / math.sqrt(30), rel=1e-9)
    assert found.p == pytest.approx(test.pvalue, rel=1e-6)
    assert found.interval(0.95) == pytest.approx(tuple(test.confidence_interval()), rel=1e-6)


@pytest.mark.parametrize("groups", [25, 7])  # equal groups of one, and unequal ones
def test_the_jackknife_takes_a_bias_of_order_1_over_n_off(groups: int) -> None:
    """The variance divided by n is (n - 1)/n of the unbiased one."""
    rest, plain = [], []
    for seed in range(200):
        values = normal(25, seed=seed)
        found = jackknife(lambda index, v=values: float(v[index].var(correction=0)), 25, groups=groups)
        rest.append(found.value - float(values.var()))
        plain.append(found.whole - float(values.var()))
    # exact when one is left out at a time; groups scatter to both sides
    error = float(torch.tensor(rest).std()) / 200**0.5
    assert abs(sum(rest) / 200) < (1e-12 if groups == 25 else 3 * error)
    assert abs(sum(plain) / 200) == pytest.approx(1 / 25, rel=0.05)
    assert error < 0.003
    with pytest.raises(ValueError, match="2 prompts or more, not 1"):
        jackknife(lambda index: 0.0, 1)


def test_differences_of_jackknives_are_paired() -> None:
    a, b = normal(40, 2).T
    both = [jackknife(lambda index, v=v: float(v[index].mean()), 40, groups=40) for v in (a + b, b)]
    alone = jackknife(lambda index: float(a[index].mean()), 40, groups=40)
    assert both[0].minus(both[1]).value == pytest.approx(alone.value)
    assert both[0].minus(both[1]).error == pytest.approx(alone.error)
    assert alone.minus(alone).p == 1.0
