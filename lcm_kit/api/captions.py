"""Captions for pictures without any: a model writes a table, a person reads it, what stands is accepted."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lcm_kit import console
from lcm_kit.api.calls import call
from lcm_kit.api.stages import Place
from lcm_kit.config.numbers import require_batch_size
from lcm_kit.errors import UserError

if TYPE_CHECKING:
    from lcm_kit.data.captioner import Captioner
    from lcm_kit.data.captioning import Accepted, Captioned

_SIDE = 1024  # pixels of a picture that "auto" counts with: models see about as many
_TOKENS = 1000


def caption(
    folder: Place,
    model: Place,
    *,
    prompt: str | None = None,
    trigger: str | None = None,
    table: Place | None = None,
    batch_size: int | Literal["auto"] = "auto",
    max_tokens: int = 75,
    device: str | None = None,
    dtype: Literal["float32", "float16", "bfloat16"] | None = None,
    overwrite: bool = False,
    verbose: bool = False,
) -> Captioned:
    """Have a vision-language model caption the pictures that have no caption, into a table for review.

    `model`: a folder that transformers loads, or a name on the hub. `prompt`: what it is asked; a model that
    takes no questions, as BLIP, goes on from it. `trigger`: put before each caption. `table`: `captions.csv`
    in the folder by default. `max_tokens` of a caption, 1 to 1000. `overwrite`: caption pictures that have
    captions too.

    No training reads the table: look at it, change what is wrong, write `rejected` into the column `status`
    of what is to go, then `accept_captions`. Pictures that have a row are left as they are, so a call that
    was stopped goes on. Raises `UserError` for a folder without pictures, a model that is none of these, a
    device that is not here, and a table that was broken.

        table = lcm_kit.caption("my_pictures", "models/blip-large", trigger="lumo style").table
    """
    from lcm_kit.data import captioning
    from lcm_kit.data.caption_tables import TABLES

    require_batch_size(batch_size)
    if not 1 <= max_tokens <= _TOKENS:
        raise UserError(f"max_tokens {max_tokens} is out of range; give 1 to {_TOKENS}")
    if trigger is not None and not trigger.strip():
        raise UserError("the trigger is empty; give the words that stand for the style, or leave it out")
    place = _path(table)
    if place is not None and place.name.lower() in TABLES:
        raise UserError(f"{place} has the name of a table that training reads; choose another for the review")
    with call(verbose):
        import torch

        from lcm_kit import sample
        from lcm_kit.drawing.batches import at_once

        where = sample.placement(device, dtype and getattr(torch, dtype))

        def load() -> Captioner:
            from lcm_kit.data.captioner import Captioner

            with console.working(f"loading {os.fspath(model)}"):
                return Captioner.load(os.fspath(model), where["device"], where["dtype"], prompt, max_tokens)

        many = at_once(batch_size, _SIDE, _SIDE, where["device"])
        return captioning.caption(
            Path(folder), place, load, many, trigger=trigger, overwrite=overwrite, progress=verbose
        )


def accept_captions(
    folder: Place, *, table: Place | None = None, overwrite: bool = False, verbose: bool = False
) -> Accepted:
    """Write what a table of captions does not reject as caption files, `NAME.txt` beside the pictures.

    `table`: as `caption` wrote it. A picture that has another caption keeps it, unless `overwrite`; `had`
    names these. Raises `UserError` for a table that is not there or was broken.

        accepted = lcm_kit.accept_captions("my_pictures")
        print(len(accepted.files), "caption files")
    """
    from lcm_kit.data import captioning

    with call(verbose, models=False):
        return captioning.accept(Path(folder), _path(table), overwrite=overwrite)


def _path(place: Place | None) -> Path | None:
    return None if place is None else Path(place)
