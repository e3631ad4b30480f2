"""The one exception that means: the user can fix this."""

from __future__ import annotations

from collections.abc import Sequence

from lcm_kit.inert import line

_LONGEST = 300  # characters of a library's words within a sentence


class UserError(ValueError):
    """A mistake in the input. Its text is one sentence: the thing, what is wrong with it, what to do.

    The text is on one line and acts on no terminal, whatever is in a name or a file that it tells of; only
    `items`, where several things are wrong, follow on lines of their own. `lcm_kit.cli.main` prints it as
    `error: ...` and exits with code 2, without a traceback.
    """

    def __init__(self, sentence: object, items: Sequence[object] = ()) -> None:  # noqa: D107
        super().__init__(sentence, items)  # what a copy is made of, as on its way to another process

    def __str__(self) -> str:
        """The sentence, and the items below it."""
        sentence, items = self.args
        return "\n  - ".join(map(line, (sentence, *items)))


def first_line(error: BaseException) -> str:
    """What a library's error says, for a part of a sentence; its type where it says nothing."""
    lines = str(error).strip().splitlines()
    return (lines[0].rstrip(".")[:_LONGEST] if lines else "") or type(error).__name__
