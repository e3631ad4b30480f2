"""What two runs of the same must have in common: every file's content, but for times, dates and speeds."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pyarrow import csv, parquet
from safetensors.torch import load_file, save

VOLATILE = ("second", "images_per", "date", "machine", "joules", "energy", "cost", "hash", "modified")


def snapshot(place: Path, dated: bool = False) -> dict[str, str]:
    """A hash of what counts in every file below `place`; only whether it is there where that is the date."""
    return {
        path.relative_to(place).as_posix(): "" if dated and _has_date(path) else _content(path, dated)
        for path in sorted(place.rglob("*"))
        if path.is_file() and not path.is_symlink() and not path.name.endswith(".lock")
    }


def _has_date(path: Path) -> bool:
    return path.suffix == ".json" and "cache" not in path.parts


def _content(path: Path, dated: bool) -> str:
    data = path.read_bytes()
    if dated and path.suffix == ".safetensors":
        data = save(load_file(path))
    if path.suffix == ".json" and "state" not in path.parts and "cache" not in path.parts:
        data = json.dumps(_steady(json.loads(data)), sort_keys=True).encode()
    elif path.suffix == ".jsonl":
        *lines, rest = data.split(b"\n")  # of the last a full disk may have taken half
        told = [_steady(json.loads(line)) for line in lines]
        data = json.dumps([told, bool(rest)], sort_keys=True).encode()
    elif path.suffix == ".safetensors" and {"evaluation", "brand", "cells"} & set(path.parts):
        data = save({name: t for name, t in load_file(path).items() if "second" not in name})
    elif path.suffix in (".csv", ".parquet"):
        table = csv.read_csv(path) if path.suffix == ".csv" else parquet.read_table(path)
        data = json.dumps(_steady(table.to_pydict())).encode()
    elif path.suffix in (".html", ".md"):  # both show seconds
        data = b""
    return hashlib.sha256(data).hexdigest()


def _steady(value: Any) -> Any:
    """Without what differs from run to run."""
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if not any(word in k for word in VOLATILE)}
        return {key: _steady(item) for key, item in kept.items()}
    return [_steady(item) for item in value] if isinstance(value, list) else value


def litter(place: Path) -> list[str]:
    """Temporary files and folders that were left behind."""
    return [
        path.relative_to(place).as_posix()
        for path in place.rglob("*")
        if path.name.endswith((".tmp", ".old")) or ".part" in path.name
    ]
