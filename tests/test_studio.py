"""What the VAE is trained on beside the world: any colours, fine detail, and no shipped style's picture."""

from __future__ import annotations

import numpy as np
import pytest

from lcm_kit.tiny import studio, world


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    rng = np.random.default_rng(3)
    return np.stack([np.asarray(studio.studio_picture(rng), float) for _ in range(150)])


def test_pictures_follow_the_generator(pictures: np.ndarray) -> None:
    rng = np.random.default_rng(3)
    again = np.stack([np.asarray(studio.studio_picture(rng), float) for _ in range(5)])
    assert np.array_equal(again, pictures[:5]) and pictures.shape[1:] == (world.SIZE, world.SIZE, 3)


def test_their_colours_fill_the_cube_that_the_world_leaves_empty(pictures: np.ndarray) -> None:
    def cells(colours: np.ndarray) -> set[tuple[int, ...]]:
        """Which of the 4 x 4 x 4 cells of the RGB cube there are."""
        return {tuple(cell) for cell in (colours // 64).astype(int).reshape(-1, 3)}

    grounds = cells(np.array(list(world.COLOURS.values()), float))
    middles = cells(np.median(pictures, axis=(1, 2)))
    assert len(grounds) <= 8 and len(middles) >= 32


def test_many_have_detail_of_two_pixels_and_some_have_none(pictures: np.ndarray) -> None:
    fine = np.abs(np.diff(pictures, axis=2)).mean((1, 2, 3))  # of 255, from a pixel to the next
    assert np.mean(fine > 8) > 0.25 and np.mean(fine < 2) > 0.05
