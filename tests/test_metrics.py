"""Metrics against closed forms and against another implementation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lcm_kit.evaluation.metrics.accuracy import attributes_right
from lcm_kit.evaluation.metrics.distance import rms
from lcm_kit.evaluation.metrics.frechet import frechet, frechet_gaussians
from lcm_kit.evaluation.metrics.saturation import chroma, clipped_shares
from lcm_kit.tiny.world import Scene


class Reader:
    """A probe that says what it was told to."""

    def __init__(self, seen: list[tuple[str, str, str]]) -> None:
        self.seen = seen

    def read(self, images: torch.Tensor) -> list[dict[str, str]]:
        return [dict(zip(("object", "colour", "pattern"), names, strict=True)) for names in self.seen]


def test_each_attribute_of_each_picture_is_right_or_not() -> None:
    scenes = [Scene("cat", "red", "plain"), Scene("fox", "blue", "dotted"), Scene("owl", "green", "striped"),
              Scene("dog", "pink", "plain")]  # fmt: skip
    seen = [
        ("cat", "red", "plain"),
        ("fox", "red", "dotted"),
        ("cat", "green", "plain"),
        ("dog", "pink", "plain"),
    ]
    found = attributes_right(Reader(seen), torch.zeros(4, 3, 8, 8), scenes)
    assert found.tolist() == [
        [True, True, True],
        [True, False, True],
        [False, True, False],
        [True, True, True],
    ]


def test_frechet_of_two_gaussians_in_closed_form() -> None:
    """Commuting covariances: |m1 - m2|^2 + sum (s1 - s2)^2 over the standard deviations along shared axes."""
    generator = torch.Generator().manual_seed(0)
    q, _ = torch.linalg.qr(torch.randn((6, 6), generator=generator, dtype=torch.float64))
    s1, s2 = torch.rand((2, 6), generator=generator, dtype=torch.float64) + 0.1
    m1, m2 = torch.randn((2, 6), generator=generator, dtype=torch.float64)
    found = frechet_gaussians(m1, q @ torch.diag(s1**2) @ q.T, m2, q @ torch.diag(s2**2) @ q.T)
    assert found == pytest.approx(float(((m1 - m2) ** 2).sum() + ((s1 - s2) ** 2).sum()), abs=1e-12)


@pytest.mark.parametrize("n", [40, 500])  # 40 samples of 64 features: singular covariances
def test_frechet_agrees_with_scipy(n: int) -> None:
    from scipy.linalg import sqrtm

    generator = torch.Generator().manual_seed(1)
    a = torch.randn((n, 64), generator=generator, dtype=torch.float64) * torch.linspace(0.1, 2, 64)
    b = torch.randn((n, 64), generator=generator, dtype=torch.float64) + 0.1
    ca, cb = np.cov(a.T), np.cov(b.T)
    root = sqrtm(ca @ cb + (1e-12 * np.eye(64) if n < 64 else 0))
    wanted = float(((a.mean(0) - b.mean(0)) ** 2).sum()) + np.trace(ca + cb) - 2 * np.trace(root).real
    assert frechet(a, b) == pytest.approx(wanted, rel=1e-4)


def test_frechet_of_the_same_law_is_its_bias() -> None:
    """The estimate is biased upwards by few samples, and zero for equal sets."""
    generator = torch.Generator().manual_seed(3)
    draws = [torch.randn((n, 8), generator=generator) for n in (100, 1600, 1600)]
    assert frechet(draws[1], draws[1]) == pytest.approx(0, abs=1e-9)
    few, many = frechet(draws[0], draws[2]), frechet(draws[1], draws[2])
    assert 0 < many < few / 5 < 0.1
    with pytest.raises(ValueError, match="not 1 and 1600"):
        frechet(draws[0][:1], draws[1])


def test_distance_is_each_pictures_rms() -> None:
    a, b = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    b[0] = 0.5
    b[1, :, :2] = 1.0  # half of its pixels: rms sqrt(1/2)
    assert rms(a, b).tolist() == pytest.approx([0.5, math.sqrt(0.5)])
    assert rms(b, b).tolist() == [0, 0]


def test_chroma_and_clipping() -> None:
    red = torch.tensor([0.5, -0.5, -0.5]).view(1, 3, 1, 1).expand(1, 3, 4, 4)  # chroma 0.5 in [0, 1]
    strong = torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    assert (chroma(red).item(), clipped_shares(red).item()) == (0.5, 0.0)
    assert (chroma(strong).item(), clipped_shares(strong).item()) == (1.0, 1.0)
    edge = torch.full((1, 3, 2, 2), 254 / 127.5 - 1)  # one 8-bit step below white is not clipped
    assert clipped_shares(edge).item() == 0
