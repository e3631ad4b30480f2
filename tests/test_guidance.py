from __future__ import annotations

import pytest
import torch

from lcm_kit.core.guidance import guide, paper_w, sample_guidance
from lcm_kit.core.prediction import KINDS, from_x0_eps, to_x0_eps
from lcm_kit.core.schedule import Schedule
from tests.gaussians import SD


def outputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 4, 2, 2, generator=generator), torch.randn(3, 4, 2, 2, generator=generator)


def test_guidance_of_one_is_the_conditional_output_exactly() -> None:
    uncond, cond = outputs()
    assert torch.equal(guide(uncond, cond, 1.0), cond)
    assert torch.equal(guide(uncond, cond, torch.ones(3)), cond)


def test_the_convention_is_that_of_diffusers() -> None:
    uncond, cond = outputs()
    torch.testing.assert_close(guide(uncond, cond, 7.5), uncond + 7.5 * (cond - uncond), atol=5e-6, rtol=0)
    torch.testing.assert_close(guide(uncond, cond, 0.0), uncond, atol=1e-6, rtol=0)


def test_the_papers_w_is_one_less() -> None:
    """(1 + w) cond - w uncond, arXiv:2310.04378 eq. 14, is guidance_scale = 1 + w."""
    uncond, cond = outputs()
    assert paper_w(7.5) == 6.5
    torch.testing.assert_close(guide(uncond, cond, 7.5), 7.5 * cond - 6.5 * uncond, atol=5e-6, rtol=0)


def test_one_scale_a_sample() -> None:
    uncond, cond = outputs()
    scales = torch.tensor([1.0, 3.0, 8.0])
    together = guide(uncond, cond, scales)
    for i, scale in enumerate(scales.tolist()):
        assert torch.equal(together[i], guide(uncond[i : i + 1], cond[i : i + 1], scale)[0])


def test_half_precision_outputs_are_guided_in_float32() -> None:
    uncond, cond = (output.bfloat16() for output in outputs())
    assert torch.equal(guide(uncond, cond, 5.0), guide(uncond.float(), cond.float(), 5.0))


@pytest.mark.parametrize("kind", KINDS)
def test_guiding_raw_outputs_guides_x0(kind: str) -> None:
    schedule, t = Schedule.from_config(SD), torch.tensor([19, 499, 999])
    x = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(1))
    uncond, cond = outputs()
    x0 = [to_x0_eps(schedule, "v_prediction", output, x, t) for output in (uncond, cond)]
    raw = [from_x0_eps(schedule, kind, *pair, t) for pair in x0]
    guided, _ = to_x0_eps(schedule, kind, guide(raw[0], raw[1], 5.0), x, t)
    torch.testing.assert_close(guided, guide(x0[0][0], x0[1][0], 5.0), atol=2e-4, rtol=0)


def test_scales_are_drawn_from_the_interval() -> None:
    scales = sample_guidance(4000, 3.0, 8.0, torch.Generator().manual_seed(0))
    assert scales.shape == (4000,) and scales.dtype == torch.float32
    assert scales.min() >= 3.0 and scales.max() <= 8.0
    assert scales.mean().item() == pytest.approx(5.5, abs=0.1)
    assert scales.std().item() == pytest.approx(5 / 12**0.5, abs=0.05)
    assert torch.equal(scales, sample_guidance(4000, 3.0, 8.0, torch.Generator().manual_seed(0)))
    assert torch.equal(sample_guidance(2, 5.0, 5.0, torch.Generator()), torch.full((2,), 5.0))
