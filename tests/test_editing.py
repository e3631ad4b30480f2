"""Edits: the loop against closed forms and diffusers, what is kept exactly, every refusal, the verb."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

import lcm_kit
from lcm_kit import sample
from lcm_kit.cli.main import app
from lcm_kit.core.editing import (
    Grey,
    Measure,
    Measured,
    Nothing,
    Outside,
    Pooled,
    Walk,
    agreeing_in_range,
    edited,
)  # fmt: skip
from lcm_kit.core.prediction import Predict
from lcm_kit.core.schedule import Schedule
from lcm_kit.drawing import editing
from lcm_kit.drawing.batches import Batches
from lcm_kit.drawing.canvas import Canvas, cells, feathered, filled, grown, meeting
from lcm_kit.drawing.noise import streams
from lcm_kit.errors import UserError
from lcm_kit.tiny import world
from tests.app_text import a1111
from tests.gaussians import BRAND, SD

PLAIN = Schedule.from_config(SD)


def drawn_noise(shape: tuple[int, ...], seed: int = 0) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(shape, generator=generator)


# -- The walk ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.3, 0.5, 0.8, 1.0])
@pytest.mark.parametrize(("sampler", "name"), [("lcm", "LCMScheduler"), ("tcd", "TCDScheduler")])
@pytest.mark.parametrize("steps", [1, 3, 4, 8])
def test_a_consistency_models_timesteps_are_those_of_diffusers(
    sampler: str, name: str, steps: int, strength: float
) -> None:
    import diffusers

    theirs = getattr(diffusers, name)(**SD)
    theirs.set_timesteps(steps, strength=strength)
    walk = Walk.of(PLAIN, sampler, steps, strength, 0.3)
    assert list(walk.points) == theirs.timesteps.tolist()
    assert walk.gamma == (None if sampler == "lcm" else 0.3)


def test_ddims_are_the_last_of_its_trailing_timesteps() -> None:
    """So that the steps of a PCM or progressive student begin where their phases do."""
    assert Walk.of(PLAIN, "ddim", 4, 1.0).points == (999, 749, 499, 249)
    assert Walk.of(PLAIN, "ddim", 4, 0.5).points == (499, 249)
    walk = Walk.of(PLAIN, "ddim", 4, 0.7)  # the nearest: three of four
    assert walk.points == (749, 499, 249) and walk.begins(PLAIN) == 0.75


@pytest.mark.parametrize(
    ("sampler", "steps", "strength", "words"),
    [
        ("ddim", 4, 0.1, "leaves none of ddim's 4 steps; give 0.25 or more"),
        ("lcm", 8, 0.1, "leaves 5 of the 50 timesteps .* steps are 8; give a strength of 0.16"),
        ("lcm", 4, 0.0, "above 0 and at most 1"),
        ("tcd", 4, 1.01, "above 0 and at most 1"),
        ("lcm", 4, math.nan, "above 0 and at most 1"),
    ],
)
def test_a_strength_that_leaves_too_few_steps_is_refused(
    sampler: str, steps: int, strength: float, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        Walk.of(PLAIN, sampler, steps, strength)


# -- The loop ------------------------------------------------------------------------------------------------


def consistent(schedule: Schedule) -> Predict:
    """The exact consistency function of the Gaussian BRAND: to the start of the trajectory, t = 0."""

    def predict(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        x0 = BRAND.flow(schedule, x, t, torch.zeros_like(t))
        alpha, sigma = schedule.at(t)
        return x0, (x - alpha * x0) / sigma

    return predict


def propagated(walk: Walk, known: float) -> tuple[Tensor, Tensor]:
    """Mean [2] and covariance [2, 2] of algorithm 4 on BRAND, in float64, written out by matrices.

    The first coordinate is known. Each jump is affine, x0 = alpha_0-scaled quantiles axis by axis of BRAND's
    frame; each put-back sets the first coordinate; each noising adds sigma^2 I.
    """
    mu, axes, spread = BRAND.frame(torch.float64)
    a, s = PLAIN.alpha.double(), PLAIN.sigma.double()
    keep = torch.tensor([0.0, 1.0], dtype=torch.float64)
    mean, cov = torch.tensor([known, 0.0], dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64)
    for t in walk.points:
        mean, cov = a[t] * mean, a[t] ** 2 * cov + s[t] ** 2 * torch.eye(2, dtype=torch.float64)
        ratio = ((a[0] ** 2 * spread + s[0] ** 2) / (a[t] ** 2 * spread + s[t] ** 2)).sqrt()
        jump = axes @ torch.diag(ratio) @ axes.T
        mean, cov = a[0] * mu + jump @ (mean - a[t] * mu), jump @ cov @ jump.T
        mean = mean * keep + torch.tensor([known, 0.0], dtype=torch.float64)
        cov = cov * keep * keep[:, None]
    return mean, cov


def inpainted(walk: Walk, known: float, count: int) -> Tensor:
    """The unknown coordinate of many draws, with the first known: [count]."""
    start = torch.tensor([known, 0.0]).view(1, 2, 1, 1)
    new = torch.tensor([False, True]).view(1, 2, 1, 1)
    x0 = edited(
        consistent(PLAIN), PLAIN, walk, start.expand(count, -1, -1, -1),
        drawn_noise((count, 2, 1, 1)), Outside(start, new),
    )  # fmt: skip
    assert bool((x0[:, 0] == known).all())  # exactly
    return x0[:, 1, 0, 0]


@pytest.mark.parametrize("steps", [1, 2, 4, 16])
def test_the_loop_is_algorithm_4_on_a_gaussian(steps: int) -> None:
    """Against mean and covariance carried from step to step by matrices, in float64."""
    walk = Walk.of(PLAIN, "lcm", steps, 1.0)
    found, count = inpainted(walk, 1.5, 40_000), 40_000
    mean, cov = propagated(walk, 1.5)
    deviation = float(cov[1, 1].sqrt())
    assert abs(float(found.mean()) - float(mean[1])) < 4 * deviation / count**0.5
    assert abs(float(found.std()) / deviation - 1) < 4 / (2 * count) ** 0.5


def test_with_many_steps_it_comes_near_the_conditional_of_the_data() -> None:
    """Of the Gaussian the conditional is known; one step knows hardly anything of it."""
    mu, axes, spread = BRAND.frame(torch.float64)
    cov = axes @ torch.diag(spread) @ axes.T
    for known in (-1.0, 2.5):
        truth = float(mu[1] + cov[1, 0] / cov[0, 0] * (known - mu[0]))
        one, many = (float(inpainted(Walk.of(PLAIN, "lcm", n, 1.0), known, 20_000).mean()) for n in (1, 50))
        assert abs(many - truth) < 0.35 * abs(one - truth), (one, many, truth)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_steps_that_land_on_the_way_keep_the_noise_of_what_is_known(gamma: float) -> None:
    """In the known coordinate x is alpha known + sigma noise at each step, with new noise as TCD has it."""
    seen: list[tuple[int, Tensor]] = []
    inner = consistent(PLAIN)

    def predict(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        seen.append((int(t[0]), x[:, 0, 0, 0].double()))
        return inner(x, t)

    sampler, count, known = "tcd" if gamma else "ddim", 20_000, 1.5
    walk = Walk.of(PLAIN, sampler, 4, 1.0, gamma)
    start = torch.tensor([known, 0.0]).view(1, 2, 1, 1)
    edited(
        predict, PLAIN, walk, start.expand(count, -1, -1, -1), drawn_noise((count, 2, 1, 1)),
        Outside(start, torch.tensor([False, True]).view(1, 2, 1, 1)),
    )  # fmt: skip
    noises = [(x - PLAIN.alpha[t].double() * known) / PLAIN.sigma[t].double() for t, x in seen]
    for (t, _), noise in zip(seen, noises, strict=True):
        assert abs(float(noise.std()) - 1) < 0.03 and abs(float(noise.mean())) < 0.03, t
    if gamma == 0:
        assert all(torch.allclose(noise, noises[0], atol=1e-3) for noise in noises)
    else:
        a, s = PLAIN.alpha.double(), PLAIN.sigma.double()
        for (_, before), (at, after) in zip(seen, seen[1:], strict=False):
            first, second = (noises[k] for k, (_, x) in enumerate(seen) if x is before or x is after)
            below = math.floor((1 - gamma) * at)
            share = float(a[at] / a[below] * s[below] / s[at])  # of the old noise in the new
            assert abs(float((first * second).mean()) - share) < 0.03


def test_nothing_known_and_everything_new_are_the_same() -> None:
    walk, shape = Walk.of(PLAIN, "lcm", 4, 1.0), (8, 2, 1, 1)
    start = torch.full(shape, 0.7)
    free = edited(consistent(PLAIN), PLAIN, walk, start, drawn_noise(shape), Nothing())
    new = edited(
        consistent(PLAIN), PLAIN, walk, start, drawn_noise(shape), Outside(start, torch.ones(1, 1, 1, 1) > 0)
    )
    old = edited(
        consistent(PLAIN), PLAIN, walk, start, drawn_noise(shape), Outside(start, torch.zeros(1, 1, 1, 1) > 0)
    )
    assert torch.equal(free, new) and not torch.equal(free, start) and torch.equal(old, start)


# -- What is measured ----------------------------------------------------------------------------------------

MEASURES: list[Measure] = [Grey(), Pooled(2), Pooled(4)]


def pixels_of(seed: int, wide: float = 1.0) -> Tensor:
    return (2 * torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(seed)) - 1) * wide


@pytest.mark.parametrize("measure", MEASURES, ids=repr)
def test_pixels_are_moved_to_a_measurement_within_their_range(measure: Measure) -> None:
    value, found = measure.of(pixels_of(1)), pixels_of(2, wide=1.8)
    moved = agreeing_in_range(measure, value, found)
    assert float(moved.abs().max()) <= 1 and torch.allclose(measure.of(moved), value, atol=1e-5)
    assert torch.allclose(agreeing_in_range(measure, value, moved), moved, atol=1e-5)  # what agrees stays


@pytest.mark.parametrize("measure", MEASURES, ids=repr)
def test_a_measurement_is_what_pictures_have(measure: Measure) -> None:
    """By Pillow: the greys of convert("L"), and the means of reduce."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8))
    own = measure.of(Canvas.of(picture, 8).pixels)
    if isinstance(measure, Pooled):
        small = picture.reduce(measure.side)
        theirs = torch.from_numpy(np.array(small, dtype=np.float32)).permute(2, 0, 1)
    else:
        theirs = torch.from_numpy(np.array(picture.convert("L"), dtype=np.float32))
    assert float((127.5 * (own[0] + 1) - theirs).abs().max()) <= 0.51


@pytest.mark.parametrize("measure", MEASURES, ids=repr)
def test_latents_are_moved_through_a_vae_and_stay_where_they_agree(measure: Measure) -> None:
    """With a linear one of no exact round trip: 0.9 of it is left."""
    value = measure.of(pixels_of(1, wide=0.4))
    known = Measured(measure, value, lambda x: x / 2, lambda p: 1.8 * p)
    latents = 2 * agreeing_in_range(measure, value, pixels_of(2, wide=0.3))
    assert torch.allclose(known.put_back(latents), latents, atol=1e-5)
    other = 2 * pixels_of(3, wide=0.3)
    off = (measure.of(other / 2) - value).abs().mean()
    assert (measure.of(known.put_back(other) / 2) - value).abs().mean() < 0.11 * off


# -- Canvases ------------------------------------------------------------------------------------------------


def test_a_soft_edge_lies_within_the_hole_and_thin_parts_are_shown() -> None:
    hole = torch.zeros(20, 40, dtype=torch.bool)
    hole[4:16, 5:25] = True
    hole[:, 32] = True  # a line of one pixel
    share = feathered(hole, 3)
    assert bool((share[~hole] == 0).all()) and float(share.max()) == 1
    assert share[10, 5:10].tolist() == pytest.approx([0.25, 0.5, 0.75, 1, 1])
    assert bool((share[:, 32] == 1).all())
    assert torch.equal(feathered(hole, 0), hole.float())
    edge = torch.ones(8, 8, dtype=torch.bool)
    assert bool((feathered(edge, 3) == 1).all())  # beyond the picture nothing is kept


def test_what_is_drawn_meets_the_picture_and_nothing_shines_through() -> None:
    """Of a ramp drawn too bright by 0.3: exact at the edge's outer side, and its own where the edge ends."""
    ramp = torch.linspace(-0.5, 0.5, 40).expand(1, 3, 20, 40)
    hole = torch.zeros(20, 40, dtype=torch.bool)
    hole[4:16, 8:32] = True
    hidden = torch.where(hole, torch.full_like(ramp, 9.0), ramp)  # of which nothing may be seen
    made = meeting(hidden, ramp + 0.3, hole, 3)
    off = (made - ramp)[0, 0]
    torch.testing.assert_close(off[10, 8:13], torch.tensor([0.075, 0.15, 0.225, 0.3, 0.3]))
    assert float(off[~hole].abs().max()) < 1e-6 and float(off[hole].max()) < 0.3 + 1e-6
    assert torch.equal(meeting(hidden, ramp + 0.3, hole, 0)[..., hole], (ramp + 0.3)[..., hole])
    everything = torch.ones_like(hole)
    assert torch.equal(meeting(hidden, ramp, everything, 3), ramp)
    several = torch.cat([ramp + 0.3, ramp - 0.1])
    wanted = torch.cat([made, meeting(hidden, ramp - 0.1, hole, 3)])
    torch.testing.assert_close(meeting(hidden, several, hole, 3), wanted)


@pytest.mark.parametrize("feather", [1, 2, 3, 4, 7, 30])
def test_the_soft_edge_of_any_hole_is_its_distance_over_the_largest_one_near(feather: int) -> None:
    """By its words, pixel by pixel: how deep it lies, by that of the deepest within the same reach."""
    random = torch.Generator().manual_seed(feather)
    for share in (0.5, 0.95, 0.999):
        hole = torch.rand(17, 23, generator=random) < share
        places = torch.cartesian_prod(torch.arange(17), torch.arange(23))
        apart = (places[:, None] - places[None]).abs().amax(-1)  # in pixels, diagonals are one
        outside = apart[:, ~hole.flatten()]
        far = torch.full((len(places),), feather + 1)
        depth = outside.amin(1).clamp(max=feather + 1) if outside.shape[1] else far
        near = (apart <= feather).float() * depth
        wanted = (depth / near.amax(1).clamp_min(1)).view(17, 23)
        assert torch.allclose(feathered(hole, feather), wanted.where(hole, 0.0))


def test_a_cell_of_the_latents_is_new_if_one_of_its_pixels_is() -> None:
    hole = torch.zeros(8, 12, dtype=torch.bool)
    hole[3, 4] = hole[7, 11] = True
    assert cells(hole, 4)[0, 0].int().tolist() == [[0, 1, 0], [0, 0, 1]]


def test_a_filling_sees_nothing_of_what_it_replaces() -> None:
    pixels = pixels_of(1)[:1]
    hole = torch.zeros(16, 24, dtype=torch.bool)
    hole[3:14, 4:20] = True
    other = torch.where(hole, pixels_of(2)[:1], pixels)
    assert torch.equal(filled(pixels, hole), filled(other, hole))
    assert torch.equal(filled(pixels, hole)[..., ~hole], pixels[..., ~hole])
    assert torch.equal(filled(torch.full_like(pixels, 0.3), hole), torch.full_like(pixels, 0.3))
    assert not filled(pixels, hole >= 0).any()  # all of it: grey


def test_a_grown_picture_and_its_mask() -> None:
    picture = Image.new("RGB", (5, 4), "red")
    larger, mask = grown(picture, 1, 2, 3, 0)
    assert larger.size == mask.size == (9, 6) and larger.crop((1, 2, 6, 6)).tobytes() == picture.tobytes()
    assert np.array(mask).sum() == 255 * (9 * 6 - 5 * 4) and not np.array(mask)[2:6, 1:6].any()


# -- With a pipeline -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipe(sd_base: Callable[..., Path]) -> Any:
    return sample.pipeline(str(sd_base("epsilon")))


@pytest.fixture
def base(sd_base: Callable[..., Path]) -> str:
    return str(sd_base("epsilon"))


def picture_of(seed: int, size: tuple[int, int] = (64, 64)) -> Image.Image:
    """Smooth random colours."""
    small = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def box(size: tuple[int, int], inside: tuple[int, int, int, int]) -> Image.Image:
    mask = Image.new("L", size)
    mask.paste(255, inside)
    return mask


def pixels(picture: Image.Image) -> Any:
    return np.array(picture).astype(int)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize(("sampler", "gamma"), [("lcm", 0.0), ("ddim", 0.0), ("tcd:1", 1.0)])
def test_with_nothing_known_it_draws_what_sampling_draws(
    pipe: Any, sampler: str, gamma: float, guidance: float
) -> None:
    """diffusers' own pipeline and scheduler, from the same noise.

    TCD's scheduler ends at t = 0, which has a noise of 3%; an edit ends at x0.
    """
    prompts = ["a cat", "a dog"]
    theirs = sample.latents(pipe, prompts, sampler=sampler, steps=4, guidance_scale=guidance, seed=7)
    found: list[Tensor] = []
    walk = Walk.of(PLAIN, sampler.partition(":")[0], 4, 1.0, gamma)
    edit = editing.Edit(
        (64, 64), prompts, None, [0, 1], between=(0.0, 1.0),
        finish=lambda drawn: found.append(drawn) or [],  # type: ignore[func-returns-value]
    )  # fmt: skip
    list(editing.drawn(pipe, edit, editing.Settings(walk, guidance, None, 7), Batches(2, "", "")))
    theirs = editing.decode(pipe, theirs)
    distance = (found[0] - theirs).square().mean().sqrt() / theirs.std()
    assert float(distance) < (0.1 if sampler == "tcd:1" else 1e-4)


def test_everything_outside_the_mask_stays_and_what_was_under_it_is_not_seen(base: str) -> None:
    """Of a picture of odd size, which is padded and cut back; in every sampler that edits."""
    picture = picture_of(1, (61, 50))
    mask = box((61, 50), (20, 10, 45, 37))
    white = np.array(mask) > 0
    hidden = picture.copy()
    hidden.paste(picture_of(2), (20, 10), box((61, 50), (0, 0, 25, 27)).crop((0, 0, 64, 64)))
    hidden = Image.composite(picture_of(2, (61, 50)), picture, mask)
    for sampler in ("lcm", "tcd", "ddim"):
        how: dict[str, Any] = {"base": base, "steps": 2, "sampler": sampler, "device": "cpu"}
        one, two = (lcm_kit.edit("inpaint", each, "a cat", mask=mask, **how)[0] for each in (picture, hidden))
        assert one.size == (61, 50) and (pixels(one) == pixels(picture))[~white].all()
        assert (pixels(one) != pixels(picture))[white].mean() > 0.5
        assert one.tobytes() == two.tobytes()
    seen = [
        lcm_kit.edit("inpaint", each, "a cat", mask=mask, base=base, steps=2, strength=0.5, device="cpu")[0]
        for each in (picture, hidden)
    ]
    assert seen[0].tobytes() != seen[1].tobytes()  # below 1 it is


def test_transparency_is_a_mask(base: str) -> None:
    picture, mask = picture_of(1), box((64, 64), (20, 10, 45, 37))
    with_alpha = picture.copy()
    with_alpha.putalpha(Image.fromarray(255 - np.array(mask)))
    how: dict[str, Any] = {"base": base, "steps": 1, "device": "cpu"}
    one = lcm_kit.edit("inpaint", with_alpha, "a cat", **how)[0]
    assert one.tobytes() == lcm_kit.edit("inpaint", picture, "a cat", mask=mask, **how)[0].tobytes()


def test_a_mask_of_everything_is_a_picture_of_its_own(base: str) -> None:
    how: dict[str, Any] = {"base": base, "steps": 2, "device": "cpu", "mask": Image.new("L", (64, 64), 255)}
    one, two = (lcm_kit.edit("inpaint", picture_of(seed), "a cat", **how)[0] for seed in (1, 2))
    assert one.tobytes() == two.tobytes()


def test_outpainting_keeps_the_picture(base: str) -> None:
    picture = picture_of(3, (40, 40))
    made = lcm_kit.edit("outpaint", picture, "a cat", grow=(10, 0, 3, 7), base=base, steps=2, device="cpu")[0]
    assert made.size == (53, 47) and made.crop((10, 0, 50, 40)).tobytes() == picture.tobytes()
    around = np.ones((47, 53), dtype=bool)
    around[:40, 10:50] = False
    assert pixels(made)[around].std() > 1


def test_colours_keep_the_greys_and_larger_pictures_the_means(base: str) -> None:
    """To the rounding of 8 bits, in pictures of odd sizes; and something is drawn."""
    how: dict[str, Any] = {"base": base, "steps": 2, "device": "cpu"}
    picture = picture_of(4, (61, 50))
    made = lcm_kit.edit("colorize", picture, "a cat", **how)[0]
    assert made.size == (61, 50)
    assert abs(pixels(made.convert("L")) - pixels(picture.convert("L"))).max() <= 1
    assert np.ptp(pixels(made), axis=2).mean() > 1  # not grey
    small = picture_of(5, (15, 13))
    large = lcm_kit.edit("upscale", small, "a cat", scale=3, strength=0.8, **how)[0]
    assert large.size == (45, 39)
    means = pixels(large).reshape(13, 3, 15, 3, 3).mean((1, 3))
    assert abs(means - pixels(small)).max() <= 0.51
    assert (pixels(large) != pixels(small.resize((45, 39), Image.Resampling.NEAREST))).mean() > 0.3


PROMPT = "a large cat on a dotted red background"
TINY: dict[str, Any] = {"base": "asset:tiny-sd", "adapter": "asset:tiny-lcm-lora", "device": "cpu"}


def test_less_strength_stays_nearer() -> None:
    """With models that have learned something."""
    picture = world.render(world.Scene("fox", "blue", "striped"))
    how: dict[str, Any] = {**TINY, "steps": 2, "sampler": "lcm"}
    far = [
        abs(pixels(lcm_kit.edit("sketch", picture, PROMPT, strength=s, **how)[0]) - pixels(picture)).mean()
        for s in (0.1, 0.5, 1.0)
    ]
    assert far[0] < far[1] < far[2]
    one, two = (lcm_kit.edit(task, picture, strength=0.4, **how)[0] for task in ("sketch", "vary"))
    assert one.tobytes() == two.tobytes()  # they differ in what they begin with


def near(a: list[Image.Image], b: list[Image.Image]) -> bool:
    return len(a) == len(b) and all(abs(pixels(x) - pixels(y)).max() <= 1 for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("sampler", ["lcm", "tcd", "ddim"])
def test_no_batching_changes_a_picture(base: str, sampler: str) -> None:
    how: dict[str, Any] = {"base": base, "steps": 2, "sampler": sampler, "device": "cpu", "seed": 5}
    picture, mask = picture_of(7), box((64, 64), (16, 16, 48, 48))
    three, ones = (
        lcm_kit.edit("inpaint", picture, "a cat", mask=mask, count=3, batch_size=n, **how) for n in (3, 1)
    )
    assert near(three, ones) and near(three[:1], lcm_kit.edit("inpaint", picture, "a cat", mask=mask, **how))
    assert not near(three[:1], three[1:2])


def test_frames_go_from_one_picture_to_another() -> None:
    a, b = (world.render(world.Scene(*each)) for each in (("fox", "blue", "plain"), ("cat", "red", "plain")))
    how: dict[str, Any] = {**TINY, "to": b, "frames": 5, "strength": 0.3, "prompt_to": PROMPT}
    made, alone = (
        lcm_kit.edit("interpolate", a, "a large fox on a plain blue background", batch_size=n, **how)
        for n in (3, 1)
    )
    assert near(made, alone) and made[0].tobytes() == a.tobytes() and made[-1].tobytes() == b.tobytes()
    to_a = [abs(pixels(each) - pixels(a)).mean() for each in made]
    to_b = [abs(pixels(each) - pixels(b)).mean() for each in made]
    assert to_a == sorted(to_a) and to_b == sorted(to_b, reverse=True)


def test_frames_go_from_one_prompt_to_another(base: str) -> None:
    """The first and the last are the pictures that `sample` draws of them, from the noise of picture 0."""
    how: dict[str, Any] = {"base": base, "steps": 2, "device": "cpu", "seed": 4}
    made = lcm_kit.edit("interpolate", None, "a cat", prompt_to="a dog on the moon", frames=3, **how)
    ends = [lcm_kit.sample_images(text, **how)[0] for text in ("a cat", "a dog on the moon")]
    assert len(made) == 3 and near([made[0], made[-1]], ends) and not near(made[1:2], ends[:1])


def test_a_spherical_path_keeps_the_length() -> None:
    a, b = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).split(2, 1)
    a, b = a / a.norm(), 3 * b / b.norm()
    assert torch.allclose(editing.spherical(a, b, 0.0), a, atol=1e-6)
    assert torch.allclose(editing.spherical(a, b, 1.0), b, atol=1e-6)
    for part in (0.25, 0.5):
        assert float(editing.spherical(a, b, part).norm()) == pytest.approx(1 + 2 * part, rel=1e-4)
    assert (
        torch.allclose(editing.spherical(a, 2 * a, 0.5), 1.5 * a)
        and not editing.spherical(0 * a, 0 * b, 0.5).any()
    )


def test_sdxl_is_told_sizes(sdxl_base: Path) -> None:
    """Two text encoders, pooled text and sizes: what its own pipeline is told, so that pictures are equal."""
    pipe = sample.pipeline(str(sdxl_base))
    theirs = sample.sample(pipe, ["a cat"], sampler="lcm", steps=2, seed=3)
    edit = editing.between_prompts((64, 64), ["a cat", "a dog"], 2)
    how = editing.Settings(Walk.of(editing.schedule_of(pipe), "lcm", 2, 1.0), seed=3)
    ((first, _),) = editing.drawn(pipe, edit, how, Batches(2, "", ""))
    assert near([first], sample.to_pil(theirs))


# -- Refusals ------------------------------------------------------------------------------------------------


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No weights may be loaded."""
    monkeypatch.setattr(sample, "pipeline", lambda *a, **k: pytest.fail("weights were loaded"))
    yield


def alpha_of(value: int) -> Image.Image:
    picture = picture_of(1)
    picture.putalpha(value)
    return picture


def animated(folder: Path) -> Path:
    frames = [picture_of(k) for k in range(3)]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    return folder / "moving.gif"


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("inpant", {}, "task 'inpant' is unknown; choose one of inpaint, outpaint"),
    ("inpaint", {"picture": None}, "inpaint needs a picture"),
    ("inpaint", {}, "needs to know what to draw; give --mask"),
    ("inpaint", {"mask": Image.new("L", (64, 64))}, "the mask is black all over"),
    ("inpaint", {"mask": Image.new("L", (32, 64), 255)}, "has 32 x 64 pixels and the picture 64 x 64"),
    ("inpaint", {"picture": alpha_of(200)}, "nothing of the picture is transparent"),
    ("inpaint", {"mask": Image.new("L", (64, 64), 255), "feather": -1}, "feather -1 is out of range"),
    ("inpaint", {"mask": Image.new("L", (64, 64), 255), "strength": 1.5}, "strength 1.5 is out of range"),
    ("colorize", {"mask": Image.new("L", (64, 64), 255)}, r"--mask \(mask\) is of inpaint, and does"),
    ("vary", {"feather": 2}, r"--feather \(feather\) is of inpaint and outpaint"),
    ("sketch", {"prompt_to": "b"}, r"--prompt-to \(prompt_to\) is of interpolate"),
    ("outpaint", {}, "give the pixels to add at the left, top, right and bottom"),
    ("outpaint", {"grow": (0, 0, 0, 0)}, "at least one of them above 0"),
    ("outpaint", {"grow": (-1, 0, 0, 4)}, "grow .* is impossible"),
    ("outpaint", {"grow": (8000, 0, 8000, 4)}, "more than the 8192 a side"),
    ("upscale", {"scale": 1}, "scale 1 is out of range"),
    ("upscale", {"scale": 8, "picture": Image.new("RGB", (1200, 8))}, "9600 x 64 pixels is more than"),
    ("interpolate", {}, "goes between two pictures; give both"),
    ("interpolate", {"picture": None}, "needs two ends"),
    ("interpolate", {"to": picture_of(2, (64, 32))}, "are of 64 x 64 and 64 x 32 pixels"),
    ("interpolate", {"to": picture_of(2), "frames": 2}, "frames 2 are the two pictures themselves"),
    ("interpolate", {"to": picture_of(2), "count": 2}, "count 2 does nothing for interpolate"),
    ("vary", {"sampler": "dpmpp_2m"}, "sampler dpmpp_2m cannot edit: .* choose lcm, tcd or ddim"),
    ("vary", {"sampler": "lcm:399"}, "draws from pure noise alone and cannot edit"),
    ("vary", {"steps": 8, "strength": 0.1, "sampler": "lcm"}, "leaves 5 of the 50 timesteps"),
    ("vary", {"negative_prompt": "red"}, "a negative prompt does nothing without guidance"),
    ("vary", {"picture": picture_of(1).convert("CMYK")}, "picture: its colours are CMYK"),
    ("vary", {"picture": "there/is/none.png"}, "none.png"),
]  # fmt: skip


@pytest.mark.parametrize(("task", "given", "words"), REFUSED, ids=lambda value: str(value)[:30])
def test_what_cannot_be_is_a_sentence_before_weights(
    base: str, unloaded: None, task: Any, given: dict[str, Any], words: str
) -> None:
    own = {"picture": picture_of(1), "prompt": "a cat", "base": base, "device": "cpu", **given}
    with pytest.raises(UserError, match=words):
        lcm_kit.edit(task, own.pop("picture"), own.pop("prompt"), **own)


def test_files_that_are_no_pictures_are_named(base: str, unloaded: None, tmp_path: Path) -> None:
    (tmp_path / "page.png").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    with pytest.raises(UserError, match=r"picture .*page\.png: unreadable image: an SVG file"):
        lcm_kit.edit("vary", tmp_path / "page.png", base=base)
    with pytest.raises(UserError, match=r"picture .*moving\.gif: it has 3 frames; give one"):
        lcm_kit.edit("vary", animated(tmp_path), base=base)
    with pytest.raises(UserError, match=r"mask .*page\.png: unreadable image"):
        lcm_kit.edit("inpaint", picture_of(1), mask=tmp_path / "page.png", base=base)


def students(monkeypatch: pytest.MonkeyPatch, method: Any) -> None:
    """The LoRA was made by `method`; nothing else of it is looked at."""
    from lcm_kit.api import pictures
    from lcm_kit.core.methods import MethodInfo
    from lcm_kit.evaluation import recommended
    from lcm_kit.lora import locate

    monkeypatch.setattr(pictures, "_require_a_pair", lambda *pair: Path("lora.safetensors"))
    monkeypatch.setattr(locate, "adapter_file", lambda adapter: Path("lora.safetensors"))
    monkeypatch.setattr(recommended, "of_adapter", lambda adapter, file: None)
    monkeypatch.setattr(recommended, "method_of", lambda file: MethodInfo.of(method, method.name))


@pytest.mark.parametrize("sampler", ["lcm", "tcd", "ddim"])
@pytest.mark.parametrize("name", ["lcm", "tcd", "pcm", "progressive", "dmd"])
def test_students_edit_with_what_they_were_made_for(
    base: str, monkeypatch: pytest.MonkeyPatch, name: str, sampler: str
) -> None:
    """LCM and TCD jump to x0 from anywhere; the others go by their own steps, without new noise."""
    from lcm_kit.api.editing import settled
    from lcm_kit.core.methods import METHODS
    from lcm_kit.edits.options import checked

    students(monkeypatch, METHODS[name]())
    wanted = checked("vary", picture_of(1))
    if name in ("lcm", "tcd") or sampler == "ddim":
        how = settled(wanted, "a cat", adapter="lora.safetensors", base=base, sampler=sampler, emphasis=None)
        assert how.settings["sampler"] == sampler
    else:
        with pytest.raises(UserError, match=f"cannot edit with sampler {sampler}: .* choose ddim"):
            settled(wanted, "a cat", adapter="lora.safetensors", base=base, sampler=sampler)


def test_a_student_of_one_step_from_pure_noise_does_not_edit(
    base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lcm_kit.core.methods import DMD

    students(monkeypatch, DMD(steps=(1,), conditioning_timestep=399))
    with pytest.raises(UserError, match=r"lora\.safetensors cannot edit: .* one step from pure noise"):
        lcm_kit.edit("vary", picture_of(1), adapter="lora.safetensors", base=base, sampler="lcm")


def test_what_is_not_as_asked_is_said(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    how: dict[str, Any] = {"base": base, "device": "cpu", "verbose": True}
    lcm_kit.edit("vary", picture_of(1, (61, 50)), strength=0.4, sampler="ddim", steps=2, **how)
    said = " ".join(capsys.readouterr().err.split())
    assert "61 x 50 pixels are drawn as 64 x 56, multiples of 8, and cut back" in said
    assert "strength 0.4: begun at 0.5 with 1 of 2 steps, the nearest of those that ddim has" in said
    lcm_kit.edit("vary", picture_of(1, (136, 64)), steps=1, **how)
    assert "more than twice the 64" in " ".join(capsys.readouterr().err.split())


# -- The verb ------------------------------------------------------------------------------------------------


def cli(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def test_the_verb_from_files_to_files(base: str, tmp_path: Path) -> None:
    """A photograph on its side, and a mask with transparency."""
    picture, mask = picture_of(1, (64, 48)), Image.new("RGBA", (64, 48))
    mask.paste((255, 255, 255, 255), (8, 8, 40, 30))
    exif = Image.Exif()
    exif[0x0112] = 6  # it is to be turned by 90 degrees clockwise
    picture.rotate(90, expand=True).save(tmp_path / "photo.png", exif=exif)
    mask.save(tmp_path / "mask.png")
    done = cli(
        "edit", "inpaint", tmp_path / "photo.png", "--prompt", "a cat", "--mask", tmp_path / "mask.png",
        "--base", base, "--steps", "2", "--count", "2", "--device", "cpu", "--output", tmp_path / "out",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["000-inpaint.png", "001-inpaint.png", "contact-sheet.png"]
    outside = np.array(mask)[..., 3] == 0
    for name in names[:2]:
        with Image.open(tmp_path / "out" / name) as made:
            assert made.size == (64, 48) and (pixels(made) == pixels(picture))[outside].all()
            told = a1111(made.info["parameters"])
            assert told.prompt == "a cat" and told.fields["Denoising strength"] == "1"
            assert (told.fields["Size"], told.fields["Batch pos"]) == ("64x48", str(int(name[:3])))
            own = json.loads(made.info["lcm_kit"])["settings"]
            assert (own["task"], own["feather"], own["steps"]) == ("inpaint", None, 2)
    assert "contact-sheet.png" in done.output


def test_the_verb_takes_every_option(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lcm_kit.api import editing as front

    calls: list[Any] = []
    monkeypatch.setattr(front, "edit_to_folder", lambda *given, **_: calls.append(given) or Path("sheet.png"))
    picture_of(1).save(tmp_path / "a.png")
    done = cli(
        "edit", "outpaint", tmp_path / "a.png", "--grow", "8,0,16,4", "--feather", "3", "--strength", "0.9",
        "--base", base, "--sampler", "tcd:0.5", "--steps", "3", "--guidance", "2", "--negative", "red",
        "--seed", "9", "--weight", "0.5", "--batch-size", "2", "--dtype", "float16", "--tiling", "--compile",
    )  # fmt: skip
    assert done.output == "sheet.png\n", done.output
    wanted, how, output, signing, moving = calls[0]
    assert moving is None
    assert (wanted.grow, wanted.feather, wanted.strength) == ((8, 0, 16, 4), 3, 0.9)
    assert (output, signing, how.prompts) == (Path("edits"), None, [""])
    keys = ("sampler", "steps", "guidance_scale", "negative_prompt", "seed", "lora_weight", "batch_size")
    assert [how.settings[key] for key in keys] == ["tcd:0.5", 3, 2.0, "red", 9, 0.5, 2]
    assert (how.settings["dtype"], how.settings["tiling"], how.settings["compile"]) == (
        torch.float16, True, True,
    )  # fmt: skip
    cli("edit", "outpaint", tmp_path / "a.png", "--grow", "8", "--base", base, "--decoder", "my/tiny")
    assert calls[1][0].grow == (8, 8, 8, 8) and calls[1][1].settings["decoder"] == "my/tiny"
    for wrong in ("eight", "1,2", "1.5"):
        done = cli("edit", "outpaint", tmp_path / "a.png", "--grow", wrong, "--base", base)
        assert done.exit_code == 2 and "give one, or left,top,right,bottom" in " ".join(done.stderr.split())
    done = cli("edit", "upscale", tmp_path / "a.png", "--sign", "key.pem", "--base", base)
    assert done.exit_code == 2 and "--sign and --cert go together" in " ".join(done.stderr.split())


def test_noise_is_a_function_of_seed_number_and_step(pipe: Any) -> None:
    """The streams of `sample`, so that an edit's picture i has the noise of a drawn picture i."""
    walk = Walk.of(PLAIN, "lcm", 2, 1.0)
    found: list[Tensor] = []
    edit = editing.Edit(
        (64, 64), ["a cat"], None, [5], finish=lambda drawn: found.append(drawn) or []  # type: ignore[func-returns-value]
    )  # fmt: skip
    list(editing.drawn(pipe, edit, editing.Settings(walk, seed=2), Batches(1, "", "")))
    theirs = sample.latents(pipe, ["a cat"], sampler="lcm", steps=2, seed=2, first=5)
    assert torch.allclose(found[0], editing.decode(pipe, theirs), atol=1e-4)
    assert len(streams([(2, 5)])) == 1
