"""The one loop of `encode`: what is missing is made part by part, each is written whole, the manifest last.

`images.py`, `samples.py`, `prompts.py` and `prior.py` say which rows there are and what computes them. What
is there already, which process makes what, the bar and the order of writing are decided here. A part tells by
itself whether it is done: a run that was stopped, killed or refused by a full disk keeps those that it made.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from lcm_kit import bases, console
from lcm_kit.bases import BaseInfo
from lcm_kit.config.schema import Data
from lcm_kit.console import Progress
from lcm_kit.data import shards
from lcm_kit.data.caption_files import Bad
from lcm_kit.data.encoder import Encoder, tensors_of
from lcm_kit.data.lost import captions_by_name, captions_sentence
from lcm_kit.data.progress import EncodeReport, progress_bar
from lcm_kit.data.shards import Entry, Shard
from lcm_kit.errors import UserError
from lcm_kit.io import own_files, own_shapes
from lcm_kit.io.files import require_writable
from lcm_kit.share import Share

Part = TypeVar("Part", bound=Sized)
"""What is written at once; its length are its rows."""
Advance = Callable[[int], None]
"""Moves the bar by so many rows."""
EncodedBatches = Iterator[Mapping[str, Tensor]]
"""Rows in order, on the CPU: `latents` [n, C, h, w] and the tensors of n conditions."""


@dataclass(frozen=True)
class RowMaker:
    """What computes the rows of a cache, with the models that it needs."""

    encoder: Encoder
    batches: Callable[[Sequence[Entry]], EncodedBatches]
    not_finite: Callable[[Sequence[Entry]], str]  # the sentence for rows that are not
    computed: str = "latents"  # the tensor by which a row is found to be so


@dataclass(frozen=True)
class Contents:
    """What a cache is to hold, and what computes it."""

    base: BaseInfo
    data: Data
    settings: Mapping[str, Any]  # all that the rows are computed from, besides themselves
    entries: Sequence[Entry]
    load: Callable[[bool], RowMaker]  # asked whether rows are missing, or the empty condition alone
    doing: str  # the words of the bar
    skipped: Sequence[Bad] = ()
    rights: own_shapes.Rights | None = None
    remarks: Sequence[str] = ()  # what becomes of the rows, in words
    beside: Callable[[Path], None] | None = None  # writes what lies beside the manifest, for people


Survey = Callable[[Mapping[str, Any] | None, Progress], Contents]
"""(the manifest that is there, a bar for what takes long) -> what there shall be."""


def make_missing(
    folder: Path,
    missing: Sequence[Part],
    load: Callable[[Sequence[Part]], Callable[[Part, Advance], None]],
    doing: str,
    share: Share,
    bar: Progress,
) -> None:
    """Make the `missing` parts of what lies in `folder`: this process its `share`; returns when all are made.

    `load` gets the parts of this process and gives what makes and writes one of them; it is not called where
    there are none. Raises `UserError` if `folder` cannot be written, before anything is loaded.
    """
    share.wait()  # every process has seen which are missing
    if mine := share.of(missing):
        require_writable(folder)
        make = load(mine)
        advance = partial(bar.advance, bar.add_task(doing, total=sum(map(len, mine))))
        for part in mine:
            make(part, advance)
    share.wait()


def bring_up_to_date(
    folder: Path, survey: Survey, progress: bool, share: Share, *, what: str = "images", done: str = "encoded"
) -> EncodeReport:
    """Make what the cache in `folder` lacks of the rows that `survey` finds, and say what was done.

    An interrupted run continues, a second one does nothing. Of several processes each makes its `share` of
    the shards, and the first writes the manifest when all are there. `what` and `done`: words for the rows,
    in the bar and the report. Raises `UserError` as `survey`, `load` and `make_missing` do.
    """
    started, old = time.monotonic(), shards.read_manifest(folder, repair=True)
    with progress_bar(progress and share.first, what.split()[0]) as bar:
        contents = survey(old, bar)
        if share.world > 1:
            share.require_same(_agreed(contents))
        planned = shards.plan(contents.settings, contents.entries, contents.data.shard_size)
        missing = shards.missing(folder, [shards.empty(contents.settings), *planned])
        rows = [entry for shard in missing for entry in shard.entries]
        if share.first:
            say_what_is_cut(contents.base, contents.data, rows)
        make_missing(folder, missing, partial(_load, folder, contents), contents.doing, share, bar)
    new = shards.manifest(contents.base, contents.data, planned, contents.skipped, contents.settings)
    if contents.rights is not None:
        new["rights"] = contents.rights
    changes = [] if old is None else shards.changes(old, new)
    if share.first and (missing or changes or old is None):
        if contents.beside is not None:
            contents.beside(folder)
        shards.write_manifest(folder, new)
    if share.first:
        shards.tidy(folder, new)
    share.wait()
    report = EncodeReport(
        folder, len(contents.entries), len(rows), time.monotonic() - started, changes,
        list(contents.skipped), what, done, list(contents.remarks),
    )  # fmt: skip
    if progress and share.first:
        console.say(report.message)
    return report


def _agreed(contents: Contents) -> dict[str, Any]:
    """What must be the same for all processes that share the work."""
    pictures = shards.content_hash(contents.settings, contents.entries)
    agreed = {**shards.made_by(contents.settings), "data.shard_size": contents.data.shard_size}
    return {**agreed, "set of pictures": pictures}


def say_what_is_cut(base: BaseInfo, data: Data, entries: Sequence[Entry]) -> None:
    """Warn of captions that are longer than what is read of them."""
    texts = captions_by_name((entry.id, entry.captions or [(entry.caption, 1.0)]) for entry in entries)
    cut, room = bases.too_long(bases.load_tokenizers(base), texts, data.chunks)
    if cut:
        longest = max(cut, key=lambda id: cut[id])
        said = captions_sentence(len(cut), longest, cut[longest], room, data.chunks)
        console.say(f"warning: {said}", err=True)


def _load(folder: Path, contents: Contents, mine: Sequence[Shard]) -> Callable[[Shard, Advance], None]:
    maker = contents.load(any(map(len, mine)))

    def make(shard: Shard, advance: Advance) -> None:
        if shard.file == shards.EMPTY:
            own_files.write_tensors(folder / shard.file, tensors_of(maker.encoder.empty()), shard.content)
        else:
            write_shard(folder, maker, shard, advance)

    return make


def write_shard(folder: Path, maker: RowMaker, shard: Shard, advance: Advance) -> None:
    """Compute and write one shard: whole, or not at all. Raises `UserError` as `computed`."""
    made = []
    for entries, batch in computed(maker, shard.entries):
        made.append(batch)
        advance(len(entries))
    own_files.write_tensors(folder / shard.file, shards.gathered(made), shard.content)


def computed(
    maker: RowMaker, entries: Sequence[Entry]
) -> Iterator[tuple[Sequence[Entry], Mapping[str, Tensor]]]:
    """Entries, all of one shape, and their tensors, batch by batch.

    Raises `UserError` if rows are not finite: from such a row nothing can be learned.
    """
    first = 0
    for batch in maker.batches(entries):
        some = entries[first : first + len(batch["latents"])]
        rows = zip(some, batch[maker.computed], strict=True)
        broken = [entry for entry, row in rows if not row.isfinite().all()]
        if broken:
            raise UserError(maker.not_finite(broken))
        yield some, batch
        first += len(some)
