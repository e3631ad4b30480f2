"""The cache folder on disk: `manifest.json`, `shard-00000.safetensors`, ..., `empty.safetensors`.

Every shard carries two hashes (`own_files`): of all that it was made from (settings, images, captions), and
of its tensors. So whether a shard is done, and whole, is read from the shard itself: an interrupted or
repeated run just looks, and nothing else keeps a state. manifest.json carries a hash of itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcm_kit import __version__
from lcm_kit.bases import BaseInfo
from lcm_kit.bases.condition import joined
from lcm_kit.config.schema import Data
from lcm_kit.data import row_settings
from lcm_kit.data.masks import WHOLE
from lcm_kit.data.vae_precision import FULL, KEY
from lcm_kit.errors import UserError
from lcm_kit.io import own_files, own_shapes
from lcm_kit.io.files import discard, sha256_bytes

MANIFEST = "manifest.json"
EMPTY = "empty.safetensors"
PROMPTS = "prompts/"  # begins the id of a row that is a prompt without a picture
# Begins the id of a picture of data.regularization. Ids are in caches and choose what is held out: it stays
GENERAL = "regularisation/"
MIRRORED = " (mirrored)"  # ends the name of a mirror image
_ALWAYS = ("id", "caption", "image", "text", "mirrored")  # keys that every row of a manifest has
_FORMAT = 1  # raise it when the same inputs would give another cache
_NAMES = {
    "family": "the family of the base",
    "vae": "the VAE of the base",
    "text_encoder": "the text encoder of the base",
    "tokenizer": "the tokenizer of the base",
    "text_encoder_2": "the second text encoder of the base",
    "tokenizer_2": "the second tokenizer of the base",
    "zeros_when_empty": "what the base takes for an empty prompt",
    "format": "the cache format",
    "unet": "the UNet of the base",
    "scheduler": "the scheduler of the base",
    "prompts": "the prompts of data.samples, or how many",
    "latents": "the shape of the base's latents",
    "teacher.adapters": "the teacher's adapters",
    "resolutions": "the sizes in data.samples.resolutions",
}
_AGAIN = "run `lcm-kit encode` with this config again, which keeps what is whole"
_OTHER = "choose another data.cache, or remove it and run `lcm-kit encode` again: finished shards are kept"
# keys of the config that tensors are made by
_MAKING = ("data.resolution", "data.samples.", KEY)
_PLACES = ("data.path", "data.regularization")  # keys that are paths of folders, or names
_BY_ROW = ("prompts", "resolutions")  # every row has its own


@dataclass(frozen=True)
class Entry:
    """One row of the cache. What most rows do not have is in no manifest, and in no hash."""

    id: str
    caption: str  # the first, where there are several
    image: str  # SHA-256 of the image file; of a teacher's sample, the place of its noise
    text: str  # SHA-256 of the caption
    mirrored: bool = False
    size: tuple[int, int] | None = None  # width, height in pixels; None: the square of data.resolution
    crop: str = ""  # what says where it was cropped, and which of several it is; "": in the middle
    weights: str = ""  # what the weights of its cells are made from; "": all are 1
    captions: tuple[tuple[str, float], ...] = ()  # several, each with its weight
    repeats: int = 1  # times an epoch that it is seen

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Entry:
        """The entry that `row` keeps; what a later kit says besides is passed over."""
        known = {key.name: row[key.name] for key in fields(cls) if key.name in row}
        if "size" in known:
            known["size"] = tuple(known["size"])
        if "captions" in known:
            known["captions"] = tuple((text, weight) for text, weight in known["captions"])
        return cls(**known)

    @property
    def name(self) -> str:
        """What tells it from the other rows, in batches."""
        number = self.crop.partition(" ")[2]
        return self.id + f" (crop {number})" * bool(number) + MIRRORED * self.mirrored

    @property
    def row(self) -> dict[str, Any]:
        """As the manifest keeps it."""
        usual = {key.name: key.default for key in fields(self)}
        given = {key: value for key, value in vars(self).items() if value != usual[key] or key in _ALWAYS}
        if self.size:
            given["size"] = list(self.size)
        if self.captions:
            given["captions"] = [[text, weight] for text, weight in self.captions]
        return given

    @property
    def origin(self) -> tuple[Any, ...]:
        """All that its tensors are made from, besides the settings."""
        given = {key: getattr(self, key) for key in ("size", "crop", "weights") if getattr(self, key)}
        return self.image, self.text, self.mirrored, *([given] if given else [])


def of_base(base: BaseInfo, *, without: Sequence[str]) -> dict[str, Any]:
    """What latents and embeddings depend on of the base, and the format: hashes of its parts but some."""
    parts: dict[str, Any] = {part: base.hash_of(part) for part in base.parts if part not in without}
    if base.family.zeros_when_empty:
        parts["zeros_when_empty"] = base.zeros_when_empty
    return {"format": _FORMAT, "family": base.family.name, **parts}


def hash_of(prompts: Sequence[str]) -> str:
    """The setting `prompts` of a cache that is made from these."""
    return sha256_bytes(json.dumps(list(prompts)).encode())


def settings(base: BaseInfo, data: Data, precision: str = FULL) -> dict[str, Any]:
    """All but the records that latents and embeddings depend on, or that says where they come from.

    `precision`: what images are encoded in (`vae_precision.settle`).
    """
    keys = ("path", "regularization", "resolution", "flip")
    columns = ("split", "image_column", "caption_column")  # in a folder of images they mean nothing
    return {
        **of_base(base, without=("unet", "scheduler")),
        **{f"data.{key}": getattr(data, key) for key in (*keys, *columns)},
        **row_settings.of(base, data),
        **({} if precision == FULL else {KEY: precision}),
    }


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between two `settings`, in words."""
    new = row_settings.without_old(old, new)
    old, new = ({"resolutions": [], KEY: FULL, **side} for side in (old, new))
    changed = [key for key, value in new.items() if not _alike(key, old.get(key), value)]
    return [
        _NAMES[key] if key in _NAMES else f"{key} ({old.get(key)!r} there, {new[key]!r} here)"
        for key in changed
    ]


def _alike(key: str, old: Any, new: Any) -> bool:
    """Whether two values are equal, or two paths, as one relative and one absolute, of the same folder."""
    if key in _PLACES and isinstance(old, str) and isinstance(new, str) and Path(new).exists():
        return Path(old).resolve() == Path(new).resolve()
    return bool(old == new)


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between two manifests, in words: settings, then rows by number."""
    words = differences(old["settings"], new["settings"])
    before, after = ({row["id"]: row for row in side["records"]} for side in (old, new))
    both = before.keys() & after.keys()
    row, text = ("prompt",) * 2 if all(id.startswith(PROMPTS) for id in after) else ("image", "caption")
    cuts = sum(any(before[id].get(key) != after[id].get(key) for key in ("size", "crop")) for id in both)
    counts = {
        f"{row} changed": sum(before[id]["image"] != after[id]["image"] for id in both),
        f"{text} changed": sum(before[id]["text"] != after[id]["text"] for id in both),
        "mask changed": sum(before[id].get("weights") != after[id].get("weights") for id in both),
        f"{row} added": len(after.keys() - before.keys()),
        f"{row} removed": len(before.keys() - after.keys()),
    }
    for what, count in counts.items():
        noun, verb = what.split()
        if count:
            words.append(f"{count} {noun}{'s' * (count > 1)} {verb}")
    if cuts:
        words.append(f"{cuts} {row}{'s' * (cuts > 1)} cut otherwise")
    if old["skipped"] != new["skipped"]:
        words.append("other records left out")
    if old.get("rights") != new.get("rights"):
        words.append("what metadata says of licences, sources and consents changed")
    if not words and old["shards"] != new["shards"]:
        words.append("records in another order, or other shards")
    return words


@dataclass(frozen=True)
class Shard:
    """The plan of one shard."""

    file: str
    content: str  # hash of the settings and of what each entry is made from
    entries: Sequence[Entry]

    def __len__(self) -> int:
        """Rows."""
        return len(self.entries)

    @property
    def row(self) -> own_shapes.Shard:
        """As the manifest keeps it."""
        found: own_shapes.Shard = {"file": self.file, "content": self.content, "rows": len(self)}
        if (size := self.entries[0].size) is not None:
            found["size"] = list(size)
        return found


def content_hash(settings: Mapping[str, Any], entries: Sequence[Entry] = ()) -> str:
    """Hash of all that the tensors of `entries` are made from."""
    rows = [entry.origin for entry in entries]
    return sha256_bytes(json.dumps([made_by(settings), rows], sort_keys=True).encode())


def made_by(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of the settings what tensors follow from, besides what each record is, which its own hashes say."""
    return {
        key: value
        for key, value in settings.items()
        if (key in _NAMES or key.startswith(_MAKING)) and key not in _BY_ROW
    }


def without_places(settings: Mapping[str, Any]) -> dict[str, Any]:
    """All `settings` but where things lie."""
    return {key: value for key, value in settings.items() if key not in _PLACES}


def plan(settings: Mapping[str, Any], entries: Sequence[Entry], size: int) -> list[Shard]:
    """Entries in shards of `size` rows, each of one shape and one source, and in order.

    Those of `data.regularization` come last, squares of the resolution before other shapes.
    """
    groups: dict[tuple[bool, tuple[int, int]], list[Entry]] = {}
    for entry in entries:
        groups.setdefault((entry.id.startswith(GENERAL), entry.size or (0, 0)), []).append(entry)
    by_shape = [groups[key] for key in sorted(groups)]
    parts = [rows[first : first + size] for rows in by_shape for first in range(0, len(rows), size)]
    return [
        Shard(f"shard-{number:05d}.safetensors", content_hash(settings, part), part)
        for number, part in enumerate(parts)
    ]


def empty(settings: Mapping[str, Any]) -> Shard:
    """The plan of the empty condition's file, which has no rows."""
    return Shard(EMPTY, content_hash(settings), ())


def gathered(batches: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of a shard: `latents` [n, C, h, w], `embeds` [m, L, D] of m captions, in order of the rows.

    SDXL adds `pooled` [m, P] and `time_ids` [n, 6]. Where some rows have a mask, `weights` uint8
    [n, 1, h, w]; where some have several captions, `captions` int64 [n] says how many, `caption_weights` [m]
    how much each counts.
    """
    names = dict.fromkeys(name for batch in batches for name in batch)
    usual = {
        "weights": lambda of: torch.full((len(of), 1, *of.shape[2:]), WHOLE, dtype=torch.uint8),
        "captions": lambda of: torch.ones(len(of), dtype=torch.int64),
        "caption_weights": lambda of: torch.ones(len(of)),
    }
    found = {}
    for name in names:
        each = [batch[name] if name in batch else usual[name](batch["latents"]) for batch in batches]
        found[name] = joined(each) if name == "embeds" else torch.cat(each)
    return found


def intact(path: Path, content: str) -> bool:
    """Whether the shard at `path` was made from `content` and its tensors are those that were written."""
    return own_files.made_from(path) == content and own_files.is_whole(path)


def missing(folder: Path, planned: Sequence[Shard]) -> list[Shard]:
    """The shards that are not in `folder`, were made from something else, or are damaged."""
    return [shard for shard in planned if not intact(folder / shard.file, shard.content)]


def require_intact(path: Path, content: str) -> None:
    """Raise `UserError` if a shard that a manifest names is not what was written."""
    if not intact(path, content):
        raise UserError(
            f"cache {str(path.parent)!r} is unfinished or damaged at {path.name}; run `lcm-kit encode` with "
            "this config again, which makes that file anew and keeps the others"
        )


def manifest(
    base: BaseInfo,
    data: Data,
    shards: Sequence[Shard],
    skipped: Sequence[tuple[str, str]],
    made_by: Mapping[str, Any],
) -> dict[str, Any]:
    """What manifest.json holds: `made_by`, the `settings` of the cache, and its rows."""
    return {
        "settings": dict(made_by),
        **origin(base, data),
        "shards": [shard.row for shard in shards],
        "skipped": [{"id": id, "reason": reason} for id, reason in skipped],
        "records": [entry.row for shard in shards for entry in shard.entries],
    }


def origin(base: BaseInfo, data: Data) -> dict[str, Any]:
    """What a manifest says besides, for people: base, config and versions."""
    where = {"path": base.path, "revision": base.revision, "variant": base.variant}
    return {
        "base": {**where, "scaling_factor": base.scaling_factor, "shift_factor": base.shift_factor},
        "data": asdict(data),
        "versions": {"lcm-kit": __version__, **dict(_versions())},
    }


def _versions() -> Iterator[tuple[str, str]]:
    for name in ("torch", "diffusers", "transformers", "safetensors", "pillow"):
        try:
            yield name, version(name)
        except PackageNotFoundError:
            continue


def write_manifest(folder: Path, new: Mapping[str, Any]) -> None:
    """Write manifest.json."""
    own_files.write_json(folder / MANIFEST, new)


def tidy(folder: Path, new: Mapping[str, Any]) -> None:
    """Remove shards that the manifest of the cache, `new`, does not name."""
    named = {shard["file"] for shard in new["shards"]}
    for path in folder.glob("shard-*.safetensors"):
        if path.name not in named:
            discard(path)


def read_manifest(folder: Path, *, repair: bool = False) -> own_shapes.Cache | None:
    """manifest.json of a cache; None if there is none.

    Raises `UserError` if it is not what was written: with `repair` that is None too if there is a shard of
    ours, for `encode` writes it anew, and the shards say themselves whether they are done.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        return own_files.read_json(path, own_shapes.Cache, _OTHER if repair else _AGAIN)
    except own_files.Damaged:
        if repair and any(map(own_files.made_from, folder.glob("*.safetensors"))):
            return None
        raise  # it may be a stranger's
