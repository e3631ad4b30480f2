"""Masks become weights of latent cells, and what they leave out has no gradient in any loss."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lcm_kit.bases import inspect_base
from lcm_kit.config.data import Data, Masks, Shapes
from lcm_kit.config.schema import Base, Distill
from lcm_kit.core.losses import LOSSES
from lcm_kit.core.matching import Draws, fake_loss, matching_loss
from lcm_kit.core.methods import LCM
from lcm_kit.core.schedule import SD_BETAS, Schedule
from lcm_kit.core.solvers import SOLVERS
from lcm_kit.core.step import consistency_loss, diffusion_loss, weighed
from lcm_kit.data import cache as caches
from lcm_kit.data import masks
from lcm_kit.data.batches import Batches
from lcm_kit.data.buckets import cut
from lcm_kit.data.cache import Cache
from lcm_kit.data.images import encode
from lcm_kit.errors import UserError

FACTOR = 4  # of the small base


def half(size: tuple[int, int], left: float = 0.5) -> Image.Image:
    """White from `left` of the width on."""
    mask = Image.new("L", size, 0)
    mask.paste(255, (round(size[0] * left), 0, *size))
    return mask


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("background", [0.0, 0.25])
def test_a_cell_weighs_the_mean_of_the_mask_over_it(background: float, mirrored: bool) -> None:
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, 256, (48, 96), dtype=np.uint8)
    how = cut((96, 48), (64, 48), (1.0, 0.5))  # its right part, not scaled
    assert how.corner == (32, 0)
    found = masks.cells(Image.fromarray(drawn), how, FACTOR, background, mirrored)
    seen = drawn[:, 32:][:, ::-1] if mirrored else drawn[:, 32:]
    mean = seen.reshape(12, 4, 16, 4).mean(axis=(1, 3)) / 255
    wanted = 255 * (background + (1 - background) * mean)
    assert found.shape == (1, 12, 16) and found.dtype == torch.uint8
    assert np.abs(found[0].numpy() - wanted).max() <= 1.5  # rounded to whole numbers three times


def test_a_mask_of_fewer_pixels_is_laid_over_the_whole_picture() -> None:
    how = cut((1200, 600), (64, 32))
    large, small = (masks.cells(half(size), how, FACTOR, 0.0) for size in ((1200, 600), (120, 60)))
    assert torch.equal(large, small) and large[0, 0].tolist() == [0] * 8 + [255] * 8


LEFT = torch.tensor([[[[0.0, 0.0, 1.0, 1.0]] * 4]])  # the left half counts for nothing


@pytest.fixture
def rows() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {name: torch.randn(2, 4, 4, 4, generator=g) for name in ("x0", "noise", "x", "y")}


def assert_left_is_out(gradient: Tensor) -> None:
    assert (gradient[..., :2] == 0).all() and (gradient[..., 2:] != 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_masked_cells_get_no_gradient_and_whole_ones_what_they_had(name: str, rows: Any) -> None:
    def loss(a: Tensor, b: Tensor) -> Tensor:
        return LOSSES[name](a, b, 0.1)

    def gradient(weights: Tensor | None, other: Tensor = rows["y"]) -> Tensor:
        x = rows["x"].clone().requires_grad_()
        weighed(loss, weights)(x, other).sum().backward()
        return x.grad

    masked = gradient(LEFT)
    assert_left_is_out(masked)
    assert torch.equal(gradient(torch.ones_like(LEFT)), gradient(None))
    elsewhere = rows["y"] + 100 * (1 - LEFT)  # what is out may be anything
    assert torch.equal(gradient(LEFT, elsewhere), masked)


def test_a_weight_is_that_of_the_square(rows: Any) -> None:
    weights = torch.rand(1, 1, 4, 4, generator=torch.Generator().manual_seed(1)).expand(2, 1, 4, 4)
    found = weighed(lambda a, b: LOSSES["l2"](a, b, 0.0), weights)(rows["x"], rows["y"])
    wanted = ((rows["x"] - rows["y"]) ** 2 * weights).flatten(1).mean(1)
    torch.testing.assert_close(found, wanted)


class Linear:
    """A predictor whose x0 is given, with a gradient."""

    def __init__(self, x0: Tensor) -> None:
        self.x0 = x0.clone().requires_grad_()

    def __call__(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.x0, 0 * x


def test_no_gradient_where_denoising_consistency_and_distribution_are_masked(rows: Any) -> None:
    schedule = Schedule.from_config(SD_BETAS)
    t = torch.tensor([500, 500])
    square = weighed(lambda a, b: LOSSES["l2"](a, b, 0.0), LEFT.expand(2, 1, 4, 4))
    given = {"x0": rows["x0"], "noise": rows["noise"]}

    student = Linear(rows["x"])
    diffusion_loss(
        kind="sample", loss=square, schedule=schedule, student=student, t=t, **given
    ).sum().backward()
    assert_left_is_out(student.x0.grad)

    student, others = Linear(rows["x"]), Linear(rows["y"])
    method = LCM()
    times = method.times(schedule, 50, 2, torch.Generator().manual_seed(0))
    consistency_loss(
        method=method, solver=SOLVERS["ddim"], loss=square, schedule=schedule, teacher=others, target=others,
        student=student, times=times, **given,
    ).sum().backward()  # fmt: skip
    assert_left_is_out(student.x0.grad)

    x0 = rows["x"].clone().requires_grad_()
    matching_loss(x0, rows["y"], LEFT.expand(2, 1, 4, 4)).sum().backward()
    assert_left_is_out(x0.grad)
    torch.testing.assert_close(x0.grad[..., 2:], rows["y"][..., 2:] / x0[0].numel())

    fake = Linear(rows["x"])
    draws = Draws(1, 0, rows["noise"], rows["noise"][:, None, :0], t, rows["noise"])
    fake_loss(fake, schedule, rows["x0"], draws, square).sum().backward()
    assert_left_is_out(fake.x0.grad)


@pytest.fixture
def config(tmp_path: Path, sd_base: Callable[..., Path]) -> Callable[..., Distill]:
    """Four pictures: plain, with a mask file, with transparency, and wide with a mask file."""
    folder = tmp_path / "images"
    folder.mkdir()
    size = {"a": (64, 64), "b": (64, 64), "c": (64, 64), "d": (256, 64)}
    for name, each in size.items():
        image = Image.new("RGB", each, (90, 30, 200))
        if name == "c":
            image.putalpha(half(each, 0.75))
        image.save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"picture {name}")
    half(size["b"]).save(folder / "b.mask.png")
    half(size["d"], 0.75).save(folder / "d.mask.png")

    def build(**data: Any) -> Distill:
        where = {"path": str(folder), "cache": str(tmp_path / "cache"), "shard_size": 8}
        shapes = data.pop("shapes", Shapes(multiple=8))
        return Distill(
            recipe="train/distill", output="unused", base=Base(path=str(sd_base())),
            data=Data(**{**where, "shapes": shapes, **data}),
        )  # fmt: skip

    return build


def opened(config: Distill) -> Cache:
    encode(config, progress=False)
    return Cache.open(config.data.cache, base=inspect_base(config.base.path), data=config.data)


def columns(cache: Cache, row: int) -> list[float]:
    """The first row of a picture's weights."""
    found = cache.weights(row)
    assert found is not None and (found == found[:, :, :1]).all()
    return found[0, 0, 0].tolist()


def test_masks_and_transparency_of_a_folder(config: Callable[..., Distill]) -> None:
    cache = opened(config())
    assert cache.ids == ["a.png", "b.png", "c.png", "d.png"]
    assert [run.shape for run in cache.runs] == [(), (128, 32)]
    assert cache.weights([0]) is None and cache.weights([2, 0]) is None
    assert columns(cache, 1) == [0] * 8 + [1] * 8
    assert columns(cache, 3) == [0] * 24 + [1] * 8
    both = cache.weights([0, 1])
    assert both is not None and (both[0] == 1).all() and both[1].mean() == 0.5
    drawn = [Batches(cache, 2, 0).at(step) for step in range(12)]
    assert {tuple(batch.latents.shape[2:]) for batch in drawn} == {(16, 16), (8, 32)}
    assert any(batch.weights is not None for batch in drawn)

    alpha = opened(config(masks=Masks("alpha", 0.2)))
    assert columns(alpha, 2) == pytest.approx([0.2] * 12 + [1] * 4, abs=1e-3)
    assert columns(alpha, 1) == pytest.approx([0.2] * 8 + [1] * 8, abs=1e-3)
    assert alpha.weights(0) is None
    assert opened(config(masks=Masks("none"))).weights([0, 1, 2]) is None


def test_a_changed_mask_makes_its_shard_anew(config: Callable[..., Distill]) -> None:
    cache = opened(config())
    file = Path(config().data.path) / "b.mask.png"
    half((64, 64), 0.25).save(file)
    report = encode(config(), progress=False)
    assert report.encoded == 3 and report.changes == ["1 mask changed"]
    assert columns(opened(config()), 1) == [0] * 4 + [1] * 12
    assert columns(cache, 3) == [0] * 24 + [1] * 8


def test_a_mask_of_other_proportions_and_one_that_is_none(config: Callable[..., Distill]) -> None:
    folder = Path(config().data.path)
    half((64, 48)).save(folder / "b.mask.png")
    (folder / "d.mask.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    with pytest.raises(UserError) as caught:
        encode(config(), progress=False)
    text = str(caught.value)
    assert "2 of 4 records" in text
    assert "b.png: its mask has 64 x 48 pixels and it 64 x 64; draw the mask over the whole picture" in text
    assert "d.png: its mask: unreadable image" in text


def test_a_mirrored_picture_has_its_mask_mirrored(config: Callable[..., Distill]) -> None:
    cache = opened(config(flip=True))
    assert cache.ids[2:4] == ["b.png", "b.png (mirrored)"]
    assert columns(cache, 3) == columns(cache, 2)[::-1]


def test_which_caption_is_drawn_by_weight() -> None:
    shard = {
        "captions": torch.tensor([1, 3, 2]),
        "caption_weights": torch.tensor([1.0, 1.0, 2.0, 1.0, 0.5, 1.5]),
    }
    rows = torch.tensor([1] * 400 + [2] * 400 + [0])
    chances = [(k + 0.5) / 400 for k in range(400)] * 2 + [0.9]
    found = caches._chosen(shard, rows, chances)
    assert torch.bincount(found[:400], minlength=6).tolist() == [0, 100, 200, 100, 0, 0]
    assert torch.bincount(found[400:800], minlength=6).tolist() == [0, 0, 0, 0, 100, 300]
    assert found[-1] == 0
    assert caches._chosen(shard, torch.tensor([2, 0, 1]), [0.0] * 3, first=True).tolist() == [4, 0, 1]
