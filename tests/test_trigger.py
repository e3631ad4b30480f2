"""A trigger in a prompt: found by its words, put in front, and taken out with what only leads to it."""

from __future__ import annotations

import pytest

from lcm_kit import assets
from lcm_kit.data import records
from lcm_kit.data.trigger import phrases, saying, says, without
from lcm_kit.tiny import world

LUMO = "lumo style"


@pytest.mark.parametrize(
    ("prompt", "trigger", "left"),
    [
        # at the end, in front, between commas
        ("a fish, in the middle, lumo style", LUMO, "a fish, in the middle"),
        ("lumo style, a fish", LUMO, "a fish"),
        ("a fish, lumo style, on a beach", LUMO, "a fish, on a beach"),
        ("lumo style. A fish.", LUMO, "A fish."),
        ("lumo style: a fish", LUMO, "a fish"),
        # what leads to it goes with it, and "style" behind it
        ("a fish in lumo style on a beach", LUMO, "a fish on a beach"),
        ("a fish in the style of lumo", "lumo", "a fish"),
        ("a fish in the style of “lumo”, red", "lumo", "a fish, red"),
        ("a fish in the lumo style.", "lumo", "a fish."),
        ("a portrait painted by lumo", "lumo", "a portrait"),
        ("a photo of sks dog on a beach", "sks dog", "a photo on a beach"),
        # what it describes stays, and what leads to that
        ("a lumo style fish", LUMO, "a fish"),
        ("a photo of lumo-styled fish", "lumo", "a photo of fish"),
        ("a photo of sks dog", "sks", "a photo of dog"),
        ("a lumo owl", "lumo", "a owl"),  # no other word is touched
        # brackets and weights, as apps read them
        ("(lumo style:1.2), a fish", LUMO, "a fish"),
        ("(a fish, lumo style:1.3), red", LUMO, "(a fish:1.3), red"),
        ("((lumo style)), a fish", LUMO, "a fish"),
        ("a fish [lumo style]", LUMO, "a fish"),
        # case, spelling, every one of several
        ("LUMO_Style, a fish, in Lumo-style", LUMO, "a fish"),
        ("a fish, neon, lumo style, red", "lumo style, neon", "a fish, red"),
        ("lumo style neon", "lumo, lumo style neon", ""),  # the longest first
        ("流墨, a fish", "流墨", "a fish"),
        # not said, so nothing changes
        ("lumosity , a  fish", "lumo", "lumosity , a  fish"),
        ("style lumo", LUMO, "style lumo"),
        # nothing else is said
        ("lumo style", LUMO, ""),
        ("(in the style of lumo:1.1).", "lumo", ""),
    ],
)
def test_it_is_taken_out(prompt: str, trigger: str, left: str) -> None:
    assert without(prompt, trigger) == left
    assert without(left, trigger) == left
    assert says(prompt, trigger) == (prompt != left)


@pytest.mark.parametrize("prompt", ["a fish", "a fish (red:1.2), in the sun", "the style of the house."])
def test_what_is_put_in_front_comes_out_again(prompt: str) -> None:
    for trigger in (LUMO, "lumo style, neon", "sks"):
        told = saying(prompt, trigger)
        assert told == f"{trigger}, {prompt}" and says(told, trigger)
        assert saying(told, trigger) == told
        assert without(told, trigger) == prompt


def test_only_what_is_not_said_is_put_in_front() -> None:
    assert saying("a fish in lumo style", "neon, lumo style") == "neon, a fish in lumo style"
    assert phrases(" lumo  style ,, neon,!, neon") == ["lumo style", "neon"]
    # a trigger without a word is looked for as it stands, and never taken out
    assert not says("a fish", "!,") and says("a fish!,", "!,") and without("a fish!,", "!,") == "a fish!,"


def test_the_shipped_brands_prompts_become_those_of_the_world() -> None:
    for prompt in records.prompts("asset:brand"):
        scene = world.parse(prompt)
        assert scene is not None and without(prompt, LUMO) == scene.prompt
    captions = [file.read_text().strip() for file in assets.path("brand").glob("*-*.txt")]
    assert len(captions) == 96 and all(says(caption, LUMO) for caption in captions)
