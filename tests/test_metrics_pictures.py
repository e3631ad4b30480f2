"""Figures of single pictures and small groups: what the other tests leave open."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.ndimage
import torch
from torch import Tensor

from lcm_kit.evaluation.metrics.distance import rms
from lcm_kit.evaluation.metrics.diversity import within_prompts
from lcm_kit.evaluation.metrics.saturation import chroma, clipped_shares
from lcm_kit.evaluation.metrics.sharpness import laplacian_energy, luma, spectral_slope
from lcm_kit.evaluation.metrics.similarity import brand_similarity, ends


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def noise(slope: float, height: int, width: int, seed: int = 0) -> Tensor:
    """A grey picture whose power is f^slope, f in cycles a pixel, not rounded to rings: [1, 3, H, W]."""
    f = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    f[0, 0] = 1
    phases = np.fft.fft2(np.random.default_rng(seed).standard_normal((height, width)))
    picture = np.fft.ifft2(f ** (slope / 2) * phases / np.abs(phases)).real
    return torch.from_numpy(picture).expand(1, 3, height, width)


@pytest.mark.parametrize("slope", [0.0, -1.0, -2.0, -3.0])
@pytest.mark.parametrize("size", [(64, 64), (64, 96), (80, 48)])
def test_the_slope_of_continuous_noise_of_any_shape(slope: float, size: tuple[int, int]) -> None:
    assert float(spectral_slope(noise(slope, *size))) == pytest.approx(slope, abs=0.07)


def test_a_flat_picture_has_no_slope_and_no_energy() -> None:
    flat = torch.full((1, 3, 16, 16), 0.25)
    assert spectral_slope(flat).tolist() == pytest.approx([0.0], abs=1e-12)
    assert laplacian_energy(flat).tolist() == pytest.approx([0.0], abs=1e-20)


def test_the_energy_of_a_wave_in_closed_form() -> None:
    """The Laplacian of A cos(w x) is -2 (1 - cos w) times it; the variance of whole waves is A^2 / 2."""
    w, amplitude = 2 * np.pi / 8, 0.6
    wave = amplitude * torch.cos(w * torch.arange(34, dtype=torch.float64)).expand(1, 3, 34, 34)
    assert luma(wave)[0, 0].tolist() == pytest.approx(wave[0, 0, 0].tolist())  # weights add up to 1
    expected = (2 * (1 - np.cos(w))) ** 2 * amplitude**2 / 2
    assert laplacian_energy(wave).tolist() == pytest.approx([expected])


def test_blur_lowers_the_energy_and_the_slope_more_and_more() -> None:
    picture = noise(-1.0, 64, 64)
    blurred = [
        torch.from_numpy(scipy.ndimage.gaussian_filter(picture.numpy(), (0, 0, s, s))) for s in (0.5, 1, 2)
    ]
    energies = [float(laplacian_energy(each)) for each in (picture, *blurred)]
    slopes = [float(spectral_slope(each)) for each in (picture, *blurred)]
    assert energies == sorted(energies, reverse=True) and slopes == sorted(slopes, reverse=True)
    assert energies[1] < 0.6 * energies[0]


def test_chroma_is_the_largest_less_the_smallest_of_the_three() -> None:
    """Pure red has 1, half of it 0.5, grey 0, and a picture the mean over its pixels."""
    colours = torch.tensor([[1.0, -1, -1], [0.5, -0.5, 0.0], [0.3, 0.3, 0.3]])
    assert chroma(colours[:, :, None, None].expand(3, 3, 2, 4)).tolist() == pytest.approx([1.0, 0.5, 0.0])
    assert chroma(colours.T[None, :, None]).tolist() == pytest.approx([0.5])


def test_chroma_does_not_see_brightness_and_clipping_is_counted_by_picture() -> None:
    pictures = 0.3 * normal(3, 3, 8, 8).clamp(-1, 1)
    assert chroma(pictures + 0.2).tolist() == pytest.approx(chroma(pictures).tolist())
    grey = pictures.mean(1, keepdim=True)
    assert chroma(grey + 2 * (pictures - grey)).tolist() == pytest.approx((2 * chroma(pictures)).tolist())
    pictures[1, 0, :2] = 1.0  # 2 of 8 rows of one of three channels
    pictures[2] = -1.0
    assert clipped_shares(pictures).tolist() == pytest.approx([0, 2 / 8 / 3, 1])


def test_rms_is_that_of_each_row_also_of_small_differences() -> None:
    a, b = normal(4, 3, 8, 8), normal(4, 3, 8, 8, seed=1)
    assert rms(a, b).tolist() == pytest.approx(
        [float((x - y).square().mean().sqrt()) for x, y in zip(a, b, strict=True)]
    )
    assert rms(a.float(), a.float() + 1e-4).tolist() == pytest.approx([1e-4] * 4, rel=1e-2)


def test_diversity_at_length_1_does_not_depend_on_the_scale_and_ends_at_2() -> None:
    features = normal(8, 5)
    scaled = features * torch.linspace(1, 9, 8)[:, None]
    assert within_prompts(scaled, 4, unit=True).tolist() == pytest.approx(
        within_prompts(features, 4, unit=True).tolist()
    )
    assert within_prompts(torch.stack([features[0], -features[0]]), 2, unit=True).tolist() == pytest.approx(
        [2.0]
    )
    near = features[:1] + torch.tensor([[0.0], [1e-9]]) * features[1:2]
    assert within_prompts(near, 2).tolist() == pytest.approx([1e-9 * float(features[1].norm())], rel=1e-5)
    with pytest.raises(ValueError, match="5 pictures do not make prompts of 2"):
        within_prompts(features[:5], 2)


def test_brand_similarity_is_the_difference_of_mean_cosines() -> None:
    x, brand, control = normal(5, 6), normal(4, 6, seed=1) + 1, normal(7, 6, seed=2) + 3
    centre = control.mean(0)

    def cosine(a: Tensor, b: Tensor) -> float:
        return float(torch.cosine_similarity(a - centre, b - centre, dim=0))

    slow = [np.mean([cosine(a, b) for b in brand]) - np.mean([cosine(a, c) for c in control]) for a in x]
    assert brand_similarity(x, brand, control).tolist() == pytest.approx(slow)
    low, high = ends(brand, control)
    rows = range(len(brand))
    inside = [np.mean([cosine(brand[i], brand[j]) for j in rows if j != i]) for i in rows]
    across = np.mean([cosine(b, c) for b in brand for c in control])
    assert high == pytest.approx(np.mean(inside) - across)
    rows = range(len(control))
    own = [np.mean([cosine(control[i], control[j]) for j in rows if j != i]) for i in rows]
    assert low == pytest.approx(across - np.mean(own))
    with pytest.raises(ValueError, match="2 pictures or more, not 1 and 7"):
        ends(brand[:1], control)
    # Two a side are enough: the brand's at right angles, the control's opposite
    across = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]).double()
    assert ends(2 * torch.eye(2).double(), across) == pytest.approx((1.0, 0.0))


def test_without_the_centre_brand_similarity_would_see_nothing() -> None:
    """What all pictures share leaves every cosine near 1; taken off, the brand stands out."""
    shared = 100 * normal(16, seed=3)
    look = 2 * normal(16, seed=4)
    brand, control = (normal(20, 16, seed=s) + shared + e for s, e in ((5, look), (6, 0 * look)))
    ours = brand_similarity(normal(20, 16, seed=7) + shared + look, brand, control)
    others = brand_similarity(normal(20, 16, seed=8) + shared, brand, control)
    assert float(ours.min()) > float(others.max()) and float(ours.mean()) > 0.5
