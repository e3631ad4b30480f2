"""The one exception that means: the user can mend this."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in the input. Its text is one sentence: the thing, what is wrong with it, what to do.

    `lcm_kit.cli` prints it as `error: ...` and exits with code 2, without a traceback.
    """
