"""verified.json, beside exported files: which they are, what they were made from, which app loads them."""

from __future__ import annotations

from pathlib import Path

from lcm_kit.io import own_files, own_shapes
from lcm_kit.io.files import sha256_file

RECORD = "verified.json"


def read(folder: Path) -> own_shapes.Verified:
    """What `folder/verified.json` says, nothing where there is none. Raises `own_files.Damaged`."""
    file = folder / RECORD
    if not file.is_file():
        return {"files": {}}
    again = f"remove it and export again into {folder}"
    return own_files.read_json(file, own_shapes.Verified, again)


def is_checked(file: Path, weights: Path | None = None) -> bool | None:
    """Whether `file` is, byte for byte, what `verified.json` beside it tells of; None if it does not tell.

    And whether it was made from the run's `weights` as they are now, if they are given.
    """
    known = read(file.parent)["files"].get(file.name)
    if known is None or not file.is_file():
        return None
    return sha256_file(file) == known["sha256"] and (weights is None or _is_of(known, file, weights))


def is_made_from(file: Path, weights: Path) -> bool:
    """Whether `file` was exported from the run's `weights` as they are now."""
    return _is_of(read(file.parent)["files"].get(file.name), file, weights)


def _is_of(known: own_shapes.Exported | None, file: Path, weights: Path) -> bool:
    made_from = known.get("weights") if known else None
    now = own_files.hash_of(weights)
    if made_from is None or now is None:  # of a kit that did not write it down
        return file.stat().st_mtime >= weights.stat().st_mtime
    return made_from == now
