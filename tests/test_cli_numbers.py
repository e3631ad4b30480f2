"""Every number on the command line has its range, so that nothing without sense gets any further."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, get_args, get_type_hints

import pytest

from lcm_kit.cli.main import EveryVerb
from lcm_kit.config.numbers import within
from lcm_kit.errors import UserError


def verbs() -> Iterator[Callable[..., Any]]:
    for app in EveryVerb.apps:
        yield from (command.callback for command in app.registered_commands if command.callback)


def numbers() -> Iterator[tuple[str, type, Any]]:
    """Verb and option, its type, its settings: of all that take a number."""
    for verb in verbs():
        for name, hint in get_type_hints(verb, include_extras=True).items():
            bare, *more = get_args(hint) if hasattr(hint, "__metadata__") else (hint,)
            kind = next((kind for kind in (int, float) if kind is bare or kind in get_args(bare)), None)
            if kind is not None:
                yield f"{verb.__name__} --{name.replace('_', '-')}", kind, more


FOUND = list(numbers())


@pytest.mark.parametrize(("name", "kind", "settings"), FOUND, ids=[name for name, _, _ in FOUND])
def test_every_number_has_a_range(name: str, kind: type, settings: Any) -> None:
    (option,) = settings
    wrong = [10**30, -(10**30)] + (
        [float("nan"), float("inf"), -float("inf"), 1e308] if kind is float else []
    )
    for value in wrong:
        with pytest.raises(UserError, match=f"^{name.split()[1]} .* is out of range; give a number "):
            option.callback(value)


def test_they_are_all_there() -> None:
    assert {"sample --seed", "convert --rank", "merge --rank", "verify --alpha"} <= {
        name for name, *_ in FOUND
    }


def test_a_range_holds_its_ends() -> None:
    check, above = within("--x", 1, 5), within("--x", 0, 1e6, above=True)
    assert [check(value) for value in (1, 5, None)] == [1, 5, None] and above(1e6) == 1e6
    for value in (0, 6):
        with pytest.raises(UserError, match=f"^--x {value} is out of range; give a number from 1 to 5$"):
            check(value)
    with pytest.raises(UserError, match=r"^--x 0 is out of range; give a number above 0 and at most 1e\+06$"):
        above(0)
