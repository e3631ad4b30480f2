"""A sentence for the user is one line that acts on no terminal, whatever it tells of."""

from __future__ import annotations

import copy
import pickle

import pytest

from lcm_kit.errors import UserError, first_line
from lcm_kit.inert import line, plain

# ECMA-48's C0 and C1; Unicode's embeddings, isolates, line and paragraph separator; surrogates
ACTIVE = [
    *map(chr, (*range(0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A))),
    "\u2028", "\u2029", "\ufeff", "\ud800", "\udfff",
]  # fmt: skip


@pytest.mark.parametrize("sign", ACTIVE, ids=ascii)
def test_what_acts_is_spelled_out(sign: str) -> None:
    shown = line(f"a{sign}b")
    assert shown == f"a{ascii(sign)[1:-1]}b" and shown.isascii() and shown.isprintable()
    assert line(shown) == shown


def test_plain_text_keeps_its_lines_and_its_letters() -> None:
    assert plain("a\r\nb\tc\rd\x1b") == "a\nb\tc\\rd\\x1b"
    text = "Ünïcode \u05d0 \U0001f994 [v2] \\x1b 50%"
    assert line(text) == plain(text) == text


def test_an_error_is_one_line_and_one_for_each_item() -> None:
    assert str(UserError("config a\nb: no\x1b[2J")) == "config a\\nb: no\\x1b[2J"
    error = UserError("2 mistakes", ["x\ny: wrong", UserError("z\r: wrong")])
    assert str(error) == "2 mistakes\n  - x\\ny: wrong\n  - z\\r: wrong"
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(other) is UserError and str(other) == str(error)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (AssertionError(), "AssertionError"),
        (ValueError(" \n "), "ValueError"),
        (ValueError("\nit is wrong.\nand more"), "it is wrong"),
        (ValueError("..."), "ValueError"),
        (ValueError("x" * 10_000), "x" * 300),
    ],
)
def test_a_librarys_error_is_a_part_of_a_sentence(error: Exception, words: str) -> None:
    assert first_line(error) == words
