"""Reads a folder of latents and text embeddings, which `lcm-kit encode` made, by rows.

Training then needs neither the VAE nor the text encoder. The folder's format is the affair of `shards.py`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from lcm_kit.bases import BaseInfo
from lcm_kit.bases.condition import Condition
from lcm_kit.config.schema import Data
from lcm_kit.data import shards, vae_precision
from lcm_kit.data.encoder import CONDITION
from lcm_kit.errors import UserError
from lcm_kit.io import own_files, own_shapes
from lcm_kit.io.files import sha256_bytes


@dataclass(frozen=True, eq=False)
class Cache:
    """A finished cache. Its shards are mapped into memory, and what is asked for is gathered from there.

    The operating system reads what is touched, and keeps it as long as there is room.
    """

    folder: Path
    ids: list[str]
    captions: list[str]
    images: list[str]  # hash of each row's image file: the same for a picture and its mirror image
    _shards: list[own_shapes.Shard] = field(repr=False)
    _empty_content: str = field(repr=False)  # content hash of the empty condition's file

    @staticmethod
    def open(
        folder: Path | str, *, base: BaseInfo, data: Data, settings: Mapping[str, Any] | None = None
    ) -> Cache:
        """The cache in `folder`, if it was made for this base and these settings, of images unless given.

        Raises `UserError` if it is missing, unfinished, damaged, or was made for another VAE, text encoder,
        resolution or source; what is in a shard is looked at when it is first read (`shards.intact`).
        """
        folder = Path(folder)
        found = shards.read_manifest(folder)
        if found is None:
            raise UserError(
                f"there is no finished cache in {str(folder)!r}; run `lcm-kit encode` with this config first"
            )
        precision = vae_precision.known(folder, base, data, found["settings"]) or vae_precision.FULL
        wanted = settings or shards.settings(base, data, precision)
        changed = shards.differences(found["settings"], wanted)
        if changed:
            raise UserError(
                f"cache {str(folder)!r} was made for another config ({'; '.join(changed)}); run "
                "`lcm-kit encode` with this config first"
            )
        for shard in found["shards"]:  # by their headers; their tensors are looked at when they are opened
            if own_files.made_from(folder / shard["file"]) != shard["content"]:
                shards.require_intact(folder / shard["file"], shard["content"])
        rows = found["records"]
        ids = [row["id"] + " (mirrored)" * row["mirrored"] for row in rows]
        captions, images = ([row[key] for row in rows] for key in ("caption", "image"))
        return Cache(folder, ids, captions, images, found["shards"], shards.content_hash(wanted))

    @property
    def fingerprint(self) -> str:
        """Hash of all that the cached tensors were made from: images, captions, resolution and base."""
        return sha256_bytes("".join(shard["content"] for shard in self._shards).encode())

    def __len__(self) -> int:
        """Rows: images, twice as many with data.flip."""
        return len(self.ids)

    def latents(self, index: int | Sequence[int]) -> Tensor:
        """Latents [n, C, h, w], float32, of the rows at `index` (one row: n = 1)."""
        return self._rows("latents", index)

    def condition(self, index: int | Sequence[int]) -> Condition:
        """The conditions of the rows at `index`, float32."""
        first = _mapped(self.folder / self._shards[0]["file"], self._shards[0]["content"])
        held = [name for name in CONDITION if name in first]
        return Condition(**{name: self._rows(name, index) for name in held})

    def empty(self, n: int = 1) -> Condition:
        """The condition of an unconditional pass, n times, float32; without sizes (`Condition.sized_as`)."""
        shards.require_intact(self.folder / shards.EMPTY, self._empty_content)
        return Condition(**load_file(self.folder / shards.EMPTY)).expand(n)

    def _rows(self, name: str, index: int | Sequence[int]) -> Tensor:
        """The rows at `index`, in that order: one gather from each shard that has some of them."""
        starts = [0, *accumulate(shard["rows"] for shard in self._shards)]
        places: dict[int, list[tuple[int, int]]] = {}  # by shard: where a row goes, and its place there
        wanted = [index] if isinstance(index, int) else index
        for place, i in enumerate(wanted):
            number = bisect_right(starts, i) - 1
            places.setdefault(number, []).append((place, i - starts[number]))
        parts = []
        for number, found in places.items():
            shard = self._shards[number]
            rows = _mapped(self.folder / shard["file"], shard["content"])[name]
            parts.append(rows.index_select(0, torch.tensor([row for _, row in found])))
        if len(parts) == 1:
            return parts[0]
        order = [place for found in places.values() for place, _ in found]
        whole = parts[0].new_empty(len(wanted), *parts[0].shape[1:])
        for part, into in zip(parts, torch.tensor(order).split([len(part) for part in parts]), strict=True):
            whole.index_copy_(0, into, part)
        return whole


@cache  # of a shard that is used once an address: a run that looked at one again would read for minutes
def _mapped(path: Path, content: str) -> dict[str, Tensor]:
    """The tensors of a shard, by name, mapped from its file: read where they are touched, never written to.

    `content` is in the key so that a shard that was written anew is mapped anew. Raises `UserError` if its
    tensors are not those that were written.
    """
    shards.require_intact(path, content)
    with safe_open(path, framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
