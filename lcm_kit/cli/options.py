"""Options that several verbs have, each with its words in one place."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from lcm_kit.config.numbers import require_batch_size


def _batch_size(given: str) -> str:
    return str(require_batch_size(given, "--batch-size"))


BatchSize = Annotated[
    str,
    typer.Option(
        callback=_batch_size, metavar="N|auto", help="Pictures at once; fewer where memory runs out."
    ),
]
Device = Annotated[
    str | None, typer.Option(help="As cuda, cuda:1, mps or cpu.", show_default="cuda if there is one")
]
Dtype = Annotated[
    Literal["float32", "float16", "bfloat16"] | None,
    typer.Option(help="Precision.", show_default="float16 on a GPU, float32 on a CPU"),
]
