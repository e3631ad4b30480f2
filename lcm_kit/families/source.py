"""Where a base lies, on disk or in the hub's cache, and what its files say; no weights are loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from lcm_kit.assets import place
from lcm_kit.console import working
from lcm_kit.errors import UserError, first_line
from lcm_kit.families.headers import require_content
from lcm_kit.files import sha256_file

# The parts of a pipeline whose weights are read, and how diffusers and transformers name their files
STEMS = {
    "vae": "diffusion_pytorch_model",
    "unet": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}
_MOST_JSON = 64 * 2**20
_FOLDERS = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "scheduler")


def locate(path: str, revision: str | None, variant: str | None) -> Path:
    """The base's folder: local, or in the hub's cache, where only what is needed is downloaded.

    A single .safetensors file is made into a folder first, once.
    Raises `UserError` if there is no such folder and the hub cannot give it.
    """
    local = place(path)
    if local.is_dir() and revision is not None:
        raise UserError(f"base.revision {revision!r} means nothing for the folder {path!r}; remove it")
    if local.is_dir():
        return local
    if local.is_file():
        for key, value in (("revision", revision), ("variant", variant)):
            if value is not None:
                raise UserError(f"base.{key} {value!r} means nothing for the file {path!r}; remove it")
        from lcm_kit.families.single_file import folder_of

        return folder_of(local)
    if path.startswith(("asset:", "/", ".", "~")) or path.count("/") > 1:
        raise UserError(f"base {path!r}: there is no such folder; check base.path")
    folder = _download(path, revision, variant, STEMS)
    if variant is not None:  # parts without a file of the variant are taken as they are, as diffusers does
        own = [
            part for part in STEMS if (folder / part).is_dir() and not _has_variant(folder / part, variant)
        ]
        if own and len(own) < sum((folder / part).is_dir() for part in STEMS):
            _download(path, revision, None, own)
    return folder


def _has_variant(folder: Path, variant: str) -> bool:
    return any(f".{variant}" in file.name for file in folder.glob("*.safetensors"))


def _download(path: str, revision: str | None, variant: str | None, parts: Iterable[str]) -> Path:
    """JSON and tokenizers of a hub's base, and of `parts` the weights of `variant`."""
    from huggingface_hub import snapshot_download

    mark = f".{variant}" if variant else ""
    # pieces of a large model: NAME.fp16-00001-of-00002.safetensors, once NAME-00001-of-00002.fp16.safetensors
    ends = (f"{mark}.safetensors", f"{mark}-*-of-*.safetensors", f"-*-of-*{mark}.safetensors")
    weights = [f"{part}/{STEMS[part]}{end}" for part in parts for end in ends]
    wanted = ["model_index.json", *(f"{part}/*.json" for part in _FOLDERS), "tokenizer*/*.txt", *weights]
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=wanted))
    except (
        Exception
    ) as error:  # the name, the network, permissions: the hub raises of all kinds, none is our bug
        reason = first_line(error)
        raise UserError(
            f"base {path!r} is neither a folder nor a hub id that can be reached ({reason}); check "
            "base.path, base.revision and the connection"
        ) from error


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
