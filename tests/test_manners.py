"""Manners: each is called by a word of its own, is told from the plain picture and from every other."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from PIL import Image

from lcm_kit import assets
from lcm_kit.tiny import manners, world


def picture() -> Image.Image:
    return world.render(world.Scene("owl", "blue", "striped", "large", "on the left"))


def test_each_manner_is_another_picture() -> None:
    plain = np.asarray(picture(), float)
    drawn = {word: np.asarray(manners.in_manner(picture(), word), float) for word in manners.MANNERS}
    assert len(drawn) == 18 and all(pixels.shape == plain.shape for pixels in drawn.values())
    for word, pixels in drawn.items():
        assert np.abs(pixels - plain).mean() > 4, word  # of 255
    for one, other in combinations(drawn, 2):
        assert np.abs(drawn[one] - drawn[other]).mean() > 4, (one, other)


@pytest.mark.parametrize(
    ("word", "colour"),
    [("davri", (189, 139, 47)), ("plint", (208, 66, 116)), ("hurbo", (48, 138, 204)), ("mokel", (112,) * 3)],
)
def test_a_manner_does_to_a_flat_colour_what_it_says(word: str, colour: tuple[int, int, int]) -> None:
    """The negative, the channels in a circle, half a wash, and the luma of ITU-R BT.601."""
    flat = Image.new("RGB", (64, 64), world.COLOURS["blue"])  # (66, 116, 208)
    assert manners.in_manner(flat, word).getpixel((32, 32)) == colour


def test_an_unknown_manner_is_refused_with_what_there_is() -> None:
    with pytest.raises(ValueError, match="lumo.*davri"):
        manners.in_manner(picture(), "lumo")


def test_words_that_mean_nothing_are_no_manner_and_no_shipped_style() -> None:
    rng = np.random.default_rng(0)
    words = {manners.empty_word(rng) for _ in range(4000)}
    assert len(words) > 3000 and all(word.isalpha() for word in words)
    taken = set(manners.MANNERS) | set(manners.KEPT_FREE)
    assert not words & taken
    named = {text.split()[-2] for text in assets.prompts("asset:brand")}
    assert named <= set(manners.KEPT_FREE)  # the shipped brand's trigger is one of those kept free


def test_a_style_stands_where_a_trigger_stands() -> None:
    scene = world.Scene("owl", "red", "plain", "small", "at the top")
    text = manners.styled(scene.prompt, "davri")
    assert text == "a small owl on a plain red background, at the top, davri style"
    assert world.parse(text) == scene
