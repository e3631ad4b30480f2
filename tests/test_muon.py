"""The optimizer of the embedded models: equal singular values for matrices, AdamW for the rest."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lcm_kit.tiny.muon import Muon, orthogonal


@pytest.mark.parametrize("shape", [(8, 30), (30, 8), (16, 16)])
def test_singular_values_come_near_one_and_vectors_stay(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    inner = u.T @ orthogonal(matrix) @ v.T
    values = inner.diagonal()
    assert (inner - torch.diag(values)).abs().max() < 1e-4
    assert values.min() > 0.4 and values.max() < 1.25


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv_in, self.body = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3)
        self.token_embedding = nn.Embedding(5, 4)


def test_what_is_no_matrix_moves_as_adamw_moves_it() -> None:
    torch.manual_seed(0)
    mine, other = Net(), Net()
    other.load_state_dict(mine.state_dict())
    ours = Muon(mine, 1e-2, (0.9, 0.99), 0.1)
    theirs = torch.optim.AdamW(other.parameters(), lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
    for step in range(4):
        for a, b in zip(mine.parameters(), other.parameters(), strict=True):
            a.grad = torch.randn(a.shape, generator=torch.Generator().manual_seed(step))
            b.grad = a.grad.clone()
        ours.step()
        theirs.step()
    for (name, a), b in zip(mine.named_parameters(), other.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5) == (name != "body.weight"), name


def test_a_matrix_moves_by_the_size_of_adamws_update() -> None:
    """0.2 of the rate a weight, root mean square, where all directions count (arXiv:2502.16982, 2.2)."""
    torch.manual_seed(0)
    net = nn.Linear(64, 64, bias=False)
    before = net.weight.detach().clone()
    net.weight.grad = torch.randn(64, 64)
    Muon(net, 1e-2, (0.9, 0.99), 0.0).step()
    moved = (net.weight - before).pow(2).mean().sqrt().item()
    assert moved == pytest.approx(0.2 * 1e-2, rel=0.2)
