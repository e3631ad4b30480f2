"""What a program of a studio's own calls: the verbs of the command line as functions.

`import lcm_kit` has them all, each loaded when it is first asked for: `lcm_kit.distill(...)`. They return
what was made or measured, print nothing unless `verbose`, and raise `lcm_kit.UserError` where the command
line would end in `error: ...`. The guide is docs/api.md.
"""

from __future__ import annotations
