"""Weights in prompts: A1111's grammar, and what they do to embeddings, computed by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lcm_kit import bases
from lcm_kit.bases import emphasis, sd, sdxl
from lcm_kit.bases.emphasis import Weighted, notes, read, words
from lcm_kit.errors import UserError

SPANS: list[tuple[str, list[tuple[str, float]]]] = [
    ("a (red) fox", [("a ", 1), ("red", 1.1), (" fox", 1)]),
    ("a [red] fox", [("a ", 1), ("red", 1 / 1.1), (" fox", 1)]),
    ("a (red:1.35) fox", [("a ", 1), ("red", 1.35), (" fox", 1)]),
    ("((red)) (fox)", [("red", 1.1 * 1.1), (" ", 1), ("fox", 1.1)]),
    ("(a (red:1.5) fox:2)", [("a ", 2), ("red", 3), (" fox", 2)]),
    ("([red]) fox", [("red", 1.1 / 1.1), (" fox", 1)]),
    ("(red fox", [("red fox", 1.1)]),  # never closed: to the end
    ("red) fox]", [("red) fox]", 1)]),  # never opened: text
    ("(red : 1.5 ) fox", [("red ", 1.5), (" fox", 1)]),
    ("(red:-.5) fox", [("red", -0.5), (" fox", 1)]),
    ("(a:b) c:d", [("a:b", 1.1), (" c:d", 1)]),
    (r"\(red\) (\[fox\]:2) \\", [("(red) ", 1), ("[fox]", 2), (" \\", 1)]),
    ("(one)(two) x", [("onetwo", 1.1), (" x", 1)]),  # neighbours of one weight are one text
]


@pytest.mark.parametrize(("prompt", "wanted"), SPANS, ids=[prompt for prompt, _ in SPANS])
def test_spans_and_weights(prompt: str, wanted: list[tuple[str, float]]) -> None:
    found = read(prompt, True)
    whole = "".join(text for text, _ in wanted)
    if all(abs(weight - 1) < 1e-12 for _, weight in wanted):
        assert words(found) == whole
        return
    assert isinstance(found, Weighted) and len(found.parts) == 1
    assert [span.text for span in found.parts[0]] == [text for text, _ in wanted]
    assert [span.weight for span in found.parts[0]] == pytest.approx([weight for _, weight in wanted])
    assert words(found) == whole


def test_break_ends_a_chunk_within_brackets_too() -> None:
    found = read("a fox BREAK (in the BREAK snow:1.2) BREAKS", True)
    assert isinstance(found, Weighted)
    told = [[tuple(span) for span in part if span.text] for part in found.parts]
    assert told == [[("a fox", 1.0)], [("in the", 1.2)], [("snow", 1.2), (" BREAKS", 1.0)]]


@pytest.mark.parametrize(
    "prompt",
    ["a cat (sitting)", "[logo] a cat", "a BREAK b", "a:1.2) b", "a [cat|dog]", "c:\\x", "10 (1:2.3.4)"],
)
def test_plain_text_stays_as_it_is_unless_it_is_asked_for(prompt: str) -> None:
    assert read(prompt) == read(prompt, False) == prompt


@pytest.mark.parametrize("prompt", ["a (cat:1.2)", "(a (cat):1.2)", r"a \(cat\)", r"(a) \]"])
def test_what_no_plain_text_has_is_read(prompt: str) -> None:
    assert read(prompt) == read(prompt, True) != prompt
    assert read(prompt, False) == prompt


def test_a_prompt_that_only_escapes_is_plain_text_again() -> None:
    assert read(r"miku \(singer\)") == "miku (singer)"
    assert read("a cat", True) == "a cat" and read("(cat:1.0)") == "cat" and read("", True) == ""


@pytest.mark.parametrize(
    ("prompt", "match"),
    [
        ("(a:1.2) [b:c:0.5]", r"\[a:b:0.5\] and \[a\|b\]"),
        ("(a:1.2) [b|c]", r"\[a:b:0.5\] and \[a\|b\]"),
        ("(a:1.2) AND b", "AND, which draws by several"),
        ("(a:1.2) <lora:x:0.8>", "<...>, which loads another file"),
        ("(a:1.2) (b:1.2.3)", "1.2.3 is no number that a word can weigh"),
    ],
)
def test_what_is_not_weights_is_refused(prompt: str, match: str) -> None:
    with pytest.raises(UserError, match=match):
        read(prompt)
    assert read(prompt, False) == prompt


def test_what_is_read_and_what_is_not_is_said() -> None:
    told = [*notes(["a (cat:1.2)", "a (cat)", "a [dog]", "a (cat)", "a bird"])]
    assert told[0] == "read with its brackets as weights, as apps read it: 'a (cat:1.2)'"
    assert told[1].startswith("drawn with its brackets or BREAK as they stand") and "and 1 more" in told[1]
    assert len(told) == 2 and not [*notes(["a bird", "it's 5:30"])]
    assert not [*notes(["a (cat:1.2)", "a (cat)"], True)] and not [*notes(["a (cat)"], False)]


# -- Embeddings ----------------------------------------------------------------------------------------------


def text_with_a_mean(base: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Text encoders whose last norms are as if trained, so that each text has a mean of its own.

    Without a weight and a bias the mean is rounding alone.
    """
    g = torch.Generator().manual_seed(3)
    text = bases.load_text(bases.inspect_base(str(base)), dtype)
    for encoder in (part for part in text if isinstance(part, torch.nn.Module)):
        for name, module in encoder.named_modules():
            if name.endswith(("final_layer_norm", "layer_norm2")):
                module.bias.fill_(0.2)
                module.weight.copy_(torch.randn(len(module.weight), generator=g))
            if name.endswith("mlp.fc2"):
                module.bias.fill_(0.1)
    return text


def by_hand(states: torch.Tensor, weights: dict[int, float]) -> torch.Tensor:
    """One chunk [24, D]: rows times their weights, then all of it to the mean that it had."""
    changed = states.clone()
    for place, weight in weights.items():
        changed[place] = states[place] * weight
    return changed * (float(states.double().mean()) / float(changed.double().mean()))


def test_embeddings_are_multiplied_and_keep_their_mean(sd_base: Callable[..., Path]) -> None:
    """A token a letter: "ab " is at places 1 and 2, "cd" at 3 and 4, behind the start at 0."""
    text = text_with_a_mean(sd_base())
    (plain,) = sd.encode_text(text, ["ab cd ef"]).embeds
    (other,) = sd.encode_text(text, ["x"]).embeds
    found = sd.encode_text(text, [read("ab (cd:1.5) ef"), "ab cd ef", "x", read("(x:2)")]).embeds
    assert abs(float(other.mean() - plain.mean())) > 0.01
    torch.testing.assert_close(found[0], by_hand(plain, {3: 1.5, 4: 1.5}), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[3], by_hand(other, {1: 2.0}), rtol=1e-4, atol=1e-5)
    assert torch.equal(found[1], plain) and torch.equal(found[2], other)  # their neighbours are as they were
    assert float(found[0].mean()) == pytest.approx(float(plain.mean()), rel=1e-3)
    assert (found[0] - plain).abs().max() > 0.1 and abs(float(plain.mean())) > 0.05


def test_a_mean_that_is_rounding_is_not_returned_to(sd_base: Callable[..., Path]) -> None:
    """A layer norm that was never trained gives each token the mean 0: 0 / 0 would decide the picture."""
    text = bases.load_text(bases.inspect_base(str(sd_base())))
    (plain,) = sd.encode_text(text, ["ab cd ef"]).embeds
    (found,) = sd.encode_text(text, [read("ab (cd:1.5) ef")]).embeds
    weights = torch.ones(24, 1)
    weights[3:5] = 1.5
    torch.testing.assert_close(found, plain * weights)


def test_each_encoder_and_each_chunk_keeps_its_own_mean(sdxl_base: Path) -> None:
    text = text_with_a_mean(sdxl_base)
    plain = sdxl.encode_text(text, ["ab cd", "ef gh"])
    found = sdxl.encode_text(text, [read("(ab:0.5) cd BREAK ef (gh:2)")], None)
    chunks = [
        torch.cat([by_hand(part, weights) for part in states.split(32, dim=1)], dim=1)
        for states, weights in zip(plain.embeds, ({1: 0.5, 2: 0.5}, {3: 2.0, 4: 2.0}), strict=True)
    ]
    torch.testing.assert_close(found.embeds[0], torch.cat(chunks), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.pooled, plain.pooled[:1])  # of the first chunk, without weights


def test_weights_in_half_precision_are_computed_in_full(sd_base: Callable[..., Path]) -> None:
    text = text_with_a_mean(sd_base(), torch.bfloat16)
    (plain,) = sd.encode_text(text, ["ab cd"]).embeds
    (found,) = sd.encode_text(text, [read("ab (cd:1.5)")]).embeds
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, by_hand(plain.float(), {3: 1.5, 4: 1.5}).to(torch.bfloat16))


def test_empty_chunks_of_breaks_are_kept_but_at_the_end(sd_base: Callable[..., Path]) -> None:
    text = bases.load_text(bases.inspect_base(str(sd_base())))
    for prompt, count in (("BREAK a", 2), ("a BREAK", 1), ("a BREAK BREAK b", 3), ("BREAK", 1)):
        found = sd.encode_text(text, [emphasis.read(prompt, True)], None)
        assert found.embeds.shape[1] == count * 24, prompt
