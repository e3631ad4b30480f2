"""Shapes and crops against a slow reference, and SDXL's numbers by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from lcm_kit.bases import inspect_base
from lcm_kit.bases.condition import Framing
from lcm_kit.config.data import Data, Shapes
from lcm_kit.data.buckets import Shaper, buckets, cut, nearest
from lcm_kit.data.crops import placed
from lcm_kit.data.transforms import to_shape
from lcm_kit.errors import UserError
from lcm_kit.families.sdxl import XL

SIZES = [
    (1920, 1080),
    (1080, 1920),
    (3000, 1000),
    (640, 640),
    (4000, 500),
    (333, 777),
    (1025, 1024),
    (97, 61),
]


def slow_nearest(size: tuple[int, int], shapes: list[tuple[int, int]]) -> tuple[int, int]:
    """By trying all: the least factor between the two ratios of the sides."""
    factors = {s: max(size[0] * s[1] / (size[1] * s[0]), size[1] * s[0] / (size[0] * s[1])) for s in shapes}
    least = min(factors.values())
    return next(s for s, factor in factors.items() if math.isclose(factor, least, rel_tol=1e-8))


@pytest.mark.parametrize(
    ("side", "multiple"), [(512, 64), (512, 8), (768, 64), (1024, 64), (64, 16), (256, 64)]
)
def test_shapes_have_about_one_area_and_are_multiples(side: int, multiple: int) -> None:
    found = buckets(side, multiple, 4.0)
    assert (side, side) in found and len(set(found)) == len(found)
    assert all(w % multiple == h % multiple == 0 for w, h in found)
    assert all(abs(w * h / side**2 - 1) <= 0.1 and max(w, h) <= 4 * min(w, h) for w, h in found)
    assert {(h, w) for w, h in found} == set(found)
    # of each width the height whose area is nearest, where that is near enough and not too long
    for width in range(multiple, side, multiple):
        heights = range(multiple, side**2 // multiple + multiple, multiple)
        height = min(heights, key=lambda h: abs(width * h / side**2 - 1))
        fits = abs(width * height / side**2 - 1) <= 0.1 and height <= 4 * width
        assert fits == any(w == width for w, _ in found) and (not fits or (width, height) in found)


def test_sdxl_has_its_own_list() -> None:
    shapes = XL.shapes[1024]
    assert len(shapes) == len(set(shapes)) == 41
    assert all(abs(w * h / 2**20 - 1) < 0.1 and w % 64 == h % 64 == 0 for w, h in shapes)
    for size, wanted in {
        (1920, 1080): (1344, 768), (1080, 1920): (768, 1344), (4000, 3000): (1152, 896), (3, 1): (1728, 576),
        (1, 4): (512, 2048),
    }.items():  # fmt: skip
        assert nearest(size, shapes) == wanted, size


@pytest.mark.parametrize("size", SIZES)
def test_the_nearest_shape_is_that_of_a_slow_search_and_nothing_is_stretched(size: tuple[int, int]) -> None:
    for side, multiple in ((512, 64), (64, 16), (1024, 8)):
        shapes = buckets(side, multiple, 4.0)
        target = nearest(size, shapes)
        assert target == slow_nearest(size, shapes)
        how = cut(size, target)
        across, down = how.resized[0] / size[0], how.resized[1] / size[1]
        # both sides by one factor, to within half a pixel of the longer one
        assert abs(how.resized[0] - size[0] * max(across, down)) <= 0.5 + 1e-9 or how.resized[0] == target[0]
        assert abs(how.resized[1] - size[1] * max(across, down)) <= 0.5 * max(1, size[1] / size[0]) + 1e-9
        assert how.resized[0] >= target[0] and how.resized[1] >= target[1]
        assert target[0] == how.resized[0] or target[1] == how.resized[1]


# original height, width; crop top, left; target height, width
BY_HAND = {
    (1920, 1080): Framing((1080, 1920), (0, 10), (768, 1344)),  # scaled to 1365 x 768: 21 are cut off
    (1080, 1920): Framing((1920, 1080), (10, 0), (1344, 768)),
    (4000, 3000): Framing((3000, 4000), (0, 21), (896, 1152)),  # 1195 x 896
    (1000, 1000): Framing((1000, 1000), (0, 0), (1024, 1024)),
    (5000, 1000): Framing((1000, 5000), (0, 256), (512, 2048)),  # 2560 x 512
}
MIRRORED = {
    (1920, 1080): (0, 11), (1080, 1920): (10, 0), (4000, 3000): (0, 22), (1000, 1000): (0, 0),
    (5000, 1000): (0, 256),
}  # fmt: skip


@pytest.mark.parametrize("size", BY_HAND)
def test_sdxls_numbers_by_hand(size: tuple[int, int]) -> None:
    how = cut(size, nearest(size, XL.shapes[1024]))
    assert how.framing() == BY_HAND[size]
    assert how.framing(mirrored=True).corner == MIRRORED[size]


def test_what_was_lost_and_by_how_much_it_was_scaled() -> None:
    how = cut((2000, 500), (128, 64))  # scaled to 256 x 64
    assert how.resized == (256, 64) and how.lost == 0.5 and how.scale == 64 / 500
    assert cut((32, 32), (64, 64)).scale == 2 and cut((32, 32), (64, 64)).lost == 0


def shaper(sd_base: Any, **shapes: Any) -> Shaper:
    base = inspect_base(str(sd_base()))
    return Shaper.of(base, Data(resolution=64, shapes=Shapes(**shapes)))


def test_small_pictures_are_scaled_up_kept_or_dropped(sd_base: Any) -> None:
    assert shaper(sd_base, multiple=8).target((40, 40)) == (64, 64)
    keep = shaper(sd_base, multiple=8, small="keep")
    assert keep.target((45, 41)) == (40, 40)
    assert keep.target((30, 300)) == (24, 120)  # no more than `longest` times as long as wide
    assert keep.target((640, 640)) == (64, 64)
    with pytest.raises(UserError, match="5 x 70 pixels are fewer than the .* and no 8 on each side"):
        keep.target((5, 70))
    with pytest.raises(UserError, match="45 x 41 pixels are fewer than the 64 x 64 .*small is drop"):
        shaper(sd_base, multiple=8, small="drop").target((45, 41))
    assert shaper(sd_base, kind="square", small="keep").target((50, 90)) == (48, 48)


def test_a_multiple_that_the_vae_cannot_have_is_refused(sd_base: Any) -> None:
    with pytest.raises(UserError, match="data.shapes.multiple 6 is not a multiple of 4"):
        shaper(sd_base, multiple=6)


def banner(left: int) -> Image.Image:
    """A wide picture with a red disc of 60 pixels at `left` on a grey ground."""
    image = Image.new("RGB", (600, 100), (120, 120, 120))
    ImageDraw.Draw(image).ellipse((left, 20, left + 60, 80), fill=(230, 20, 20))
    return image


@pytest.mark.parametrize("left", [0, 80, 270, 400, 540])
def test_a_crop_around_the_subject_holds_all_of_it(left: int) -> None:
    image = banner(left)
    how = placed("subject", cut(image.size, (100, 100)), image, None, "")
    pixels = np.asarray(to_shape(image, how))
    red = int((np.asarray(image)[..., 1] < 60).sum())
    assert how.target == (100, 100) and abs(int((pixels[..., 1] < 60).sum()) - red) <= 0.02 * red
    middle = left + 30
    assert abs(how.corner[0] + 50 - min(max(middle, 50), 550)) <= 6


def test_a_mask_says_where_the_subject_is() -> None:
    image = banner(0)
    mask = Image.new("L", image.size, 0)
    mask.paste(255, (500, 0, 600, 100))
    assert placed("subject", cut(image.size, (100, 100)), image, mask, "").corner == (500, 0)
    assert placed("", cut(image.size, (100, 100)), image, mask, "").corner == (250, 0)


def test_random_crops_are_each_pictures_own_and_spread_evenly() -> None:
    image, how = banner(0), cut((600, 100), (100, 100))
    corners = [placed(f"random {k}", how, image, None, "abc").corner[0] for k in range(200)]
    assert corners == [placed(f"random {k}", how, image, None, "abc").corner[0] for k in range(200)]
    assert abs(np.mean(corners) - 250) < 30 and min(corners) < 15 and max(corners) > 485
    assert (
        placed("random 1", how, image, None, "abd").corner
        != placed("random 1", how, image, None, "abc").corner
    )
