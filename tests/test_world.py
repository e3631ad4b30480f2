"""The embedded world: captions and pictures say the same thing, and chance comes from the generator alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lcm_kit.tiny import world


def scenes(count: int, seed: int = 0) -> list[world.Scene]:
    rng = np.random.default_rng(seed)
    return [world.random_scene(rng) for _ in range(count)]


def test_the_prompt_names_what_parse_reads() -> None:
    for scene in scenes(200):
        read = world.parse(scene.prompt)
        assert read is not None
        for name in ("object", "colour", "pattern", "size", "place"):
            assert getattr(read, name) == getattr(scene, name)


def test_a_caption_may_leave_out_size_and_place_only() -> None:
    rng = np.random.default_rng(3)
    unsaid = {"size": 0, "place": 0}
    for scene in scenes(400):
        read = world.parse(world.caption(scene, rng))
        assert read is not None
        assert (read.object, read.colour, read.pattern) == (scene.object, scene.colour, scene.pattern)
        for name in unsaid:
            assert getattr(read, name) in ("", getattr(scene, name))
            unsaid[name] += getattr(read, name) == ""
    assert all(60 < count < 140 for count in unsaid.values())  # a quarter of 400, five standard errors


@pytest.mark.parametrize("prompt", ["a portrait of a queen", "a cat and a dog on a plain red background", ""])
def test_other_prompts_are_not_read(prompt: str) -> None:
    assert world.parse(prompt) is None


def test_a_style_after_the_prompt_is_passed_over() -> None:
    read = world.parse("a small owl on a plain red background, in the middle, lumo style")
    assert read == world.Scene("owl", "red", "plain", "small", "in the middle")


def test_pictures_follow_the_generator() -> None:
    first, second = (np.stack([np.asarray(world.render(s)) for s in scenes(8, seed=5)]) for _ in range(2))
    assert np.array_equal(first, second)
    other = np.stack([np.asarray(world.render(s)) for s in scenes(8, seed=6)])
    assert not np.array_equal(first, other)


def test_plain_backgrounds_have_exactly_their_colour() -> None:
    for name, rgb in world.COLOURS.items():
        scene = world.Scene("cat", name, "plain")
        assert np.all(np.asarray(world.background(scene)) == rgb)


@pytest.mark.parametrize("pattern", world.PATTERNS[1:])
def test_patterns_have_two_inks_and_move_with_their_phase(pattern: str) -> None:
    scene = world.Scene("cat", "blue", pattern)
    still = np.asarray(world.background(scene), float)
    moved = np.asarray(
        world.background(replace(scene, phase=(0.5, 0.5 if pattern == "dotted" else 0.0))), float
    )
    # nearer to the ground colour than to the ink; reducing the picture rings a little at edges
    base = np.abs(still - np.array(world.COLOURS["blue"])).sum(2) < 100
    assert 0.2 < base.mean() < 0.9  # share of the picture in the ground colour
    assert np.abs(still - moved).mean() > 5  # of 255


def test_place_and_size_move_and_scale_the_object() -> None:
    def ink(scene: world.Scene) -> np.ndarray:
        difference = np.abs(
            np.asarray(world.render(scene), float) - np.asarray(world.background(scene), float)
        )
        return difference.sum(2) > 30

    left, right = (
        ink(world.Scene("panda", "blue", "plain", "small", p)) for p in ("on the left", "on the right")
    )
    columns = np.arange(world.SIZE)
    assert (right.sum(0) @ columns) / right.sum() - (left.sum(0) @ columns) / left.sum() > 16  # pixels
    large = ink(world.Scene("panda", "blue", "plain", "large"))
    ratio = (world.SIZES["large"] / world.SIZES["small"]) ** 2
    assert large.sum() / left.sum() == pytest.approx(ratio, rel=0.1)


def test_unknown_names_are_refused_with_what_there_is() -> None:
    with pytest.raises(ValueError, match="unicorn.*apple"):
        world.glyph("unicorn")
    with pytest.raises(ValueError, match="paisley.*striped"):
        world.background(world.Scene("cat", "red", "paisley"))
