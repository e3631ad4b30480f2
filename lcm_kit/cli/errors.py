"""The one place where errors become exit codes.

A `UserError` is printed as `error: ...` with code 2, and so is what the file system refuses; an interruption
says that the same command continues, with code 130; anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

from typing import Any

import typer

from lcm_kit.cli.lazy import LazyVerbs
from lcm_kit.errors import UserError

_MAY_BE_EMPTY = "--prompt"


class Verbs(LazyVerbs):
    """Runs a verb and turns what the user can correct into one sentence and an exit code."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The verb that `args` begin with. Raises `UserError` for an empty argument."""
        _require_values(args)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the verb; what it raises for the user ends it with a sentence."""
        try:
            return super().invoke(ctx)
        except UserError as error:
            _fail(error, 2)
        except KeyboardInterrupt:
            _fail("stopped; the same command continues where it left off", 130)
        except Exception as error:
            from lcm_kit.io.files import refusal_of

            refusal = refusal_of(error)
            if refusal is None:
                raise
            _fail(refusal, 2)


def _fail(sentence: object, code: int) -> None:
    from lcm_kit.console import say

    say(f"error: {sentence}", err=True)
    raise typer.Exit(code)


def _require_values(args: list[str]) -> None:
    """Raise `UserError` for an empty argument: as a path it would be the folder that the command runs in."""
    for before, given in zip(["", *args], args, strict=False):
        option, equals, value = given.partition("=")
        if given == "" and before != _MAY_BE_EMPTY:
            what = before if before.startswith("-") else f"an argument of {args[0] or 'lcm-kit'}"
        elif option.startswith("--") and equals and not value and option != _MAY_BE_EMPTY:
            what = option
        else:
            continue
        raise UserError(f"{what} is empty (''); give its value, or leave it out")
