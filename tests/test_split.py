"""Which pictures are held out: whole pictures, none of them trained on under any name, chosen by content."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lcm_kit.data.split import split
from lcm_kit.errors import UserError


def cache(own: int, general: int = 0, mirrored: bool = False) -> Any:
    """Rows with ids and image hashes; the first general picture is also the brand's first."""
    ids = [f"{i}.png" for i in range(own)] + [f"regularisation/{i}.png" for i in range(general)]
    others = ["image 0", *(f"general {i}" for i in range(1, general))]
    images = [f"image {i}" for i in range(own)] + others[:general]
    if mirrored:
        ids = [name for id in ids for name in (id, f"{id} (mirrored)")]
        images = [image for image in images for _ in range(2)]
    return SimpleNamespace(
        ids=ids, images=images, latents=torch.tensor, condition=lambda index, chances: index
    )


@pytest.mark.parametrize("seed", range(8))
def test_no_row_that_is_trained_on_shows_a_held_out_picture(seed: int) -> None:
    whole = cache(20, general=5, mirrored=True)
    trained, held = split(whole, 0.3, seed)
    seen = {whole.images[row] for row in trained.rows}
    kept = [whole.images[row] for row in held.rows]
    assert len(kept) == len(set(kept)) == 6 and not seen & set(kept)
    assert not any("mirrored" in id or "regularization" in id for id in held.ids)
    assert seen | set(kept) == set(whole.images)
    dropped = 2 * 6 + 2 * ("image 0" in kept)  # the general copy of a held-out picture goes too
    assert len(trained) == len(whole.ids) - dropped


def test_the_share_is_rounded_and_at_least_one() -> None:
    assert [len(split(cache(n), 0.1, 0)[1]) for n in (2, 10, 14, 16, 100)] == [1, 1, 1, 2, 10]
    trained, held = split(cache(7), 0.0, 0)
    assert (list(trained.rows), len(held)) == (list(range(7)), 0)


def test_the_choice_is_the_seeds_and_a_set_that_grows_keeps_most_of_it() -> None:
    chosen = {seed: split(cache(50), 0.2, seed)[1].ids for seed in range(3)}
    assert chosen[0] == split(cache(50), 0.2, 0)[1].ids and chosen[0] != chosen[1] != chosen[2]
    grown = split(cache(52), 0.2, 0)[1].ids
    assert len(set(grown) & set(chosen[0])) >= 8


def test_rows_are_those_of_the_cache() -> None:
    trained, held = split(cache(6), 0.2, 3)
    assert trained.latents([0, 4]).tolist() == [trained.rows[0], trained.rows[4]]
    assert held.condition([0]) == [held.rows[0]] and held.ids == [f"{held.rows[0]}.png"]


def test_a_single_picture_cannot_be_held_out() -> None:
    with pytest.raises(UserError, match="held_out 0.1 keeps 1 of 1 pictures"):
        split(cache(1, general=4), 0.1, 0)


def test_what_is_left_out_is_not_trained_on_and_general_pictures_stay() -> None:
    whole = cache(20, general=5, mirrored=True)
    left = {"image 0", "image 3", "general 1", "of another set"}
    trained, held = split(whole, 0.3, 1, left)
    seen, kept = {whole.images[row] for row in trained.rows}, {whole.images[row] for row in held.rows}
    assert kept == {whole.images[row] for row in split(whole, 0.3, 1)[1].rows}  # the choice is as without
    assert not seen & (kept | {"image 0", "image 3"}) and "general 1" in seen
    assert len(seen) == len(set(whole.images)) - len(kept | {"image 0", "image 3"})
    with pytest.raises(UserError, match=r"held_out 0.0 with data.leave_out keeps 2 of 2 pictures"):
        split(cache(2), 0.0, 0, {"image 0", "image 1"})
