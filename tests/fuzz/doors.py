"""What every door of the kit owes to whatever comes in, and how that is tried with many inputs.

A door returns a value or raises `UserError`. The error names the thing, is one line (or one and a list) and
acts on no terminal. `fuzz` makes two tests of a property: a small one for `make test`, always with the same
inputs, and a large one for `make test-slow` with new inputs each time.
"""

from __future__ import annotations

import time
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Verbosity, example, given, settings
from hypothesis import strategies as st

from lcm_kit.errors import UserError

MOST_SECONDS = 5  # of the processor: what hangs takes all of it, and a busy machine does not matter
LONGEST = 6_000  # characters of a sentence and its list

_SIGNS = st.characters(codec="utf-8")
_LIKELY = (
    "".join(map(chr, range(32, 127))) + "\n\t\r\x00\x1b\x85\x9b\u2028\u202e\ufeff\u00e9\u0301\u6f22\U0001f994"
)
text = st.one_of(st.text(_LIKELY, max_size=40), st.text(_SIGNS, max_size=40))
whole = st.one_of(
    st.integers(-3, 3),
    st.integers(-(2**70), 2**70),
    st.sampled_from((2**31, 2**53 + 1, 2**63, 10**30, 10**400)),
)
numbers = st.one_of(whole, st.floats(), st.sampled_from((1e308, 1e-320, 0.1)))
anything = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, text),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(text, inner, max_size=3)),
    max_leaves=6,
)


def fuzz(given_: st.SearchStrategy[Any], *, small: int, large: int, examples: Sequence[Any] = ()) -> Any:
    """Make a test of `small` values and a slow one of `large` of `check(folder, value)`."""

    def decorate(check: Callable[[Path, Any], None]) -> Callable[..., None]:
        @pytest.mark.parametrize("count", [small, pytest.param(large, marks=pytest.mark.slow)])
        def test(count: int, tmp_path: Path) -> None:
            def holds(value: Any) -> None:
                check(tmp_path, value)

            for value in examples:
                holds = example(value)(holds)
            slow = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
            settings(
                max_examples=count,
                derandomize=count == small,
                deadline=None,
                database=None,
                suppress_health_check=slow,
                verbosity=Verbosity.normal,
                print_blob=True,
            )(given(given_)(holds))()

        test.__doc__ = check.__doc__
        return test

    return decorate


def answer(door: Callable[[], Any], *names: str) -> Any:
    """What `door` returns, or its `UserError`, held to its promise; `names`: what the error must name."""
    began = time.process_time()
    try:
        found = door()
    except UserError as error:
        check_sentence(str(error), *names)
        found = error
    assert time.process_time() - began < MOST_SECONDS
    return found


def check_sentence(said: str, *names: str) -> None:
    """That `said` is a sentence, perhaps with a list, that acts on no terminal and names all of `names`."""
    first, *items = said.split("\n")
    assert first and len(said) < LONGEST, said[:500]
    assert all(item.startswith("  - ") for item in items), said
    for line in (first, *items):
        acting = [sign for sign in line if unicodedata.category(sign) in ("Cc", "Cs", "Zl", "Zp")]
        assert not acting and not set(line) & set(
            "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufeff"
        ), ascii(said)
    for name in names:
        assert name in said, f"{name!r} is not named: {said}"


def mutations(source: str) -> st.SearchStrategy[str]:
    """`source` with pieces cut, doubled and replaced."""
    place = st.integers(0, len(source))
    pieces = st.one_of(
        text, st.sampled_from(["\n", ":", "- ", "{", "[", '"', "&a ", "*a", "!!", "<<: ", "? ", "|", "\t"])
    )

    def edited(edits: list[tuple[int, int, str]]) -> str:
        made = source
        for begin, length, piece in edits:
            begin = min(begin, len(made))
            made = made[:begin] + piece + made[begin + length :]
        return made

    return st.lists(st.tuples(place, st.integers(0, 12), pieces), min_size=1, max_size=4).map(edited)
