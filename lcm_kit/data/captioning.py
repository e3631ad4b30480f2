"""Captions for pictures that have none: written by a model into a table, and accepted from it by a person."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from lcm_kit.config.data import Captions, Data
from lcm_kit.data.caption_files import Bad
from lcm_kit.data.caption_review import REVIEW, ReviewFile, Row
from lcm_kit.data.caption_tables import same, stem
from lcm_kit.data.caption_tags import in_front
from lcm_kit.data.progress import progress_bar
from lcm_kit.data.records import Record, list_source, pictures
from lcm_kit.drawing.batches import Batches
from lcm_kit.errors import UserError
from lcm_kit.io.files import atomic_write, require_writable
from lcm_kit.io.locks import held

Say = Callable[[Sequence[Image.Image]], list[str]]
"""Captions of RGB pictures."""
_EVERY = 5.0  # seconds after which what is captioned is written: all that a killed process loses
_AHEAD = 64  # pictures that are read at once, however many the model takes
_LARGEST = 1536  # pixels of the longer side that a picture is shown at most; models take fewer


@dataclass(frozen=True)
class Captioned:
    """What a run of captioning did."""

    table: Path
    rows: int  # of the table
    written: int  # of them by this run
    had: int  # pictures that were passed over because they have a caption
    silent: list[str]  # of which the model said nothing that can be used: their rows are rejected
    unread: list[Bad]  # that cannot be read: they have no row


@dataclass(frozen=True)
class Accepted:
    """What became of the rows of a table."""

    files: list[Path]  # caption files that were written
    had: list[str]  # pictures that have another caption, which stays
    rejected: int
    gone: list[str]  # pictures that are not there any more


def caption(
    folder: Path, table: Path | None, load: Callable[[], Say], batch_size: int, *, trigger: str | None = None,
    overwrite: bool = False, progress: bool = True,
) -> Captioned:  # fmt: skip
    """Caption the pictures of `folder` that have no caption, or with `overwrite` all, into the table.

    Pictures that have a row keep it, whatever its status. `load` is called if there is any to caption;
    `trigger` is put before captions that lack it. Raises `UserError` for a folder without pictures, a table
    that is none, and as `load`.
    """
    place = table or folder / REVIEW
    every = _records(folder)
    require_writable(place.parent)
    with held(place.parent, "caption"):
        file = ReviewFile(place)
        told = set() if overwrite else _captioned(folder)
        todo = [each for each in every if each.id not in told and each.id not in file.rows]
        found = _work(todo, load, batch_size, file, trigger, progress) if todo else ([], [])
        if not place.is_file():
            file.write()
    return Captioned(place, len(file.rows), len(todo) - len(found[1]), len(told), *found)


def _work(
    todo: Sequence[Record], load: Callable[[], Say], batch_size: int, file: ReviewFile, trigger: str | None,
    progress: bool,
) -> tuple[list[str], list[Bad]]:  # fmt: skip
    """Caption `todo` into `file`: of which the model said nothing, and which cannot be read."""
    say, silent, unread, waiting = load(), [], [], []
    batches = Batches(batch_size, "captioning a picture", "choose a smaller model, or another device")
    at, written = 0, time.monotonic()
    with progress_bar(progress) as bar, ThreadPoolExecutor() as pool:
        task = bar.add_task("captioning", total=len(todo))
        try:
            while at < len(todo):
                part = todo[at : at + max(batch_size, _AHEAD)]
                opened = [(record, *read) for record, read in zip(part, pool.map(_open, part), strict=True)]
                unread += [(record.id, reason) for record, _, reason in opened if reason]
                good = [(record, image) for record, image, _ in opened if image is not None]
                for rows in batches.run(good, lambda _, some: _rows(say, some, trigger)):
                    waiting += rows
                    silent += [row.picture for row in rows if not row.caption]
                    bar.advance(task, len(rows))
                    if time.monotonic() - written > _EVERY:
                        file.write(waiting)
                        waiting, written = [], time.monotonic()
                bar.advance(task, len(part) - len(good))
                at += len(part)
        finally:
            if waiting:
                file.write(waiting)
    return silent, unread


def _rows(say: Say, some: Sequence[tuple[Record, Image.Image]], trigger: str | None) -> list[Row]:
    said = say([image for _, image in some])
    return [
        Row(record.id, in_front(text, trigger) if trigger else text)
        if text
        else Row(record.id, "", "rejected")
        for (record, _), text in zip(some, said, strict=True)
    ]


def _open(record: Record) -> tuple[Image.Image | None, str]:
    """A picture to be shown, or why it cannot be read."""
    try:
        image = record.load()
    except UserError as error:
        return None, str(error)
    except OSError as error:
        return None, f"unreadable image: {error.strerror or error}"
    image.thumbnail((_LARGEST, _LARGEST))
    return image, ""


def accept(folder: Path, table: Path | None = None, *, overwrite: bool = False) -> Accepted:
    """Write the rows of the table that are not rejected as caption files beside their pictures.

    A picture that has a caption of any kind keeps it, unless `overwrite`. Rows that were written are marked
    so and not written again. Raises `UserError` for a table that is not there or not as it was written.
    """
    place = table or folder / REVIEW
    there = {same(record.id): record.id for record in _records(folder)}
    with held(place.parent, "caption"):
        file = ReviewFile(place)
        if not place.is_file():
            raise UserError(f"{place}: there is no such table; write one with `lcm-kit caption`")
        told = _captioned(folder)
        stems = Counter(stem(id) for id in there)
        done: list[tuple[Row, Path]] = []
        had, gone = [], []
        for row in file.rows.values():
            id = there.get(same(row.picture))
            if row.status in ("rejected", "written") or not row.caption:
                continue
            if id is None:
                gone.append(row.picture)
                continue
            alone = stems[stem(same(id))] == 1  # else NAME.txt would be another picture's too
            path, text = folder / (f"{stem(id)}.txt" if alone else f"{id}.txt"), f"{row.caption}\n".encode()
            there_already = path.is_file() and path.read_bytes() == text  # by a run that was killed
            if id in told and not overwrite and not there_already:
                had.append(id)
                continue
            atomic_write(path, text)
            done.append((row, path))
        if done:
            file.write(replace(row, status="written") for row, _ in done)
    rejected = sum(row.status == "rejected" or not row.caption for row in file.rows.values())
    return Accepted([path for _, path in done], had, rejected, gone)


def _records(folder: Path) -> list[Record]:
    if folder.is_file():
        raise UserError(f"{folder} is a file; give a folder of pictures, in which captions can be written")
    return pictures(folder, str(folder))


def _captioned(folder: Path) -> set[str]:
    """Pictures for which something is written, whatever it is worth: it is a person's to put right."""
    listing = list_source(Data(path=str(folder), kind="folder", captions=Captions(layout="plain")))
    without = {id for id, reason in listing.bad if reason.startswith("no caption: there is neither")}
    return {record.id for record in listing.good} | ({id for id, _ in listing.bad} - without)
