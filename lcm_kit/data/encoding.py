"""How every cache is made: what is missing is, a file at a time, and the manifest says so when all is there.

`images.py`, `samples.py` and `prior.py` say what the rows are and how they are computed; what is there
already, which process makes what, the bar and the order of writing are the affair of this file.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from lcm_kit import own_files
from lcm_kit.config.schema import Data
from lcm_kit.console import Progress
from lcm_kit.data import shards
from lcm_kit.data.caption_files import Bad
from lcm_kit.data.encoder import Encoder, tensors_of
from lcm_kit.data.progress import EncodeReport, finish, progress_bar
from lcm_kit.data.shards import Entry, Shard
from lcm_kit.families import BaseInfo
from lcm_kit.files import require_writable
from lcm_kit.share import Share

T = TypeVar("T")
Advance = Callable[[int], None]  # by how many rows
Batches = Iterator[
    Mapping[str, Tensor]
]  # rows in order, `latents` [n, C, h, w] and a condition's tensors, on the CPU


@dataclass(frozen=True)
class Maker:
    """What computes rows: loaded when something is missing, and not before."""

    encoder: Encoder
    batches: Callable[[Sequence[Entry]], Batches]  # the tensors of entries, a few at a time


@dataclass(frozen=True)
class Rows:
    """What a cache is to hold, and how that is computed."""

    base: BaseInfo
    data: Data
    settings: Mapping[str, Any]  # all that the rows are computed from, besides themselves
    entries: Sequence[Entry]
    load: Callable[[bool], Maker]  # asked whether rows are missing too, or only the empty condition
    doing: str  # the words of the bar
    skipped: Sequence[Bad] = ()
    notice: Callable[[Sequence[Entry]], None] = lambda entries: None  # hears which will be made, once


Survey = Callable[
    [Mapping[str, Any] | None, Progress], Rows
]  # the old manifest, and a bar for what takes long


def bring_up_to_date(
    folder: Path, survey: Survey, progress: bool, share: Share, *, what: str = "images", done: str = "encoded"
) -> EncodeReport:
    """Make what `folder` lacks of the rows that `survey` finds: no shard twice, none that is there.

    An interrupted run continues, a second one does nothing. Of several processes each makes its `share` of
    the shards; the first writes the empty condition, and the manifest when all are done. `what` and `done`:
    words for the rows, in the bar and the report.
    """
    started, old = time.monotonic(), shards.read_manifest(folder, repair=True)
    with progress_bar(progress and share.first, what.split()[0]) as bar:
        rows = survey(old, bar)
        planned = shards.plan(rows.settings, rows.entries, rows.data.shard_size)
        missing = shards.missing(folder, planned)
        if share.first:
            rows.notice([entry for shard in missing for entry in shard.entries])
        share.wait()  # every process has seen which shards are missing
        _make(folder, rows, missing, share, bar)
    share.wait()
    new = shards.manifest(rows.base, rows.data, planned, rows.skipped, rows.settings)
    return finish(folder, old, new, missing, started, progress, share, rows.skipped, what=what, done=done)


def _make(folder: Path, rows: Rows, missing: Sequence[Shard], share: Share, bar: Progress) -> None:
    """Compute and write this process's missing shards, and the empty condition."""
    empty, content = folder / shards.EMPTY, shards.content_hash(rows.settings)
    mine = share.of(missing)
    done = not share.first or shards.intact(empty, content)
    if not mine and done:
        return
    require_writable(folder)  # before the base is loaded for nothing
    maker = rows.load(bool(mine))
    if not done:
        own_files.write_tensors(empty, tensors_of(maker.encoder.empty()), content)
    make_each(mine, partial(write_shard, folder, maker), lambda shard: len(shard.entries), bar, rows.doing)


def make_each(
    items: Sequence[T],
    make: Callable[[T, Advance], None],
    size: Callable[[T], int],
    bar: Progress,
    doing: str,
) -> None:
    """Make one item after the other under a bar that counts their rows."""
    if items:
        advance = partial(bar.advance, bar.add_task(doing, total=sum(map(size, items))))
        for item in items:
            make(item, advance)


def write_shard(folder: Path, maker: Maker, shard: Shard, advance: Advance) -> None:
    """Compute and write one shard: whole, or not at all."""
    made = []
    for batch in maker.batches(shard.entries):
        made.append(batch)
        advance(len(batch["latents"]))
    tensors = {name: torch.cat([batch[name] for batch in made]) for name in made[0]}
    own_files.write_tensors(folder / shard.file, tensors, shard.content)
