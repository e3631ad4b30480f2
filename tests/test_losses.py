from __future__ import annotations

import math

import pytest
import torch

from lcm_kit.core.losses import LOSSES, adapted_c, cauchy, huber, huber_norm, l2

A = torch.tensor([[3.0, 0.0], [1.0, 1.0]])[..., None, None]
B = torch.zeros_like(A)


def test_values() -> None:
    assert l2(A, B, 0.001).tolist() == [4.5, 1.0]
    assert huber(A, B, 4.0).tolist() == pytest.approx([0.5, 17**0.5 - 4])
    # of the RMS: the mean squares are 4.5 and 1
    assert huber_norm(A, B, 4.0).tolist() == pytest.approx([20.5**0.5 - 4, 17**0.5 - 4])


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_one_number_a_sample_zero_at_equality_and_symmetric(name: str) -> None:
    loss = LOSSES[name]
    assert loss(A, A, 0.001).tolist() == [0.0, 0.0]
    assert torch.equal(loss(A, B, 0.001), loss(B, A, 0.001))
    assert loss(A.bfloat16(), B.bfloat16(), 0.001).dtype == torch.float32


def test_huber_is_absolute_far_out_and_quadratic_near_zero() -> None:
    far, near = torch.full((1, 1, 1, 1), 5.0), torch.full((1, 1, 1, 1), 1e-6)
    zero = torch.zeros(1, 1, 1, 1)
    assert huber(far, zero, 0.001).item() == pytest.approx(5 - 0.001, abs=1e-6)
    assert huber(near, zero, 0.001).item() == pytest.approx(1e-12 / 0.002, rel=1e-5)


def test_huber_has_a_finite_gradient_where_both_are_equal() -> None:
    a = torch.zeros(1, 1, 1, 1, requires_grad=True)
    huber(a, torch.zeros(1, 1, 1, 1), 0.001).sum().backward()
    assert a.grad is not None and a.grad.item() == 0.0


# -- Cauchy --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("c", [0.001, 0.03, 2.0])
def test_cauchy_and_its_gradient_are_those_of_the_written_formula(c: float) -> None:
    """c log(1 + |a - b|^2 / (2 c^2 d)) of the whole sample's d elements, in float64."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(3, 4, 5, 5, generator=generator).requires_grad_()
    b = a.detach() + torch.tensor([1e-3, 0.1, 30.0]).view(3, 1, 1, 1) * torch.randn(
        3, 4, 5, 5, generator=generator
    )
    exact = a.detach().double().requires_grad_()
    norm = (exact - b.double()).flatten(1).norm(dim=1)
    wanted = c * (1 + norm**2 / (2 * c**2 * 100)).log()
    found = cauchy(a, b, c)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=0)
    found.sum().backward()
    wanted.sum().backward()
    assert a.grad is not None and exact.grad is not None
    torch.testing.assert_close(a.grad.double(), exact.grad, rtol=1e-4, atol=1e-12)


def rms(*values: float) -> torch.Tensor:
    """A sample each whose every element is the value, so that this is its RMS to zero."""
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 4, 2, 2)


def test_cauchy_is_hubers_parabola_near_zero_and_a_logarithm_far_out() -> None:
    c, near, far = 0.01, rms(1e-6), rms(1.0, 100.0)
    zero = torch.zeros_like(near)
    assert cauchy(near, zero, c).item() == pytest.approx(1e-12 / (2 * c), rel=1e-5)
    assert cauchy(near, zero, c).item() == pytest.approx(huber_norm(near, zero, c).item(), rel=1e-5)
    first, second = cauchy(far, torch.zeros_like(far), c).tolist()
    assert second - first == pytest.approx(2 * c * math.log(100), rel=1e-3)
    assert first == pytest.approx(2 * c * math.log(1 / c) - c * math.log(2), rel=1e-3)


def test_cauchy_of_a_large_constant_is_the_squared_distance() -> None:
    for c in (1e2, 1e4):
        assert (2 * c * cauchy(A, B, c)).tolist() == pytest.approx(l2(A, B, c).tolist(), rel=5 / c**2 + 1e-6)


def test_cauchys_slope_is_at_most_a_root_of_a_half_whatever_c_is() -> None:
    """d/dr c log(1 + r^2 / (2 c^2)) = 2 c r / (2 c^2 + r^2), largest at r = sqrt(2) c."""
    for c in (1e-4, 0.03, 5.0):
        r = (c * torch.logspace(-3, 3, 601, dtype=torch.float64)).float().requires_grad_()
        (slope,) = torch.autograd.grad(cauchy(r.view(-1, 1, 1, 1), torch.zeros(601, 1, 1, 1), c).sum(), r)
        assert slope.max().item() == pytest.approx(0.5**0.5, rel=1e-4)
        assert r[slope.argmax()].item() == pytest.approx(2**0.5 * c, rel=0.02)
        assert slope[-1].item() == pytest.approx(2 * c / r[-1].item(), rel=1e-3)  # an outlier pulls less


def test_the_adapted_constant_falls_from_the_coarsest_grid_to_its_own_on_the_last() -> None:
    found = [adapted_c(0.03, intervals, 16) for intervals in (4, 8, 16)]
    assert found[-1] == 0.03 and found == sorted(found, reverse=True)
    assert found[0] == pytest.approx(0.03 * math.exp(1.15 * math.log(4)))
    # that of the paper's code, exp(-1.15 log(intervals) - 0.85), but for the factor between two latents
    wanted = [math.exp(-1.15 * math.log(intervals) - 0.85) for intervals in (4, 8, 16)]
    assert [c / found[-1] for c in found] == pytest.approx([c / wanted[-1] for c in wanted])
