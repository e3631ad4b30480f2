"""What every call of the API has in common: silence unless asked, and mistakes as one kind of exception."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from lcm_kit import console
from lcm_kit.errors import UserError
from lcm_kit.io.files import refusal_of


@contextlib.contextmanager
def call(verbose: bool, *, models: bool = True) -> Iterator[None]:
    """Run the block as a call from somebody's program.

    Unless `verbose` nothing is printed, and no bar is shown. `models`: libraries that load models are used,
    whose own bars are off within the block. What the file system refuses becomes a `UserError`.
    """
    with contextlib.ExitStack() as stack:
        if not verbose:
            stack.enter_context(console.silent())
        if models:
            from lcm_kit.quiet import quietly

            if "torch" in sys.modules:
                from lcm_kit.bases.out_of_memory import free

                free()  # what a call before this one left that ended with an error
            stack.enter_context(quietly())
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            refusal = refusal_of(error)
            if refusal is None:
                raise
            raise refusal from error
