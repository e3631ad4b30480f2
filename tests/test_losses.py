from __future__ import annotations

import pytest
import torch

from lcm_kit.core.losses import LOSSES, huber, huber_norm, l2

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
