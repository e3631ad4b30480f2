"""Where a base lies: a folder, a single file that is made into one, or the hub."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from lcm_kit.assets import place
from lcm_kit.bases.single_file import folder_of
from lcm_kit.bases.source import STEMS
from lcm_kit.errors import UserError, first_line
from lcm_kit.families import PARTS


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
    wanted = [
        "model_index.json",
        "README.md",
        *(f"{part}/*.json" for part in PARTS),
        "tokenizer*/*.txt",
        *weights,
    ]
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
