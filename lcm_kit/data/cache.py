"""Reads a folder of latents and text embeddings, which `lcm-kit encode` made, by rows.

Training then needs neither the VAE nor the text encoder. The folder's format is the affair of `shards.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from lcm_kit.bases import BaseInfo
from lcm_kit.bases.condition import Condition, of_one_length
from lcm_kit.config.schema import Data
from lcm_kit.data import shards, vae_precision
from lcm_kit.data.encoder import CONDITION
from lcm_kit.data.joined import shares
from lcm_kit.data.masks import WHOLE
from lcm_kit.data.order import Run
from lcm_kit.data.shards import Entry
from lcm_kit.errors import UserError
from lcm_kit.io import own_files, own_shapes
from lcm_kit.io.files import sha256_bytes
from lcm_kit.io.remote import Folder


@dataclass(frozen=True, eq=False)
class Cache:
    """A finished cache. Its shards are mapped into memory, and what is asked for is gathered from there.

    The operating system reads what is touched, and keeps it as long as there is room.
    """

    folder: Folder
    entries: list[Entry] = field(repr=False)
    _shards: list[own_shapes.Shard] = field(repr=False)
    _empty_content: str = field(repr=False)  # content hash of the empty condition's file
    rights: own_shapes.Rights | None  # what metadata says of the pictures, in numbers

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
        entries = [Entry.of(row) for row in found["records"]]
        files, empty = Folder.of(folder), shards.content_hash(wanted)
        return Cache(files, entries, found["shards"], empty, found.get("rights"))

    @cached_property  # asked for each sample of each step
    def ids(self) -> list[str]:
        """Names of the rows, in order."""
        return [entry.name for entry in self.entries]

    @cached_property
    def captions(self) -> list[str]:
        """The first caption of each row."""
        return [entry.caption for entry in self.entries]

    @cached_property
    def images(self) -> list[str]:
        """Hash of each row's image file: the same for a picture and its mirror image."""
        return [entry.image for entry in self.entries]

    @cached_property
    def repeats(self) -> list[int]:
        """How often an epoch sees each row."""
        return [entry.repeats for entry in self.entries]

    @cached_property
    def runs(self) -> list[Run]:
        """The rows, in order, by shape: those of one shard are a run or more."""
        found, first = [], 0
        for shard in self._shards:
            shape = tuple(shard.get("size", ()))
            for times, same in groupby(self.repeats[first : first + shard["rows"]]):
                found.append(Run(len(list(same)), shape, times))
            first += shard["rows"]
        return found

    @cached_property
    def several(self) -> bool:
        """Whether any row has several captions."""
        return any(entry.captions for entry in self.entries)

    @property
    def fingerprint(self) -> str:
        """Hash of all that the cached tensors were made from: images, captions, resolution and base."""
        return sha256_bytes("".join(shard["content"] for shard in self._shards).encode())

    def __len__(self) -> int:
        """Rows: images, twice as many with data.flip."""
        return len(self.ids)

    def latents(self, index: int | Sequence[int]) -> Tensor:
        """Latents [n, C, h, w], float32, of the rows at `index` (one row: n = 1), which have one shape."""
        return self._gathered(index, lambda shard, rows: {"latents": shard["latents"].index_select(0, rows)})[
            "latents"
        ]

    def condition(self, index: int | Sequence[int], chances: Sequence[float] | None = None) -> Condition:
        """The conditions of the rows at `index`, float32.

        `chances`: for each a number from 0 to 1 that says which of its captions, by their weights; none: the
        first.
        """
        wanted = [index] if isinstance(index, int) else index
        given = [0.0] * len(wanted) if chances is None else chances

        def of(shard: Mapping[str, Tensor], rows: Tensor, places: Sequence[int]) -> dict[str, Tensor]:
            texts = rows
            if "captions" in shard:
                texts = _chosen(shard, rows, [given[place] for place in places], first=chances is None)
            at = {"time_ids": rows, "embeds": texts, "pooled": texts}
            return {name: shard[name].index_select(0, at[name]) for name in CONDITION if name in shard}

        return Condition(**self._gathered_at(wanted, of))

    def weights(self, index: int | Sequence[int]) -> Tensor | None:
        """How much each cell of the latents at `index` counts, float32 [n, 1, h, w]; None: all alike."""

        def of(shard: Mapping[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
            if "weights" in shard:
                return {"weights": shard["weights"].index_select(0, rows)}
            shape = len(rows), 1, *shard["latents"].shape[2:]
            return {"weights": torch.full(shape, WHOLE, dtype=torch.uint8)}

        if not self.weighted:
            return None
        found = self._gathered(index, of)["weights"]
        return None if bool((found == WHOLE).all()) else found.float() / WHOLE

    @cached_property
    def weighted(self) -> bool:
        """Whether any row has a mask."""
        return any(entry.weights for entry in self.entries)

    def caption(self, row: int, chance: float | None = None) -> str:
        """The caption of a row that `condition` has the embeddings of."""
        return caption_of(self.entries[row], chance)

    def empty(self, n: int = 1) -> Condition:
        """The condition of an unconditional pass, n times, float32; without sizes (`Condition.sized_as`)."""
        return Condition(**mapped(self.folder, shards.EMPTY, self._empty_content)).expand(n)

    def _gathered(
        self, index: int | Sequence[int], of: Callable[[Mapping[str, Tensor], Tensor], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        wanted = [index] if isinstance(index, int) else index
        return self._gathered_at(wanted, lambda shard, rows, _: of(shard, rows))

    def _gathered_at(
        self,
        wanted: Sequence[int],
        of: Callable[[Mapping[str, Tensor], Tensor, Sequence[int]], dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        """What `of(tensors, rows, places)` takes of each shard that has some of the rows, in their order.

        One gather from each; `places`: where in `wanted` the rows are.
        """
        asked, parts = shares(wanted, self._starts), []
        for share in asked:
            shard = self._shards[share.source]
            tensors = mapped(self.folder, shard["file"], shard["content"])
            parts.append(of(tensors, torch.tensor(share.rows), share.places))
        if len(parts) == 1:
            return parts[0]
        into = [torch.tensor(share.places) for share in asked]
        named = {name: [part[name] for part in parts] for name in parts[0]}
        if "embeds" in named:
            named["embeds"] = of_one_length(named["embeds"])
        return {name: placed(each, into, len(wanted)) for name, each in named.items()}

    @cached_property
    def _starts(self) -> list[int]:
        return [0, *accumulate(shard["rows"] for shard in self._shards)]


def caption_of(entry: Entry, chance: float | None) -> str:
    """The caption of a row that `chance`, from 0 to 1, draws by their weights; None: the first."""
    if chance is None or not entry.captions:
        return entry.caption
    shares = torch.tensor([weight for _, weight in entry.captions])
    return entry.captions[int(_places(shares, torch.tensor([len(shares)]), [chance])[0])][0]


def placed(parts: Sequence[Tensor], into: Sequence[Tensor], n: int) -> Tensor:
    """The rows of all `parts` in one tensor of `n`, each at its place `into`."""
    whole = parts[0].new_empty(n, *parts[0].shape[1:])
    for part, places in zip(parts, into, strict=True):
        whole.index_copy_(0, places, part)
    return whole


def _chosen(
    shard: Mapping[str, Tensor], rows: Tensor, chances: Sequence[float], *, first: bool = False
) -> Tensor:
    """Where in a shard's texts the caption of each of `rows` is: int64 [n]; `first`: the first of each."""
    counts = shard["captions"]
    starts = torch.cat([torch.zeros(1, dtype=counts.dtype), counts.cumsum(0)])[rows]
    if first:
        return starts
    own = counts[rows]
    of_rows = [
        shard["caption_weights"][s : s + n] for s, n in zip(starts.tolist(), own.tolist(), strict=True)
    ]
    return starts + _places(torch.cat(of_rows), own, chances)


def _places(weights: Tensor, counts: Tensor, chances: Sequence[float]) -> Tensor:
    """Which of its captions each row has: `weights` of all, one row's after the other; `chances` 0 to 1."""
    found = []
    for own, chance in zip(weights.split(counts.tolist()), chances, strict=True):
        edges = own.double().cumsum(0) / own.double().sum()
        found.append(min(int(torch.searchsorted(edges, chance, right=True)), len(own) - 1))
    return torch.tensor(found)


_MAPPED = 1024  # files that are mapped at once: an operating system bounds the maps of a process


@lru_cache(maxsize=_MAPPED)  # of a shard that is used once an address: to look at it again takes a second
def mapped(folder: Folder, file: str, content: str) -> dict[str, Tensor]:
    """The tensors of a shard, by name, mapped from its file: read where they are touched, never written to.

    Of a folder at an address a copy on this machine is mapped. `content` is in the key so that a shard that
    was written anew is mapped anew. Raises `UserError` if its tensors are not those that were written.
    """
    if not folder.is_remote:
        shards.require_intact(folder.path(file), content)
    return folder.opened(file, content, _map)


def _map(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
