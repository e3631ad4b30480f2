"""Samples kept by what made them, so that a stopped sweep continues and a second one only measures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lcm_kit.files import atomic_file
from lcm_kit.share import Share

Table = dict[str, Tensor]  # every tensor [N, ...]: a row a sample


def kept(file: Path, make: Callable[[], Sequence[Table]], share: Share) -> Table:
    """The table of a cell: from `file` if it is there, else what `make` gives, written to `file`.

    `make` returns this process's batches, which are its share of all, every `share.world`-th; the first
    process joins those of all processes in order. `file` is named `CELL-KEY.safetensors`; other keys of the
    same cell are from other inputs and are removed.
    """
    missing = not file.is_file()
    share.wait()  # nobody may see what another writes
    if missing:
        _write(_part(file, share.rank), make())
    share.wait()
    if missing and share.first:
        parts = [_part(file, rank) for rank in range(share.world)]
        turns = zip_longest(*(_batches(part) for part in parts))
        batches = [batch for turn in turns for batch in turn if batch is not None]
        cell = file.stem.rpartition("-")[0]
        for old in file.parent.glob(f"{cell}-{'?' * 12}.safetensors"):
            old.unlink()
        _write(file, [{name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}])
        for part in parts:
            part.unlink()
    share.wait()
    return _batches(file)[0]


def _part(file: Path, rank: int) -> Path:
    return file.with_name(f"{file.stem}.part{rank}.safetensors")


def _write(file: Path, batches: Sequence[Mapping[str, Tensor]]) -> None:
    tensors = {
        f"{k:06d}/{name}": value.contiguous()
        for k, batch in enumerate(batches)
        for name, value in batch.items()
    }
    with atomic_file(file) as temporary:
        save_file(tensors, temporary)


def _batches(file: Path) -> list[Table]:
    found: dict[str, Table] = {}
    with safe_open(file, "pt") as opened:
        for key in sorted(opened.keys()):
            batch, _, name = key.partition("/")
            found.setdefault(batch, {})[name] = opened.get_tensor(key)
    return list(found.values())
