"""The list behind the numbers: each picture that a run was trained on, with licence, source, author, consent.

Written where somebody asks for it, and never part of a LoRA file or its card.
"""

from __future__ import annotations

import csv
import io
from dataclasses import asdict
from pathlib import Path

from lcm_kit import console
from lcm_kit.adapter import folder as adapter
from lcm_kit.config.load import load
from lcm_kit.config.schema import Training
from lcm_kit.data.records import open_records
from lcm_kit.data.rights import summary
from lcm_kit.errors import UserError
from lcm_kit.io.files import atomic_write

FILE = "sources.csv"
_COLUMNS = ("license", "source", "author", "consent")


def write_sources(run: Path, folder: Path) -> Path:
    """Write `folder/sources.csv`, a row a picture, from the metadata of what `run` was trained on.

    Says so if that tells other numbers now than when it was encoded. Raises `UserError` if the run saw no
    pictures, or they are not there any more.
    """
    config = load(run / "config.yaml")
    if not isinstance(config, Training) or not config.data.has_images:
        raise UserError(f"{run} was not trained on pictures, so there is no list of sources")
    records, _ = open_records(config.data)
    told = adapter.read_provenance(run / "adapter").data.rights
    if summary(record.rights for record in records) != (asdict(told) if told else None):
        console.say(
            f"warning: {config.data.path} says other things of licences and sources now than when {run} was "
            f"trained; {FILE} has what it says now",
            err=True,
        )
    text = io.StringIO(newline="")
    rows = csv.writer(text)
    rows.writerow(("picture", *_COLUMNS))
    rows.writerows(
        (record.id, *(getattr(record.rights, name) or "" for name in _COLUMNS)) for record in records
    )
    atomic_write(folder / FILE, text.getvalue().encode("utf-8", "replace"))
    return folder / FILE
