"""What was drawn, kept by what made it, so that a stopped evaluation goes on and another measures only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path

import torch
from torch import Tensor

from lcm_kit.errors import UserError
from lcm_kit.io import own_files
from lcm_kit.io.files import discard
from lcm_kit.share import Share

Rows = dict[str, Tensor]  # every tensor [N, ...]: a row a sample


def kept(file: Path, make: Callable[[], Sequence[Rows]], share: Share) -> Rows:
    """The table of a cell: from `file` if it is there, else what `make` gives, written to `file`.

    `make` returns this process's batches, which are its share of all, every `share.world`-th; the first
    process joins those of all processes in order. `file` is named `CELL-KEY.safetensors`; other keys of the
    same cell are from other inputs and are removed. A damaged one is drawn again.
    """
    missing = not own_files.is_whole(file)
    share.wait()  # nobody may see what another writes
    try:
        if missing:
            tensors = {
                f"{k:06d}/{name}": value for k, rows in enumerate(make()) for name, value in rows.items()
            }
            own_files.write_tensors(_part(file, share.rank), tensors)
        share.wait()
        if missing and share.first:
            _join(file, share.world)
    except BaseException:
        with suppress(UserError):  # the one that is raised says more
            discard(_part(file, share.rank))
        raise
    if share.first:
        for rank in range(share.world):  # a killed process may have left some
            discard(_part(file, rank))
    share.wait()
    return own_files.read_tensors(file, "evaluate again, which draws it anew")


def _join(file: Path, world: int) -> None:
    """Write `file` of the parts of all processes, and remove what is of other inputs."""
    turns = zip_longest(*(_batches(_part(file, rank)) for rank in range(world)))
    batches = [batch for turn in turns for batch in turn if batch is not None]
    cell = file.stem.rpartition("-")[0]
    for old in file.parent.glob(f"{cell}-{'?' * 12}.safetensors"):
        discard(old)
    own_files.write_tensors(
        file, {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    )


def _part(file: Path, rank: int) -> Path:
    return file.with_name(f"{file.stem}.part{rank}.safetensors")


def _batches(file: Path) -> list[Rows]:
    found: dict[str, Rows] = {}
    for key, tensor in own_files.read_tensors(file, "evaluate again").items():
        batch, _, name = key.partition("/")
        found.setdefault(batch, {})[name] = tensor
    return list(found.values())
