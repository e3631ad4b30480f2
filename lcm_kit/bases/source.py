"""What the files of a base say; no weights are loaded."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from lcm_kit.bases.headers import require_content
from lcm_kit.console import working
from lcm_kit.errors import UserError
from lcm_kit.families import PARTS
from lcm_kit.io.files import sha256_file

# The parts of a pipeline whose weights are read, and how diffusers and transformers name their files
STEMS = {name: part.stem for name, part in PARTS.items() if part.stem is not None}
_MOST_JSON = 64 * 2**20


def read_json(path: Path, base: str) -> dict[str, Any]:
    """A JSON file of the base called `base`: an object.

    Raises `UserError` if it is missing, unreadable, something else or beyond 64 MiB (a tokenizer has 4).
    """
    where = f"{path.parent.name}/{path.name}" if path.name != "model_index.json" else path.name
    if not path.exists():
        raise UserError(
            f"base {base!r} is not a diffusers pipeline folder: {where} is missing; give the folder that "
            "StableDiffusionPipeline.save_pretrained wrote"
        )
    require_content(path, f"base {base!r}: {where}")
    try:
        if path.stat().st_size > _MOST_JSON:
            raise ValueError(f"it has {path.stat().st_size:,} bytes")
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, not an object")
        return content
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(
            f"base {base!r}: {path} cannot be read as JSON ({error}); download or save the base again"
        ) from error


def file_hash(path: Path) -> str:
    """SHA-256 of a file, read once a process while unchanged; the hub's cache names large files by it."""
    real = path.resolve()
    if real.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", real.name):
        return real.name
    state = real.stat()
    return _hash_of_state(real, state.st_size, state.st_mtime_ns)


@cache
def _hash_of_state(path: Path, size: int, modified: int) -> str:
    with working(f"hashing {path}"):
        return sha256_file(path)
