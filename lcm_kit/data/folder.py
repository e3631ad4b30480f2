"""The check of a folder of brand images before anything is trained: what would stop or spoil a run.

What counts as an image and as its caption is decided in `records.py`, and what becomes of a picture in
`transforms.py`, so that this check and `encode` never disagree.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from lcm_kit.assets import place
from lcm_kit.bases import BaseInfo
from lcm_kit.config.schema import Data
from lcm_kit.data import folder_captions, folder_pictures, folder_reading, rights
from lcm_kit.data.buckets import Shaper
from lcm_kit.data.findings import Finding, Weight, few, number
from lcm_kit.data.folder_pictures import Look
from lcm_kit.data.left_out import LeftOut
from lcm_kit.data.records import Bad, Listing, Record, left_out_of, list_source
from lcm_kit.data.rights import Rights
from lcm_kit.errors import UserError

_LITTLE, _FEW, _MANY = 10, 20, 500  # pictures


@dataclass(frozen=True)
class FolderCheck:
    """What was found in a folder, in whole sentences.

    `encode` stops on each of `errors`; `warnings` are worth fixing first; `notes` are good to know.
    """

    count: int  # images there, with those that cannot be used
    errors: tuple[str, ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def remarks(self) -> list[str]:
        """The warnings, then the notes, each with `warning: ` or `note: ` before it."""
        return [f"warning: {text}" for text in self.warnings] + [f"note: {text}" for text in self.notes]


def check_folder(
    path: str, *, resolution: int, trigger: str | None = None, require_license: Sequence[str] = ()
) -> FolderCheck:
    """Look at every image and caption of `path`: a folder (as `data.path`, also `asset:NAME`).

    `resolution` is what will be trained at, in pixels; `trigger` the word or phrase that should stand in
    every caption; `require_license` as `data.require_license`. Every image is decoded once, by threads. What
    the user can fix in the folder is never raised: one that is not there is in `errors` as well. Raises
    `UserError` for a resolution that is no multiple of 8.
    """
    if resolution % 8:
        raise UserError(f"--resolution {resolution} is not a multiple of 8; try {resolution // 8 * 8 or 8}")
    folder = Path(path)
    try:
        folder = place(path)
        data = Data(path=path, kind="folder", resolution=resolution, require_license=tuple(require_license))
        return _check(data, trigger)
    except UserError as error:
        remarks = list(_left_out(left_out_of(folder)))
        return FolderCheck(0, (f"{error}.",), tuple(_of("warning", remarks)), tuple(_of("note", remarks)))


def check_data(data: Data, base: BaseInfo | None = None) -> FolderCheck:
    """`check_folder` for any `data.path`, also a data set; with `data.skip_bad` bad records are warnings.

    Pictures of `data.regularization` are not looked at, and captions are not measured: the base's tokenizer
    does that (`families.too_long`). `base`: what is trained, whose shapes pictures are cut to. Raises
    `UserError` if there is no such source, or nothing in it.
    """
    return _check(data, data.trigger, estimate=False, base=base)


def reading(data: Data) -> tuple[str, ...]:
    """What is to be said of how the captions were read, without opening an image, as `FolderCheck.remarks`.

    Raises `UserError` as `check_data`.
    """
    found = folder_reading.findings(_as_written(data), data)
    return tuple(f"{finding.weight}: {finding.sentence}" for finding in found)


def _as_written(data: Data) -> Listing:
    how = replace(data.captions.unshuffled, trigger_in_front=False)
    return list_source(replace(data, captions=how))


def _shaper(data: Data, base: BaseInfo | None) -> Shaper:
    return Shaper.usual(data) if base is None else Shaper.of(base, data)


def _check(
    data: Data, trigger: str | None, estimate: bool = True, base: BaseInfo | None = None
) -> FolderCheck:
    listing = _as_written(data)
    good, bad = listing.good, listing.bad
    folder = place(data.path)
    looks, broken = _look(good + _uncaptioned(folder, bad))
    usable = {record.id for record in good} - {id for id, _ in broken}
    findings = [
        *_stopping(broken, bad, data.skip_bad and bool(usable)),
        *folder_reading.findings(listing, data),
        *folder_captions.findings(folder_reading.texts_of(listing, data), trigger, estimate=estimate),
        *_amount(looks),
        *_left_out(listing.left_out),
        *_rights({record.id: record.rights for record in good}, data.require_license),
        *folder_pictures.findings(looks, _shaper(data, base), data.resolution),
    ]
    count = len({id for id, _ in broken} | {look.id for look in looks})
    return FolderCheck(count, *(tuple(_of(weight, findings)) for weight in ("error", "warning", "note")))


def _rights(told: Mapping[str, Rights], among: Sequence[str]) -> Iterator[Finding]:
    if sentence := rights.not_allowed(told, among):
        yield Finding("error", f"{sentence}.")
    yield from rights.findings(told)


def _of(weight: str, findings: Iterable[Finding]) -> Iterator[str]:
    return (finding.sentence for finding in findings if finding.weight == weight)


def _uncaptioned(folder: Path, bad: Sequence[Bad]) -> list[Record]:
    """The images without a usable caption: they are looked at too, so that all is said at once."""
    # a name of a table that no file system holds is an error of pathlib's, and no file here
    return [Record(id, (), (folder / id).read_bytes) for id, _ in bad if os.path.isfile(folder / id)]


def _look(records: Sequence[Record]) -> tuple[list[Look], list[Bad]]:
    """What each readable image shows, and the others with the reason."""
    pool = ThreadPoolExecutor()
    try:
        seen = [pool.submit(partial(_try, record)) for record in records]
        found = [each.result() for each in seen]
    finally:
        pool.shutdown(cancel_futures=True)  # an interrupt must not wait for all that is in the queue
    return [x for x in found if isinstance(x, Look)], [x for x in found if not isinstance(x, Look)]


def _try(record: Record) -> Look | Bad:
    try:
        return folder_pictures.look(record)
    except UserError as error:
        return record.id, str(error).removeprefix("unreadable image: ")
    except OSError as error:
        return record.id, str(error.strerror or error)


def _stopping(broken: Sequence[Bad], bad: Sequence[Bad], skipped: bool) -> Iterator[Finding]:
    """Images that cannot be read and captions that cannot be used: `encode` stops, or leaves them out."""
    weight: Weight = "warning" if skipped else "error"
    out = " Left out, as data.skip_bad says." if skipped else ""
    if broken:
        what = number(len(broken), "image")
        named = few([f"{id} ({reason})" for id, reason in broken])
        yield Finding(
            weight, f"{what} cannot be read: {named}; save again from the original, or remove.{out}"
        )
    for sentence in folder_captions.unusable(bad):
        yield Finding(weight, sentence + out)


def _amount(looks: Sequence[Look]) -> Iterator[Finding]:
    """Whether there are enough pictures; copies of one file count once."""
    count = len({look.content for look in looks})
    there = f"There {number(count, 'different image', before=('is', 'are'))} that can be read"
    if 0 < count < _LITTLE:
        yield Finding(
            "warning",
            f"{there}: so few are learned by heart before their style is learned; collect {_FEW} or more, as "
            "different from one another as the style allows.",
        )
    elif 0 < count < _FEW:
        yield Finding(
            "note",
            f"{there}: enough to try, but the one or two that are held out from training say little about "
            f"what was learned; with {_FEW} or more it can be judged.",
        )
    elif count > _MANY:
        yield Finding(
            "note",
            f"{there}: a look needs no more than {_MANY}, so keep those that show it best, or give the "
            "training more steps.",
        )


def _left_out(left: LeftOut) -> Iterator[Finding]:
    """What lies there and is not trained on: without a word it would seem to be."""
    if found := left.pictures:
        what = number(len(found), "file", after=("is", "are"))
        yield Finding(
            "warning",
            f"{what} of a kind that is not read and will be passed over: {few(found)}; export as PNG.",
        )
    if found := left.captions:
        what = number(len(found), "caption file", after=("has", "have"))
        yield Finding(
            "warning", f"{what} no picture: {few(found)}; give it the picture's name, or remove it."
        )
    if found := left.unlike:
        what = number(len(found), "image", after=("has", "have"))
        yield Finding(
            "warning",
            f"{what} a second caption that says something else: {few(found)}; the .txt of the same name "
            "counts, so remove the other one.",
        )
    for name in left.review:
        yield Finding(
            "note",
            f"{name} holds a model's captions that nobody looked at yet, and is not read: `lcm-kit caption "
            "FOLDER --accept` makes caption files of those that it does not reject.",
        )
    if found := left.written:
        what = number(len(found), "folder", after=("is", "are"))
        yield Finding(
            "note",
            f"{what} this kit's own, a run or a cache, and left out: {few(found)}; better keep it elsewhere.",
        )
    if found := left.linked_twice:
        what = number(len(found), "link", after=("leads", "lead"))
        yield Finding("note", f"{what} to a folder that is read already: {few(found)}; read once.")
    if found := left.others:
        what = number(len(found), "file", after=("is", "are"))
        yield Finding("note", f"{what} neither picture nor caption and left out: {few(found)}.")
