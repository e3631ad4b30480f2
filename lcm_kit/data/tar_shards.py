"""Records of a tar file in webdataset's layout, one after another as they come; nothing else is held.

Files of one record follow one another and have one name up to the first dot: 000123.jpg, 000123.txt,
000123.json. tarfile reads the headers. It ends without a word where an archive is cut off or a header is
broken, and so do the libraries that read by it (webdataset, `datasets`); here that is an error, since a data
set that is silently short trains another adapter than its owner thinks.
"""

from __future__ import annotations

import gzip
import io
import posixpath
import re
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import IO, Any, cast

import xxhash

from lcm_kit.config.schema import Data
from lcm_kit.data.caption_files import ENDINGS, Bad
from lcm_kit.data.caption_tables import COLUMN, JSON, LARGEST_JSON, captioned, loaded, says_something
from lcm_kit.data.caption_tags import of_cell
from lcm_kit.data.image_files import HEAD, SUFFIXES, UNREAD, is_picture
from lcm_kit.data.records import MASK, Record
from lcm_kit.data.rights import NOTHING, Rights
from lcm_kit.errors import UserError, first_line
from lcm_kit.io.reading import Reader
from lcm_kit.io.urls import At
from lcm_kit.io.written import LONGEST, decoded

_LARGEST = 1 << 30  # bytes of a picture: more is none
_JSON = JSON.lstrip(".")
_NO_RECORD = re.compile(r"(__[^/]*__|\..*|__MACOSX)$")  # webdataset's own notes, hidden files
_IMAGE = "image"  # the default of data.image_column: any picture
_MASK = f"{MASK.lstrip('.')}."  # begins the ending of the picture that says what counts in another
_BLOCK = tarfile.BLOCKSIZE


def records(place: At, name: str, data: Data) -> Iterator[Record | Bad]:
    """The records of the tar file at `place`, in its order, ids `name`/KEY; or what is wrong with each.

    `data.image_column` and `data.caption_column` choose among several files of a record by their endings, as
    `hr.jpg`, or a caption's key in its .json. Raises `UserError` if the file is cut off, broken or cannot be
    read, which says how many records came before.
    """
    seen: set[int] = set()  # hashes of keys, of this file alone: to notice one that comes twice
    for group in _groups(place):
        if not group.is_record:
            continue
        mark = xxhash.xxh3_64_intdigest(group.key.encode("utf-8", "surrogateescape"))
        id = f"{name}/{group.key}"
        if mark in seen:
            yield id, "its name came before in this file; files of one record must follow one another"
            continue
        seen.add(mark)
        yield _record(id, group, data)


@dataclass
class _Group:
    """The files of one record."""

    key: str
    pictures: dict[str, bytes] = field(default_factory=dict)  # by ending, as "jpg" or "hr.png"
    texts: dict[str, bytes] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)  # endings of what is not read
    faults: list[str] = field(default_factory=list)

    @property
    def is_record(self) -> bool:
        """Whether anything in it is a picture, of whatever kind, or may be a caption."""
        unread = any(other.endswith(UNREAD) for other in self.others)
        return bool(self.pictures or self.texts or self.faults or unread)


def _record(id: str, group: _Group, data: Data) -> Record | Bad:
    if group.faults:
        return id, group.faults[0]
    try:
        content = _picture(group, data.image_column)
        given, weight = _caption(group, data)
        captions, reason = of_cell(given, data, weight)
    except UserError as error:
        return id, str(error)
    if reason:
        return id, reason
    mask = next((each for ending, each in group.pictures.items() if ending.startswith(_MASK)), None)
    return Record(
        id, captions, lambda: content, mask=None if mask is None else lambda: mask, rights=_rights(group)
    )


def _rights(group: _Group) -> Rights:
    """What its JSON objects say of them; a JSON file that is none says nothing here."""
    found = NOTHING
    for name, content in group.texts.items():
        if name.endswith(_JSON):
            with suppress(UserError):
                found = found.joined(Rights.of(_row(name, content)))
    return found


def _picture(group: _Group, wanted: str) -> bytes:
    found = {ending: each for ending, each in group.pictures.items() if not ending.startswith(_MASK)}
    if wanted != _IMAGE and wanted in found:
        return found[wanted]
    if not found or wanted != _IMAGE:
        what = "no image" if wanted == _IMAGE else f"no {wanted} (data.image_column)"
        there = ", ".join((*group.pictures, *group.texts, *group.others))
        raise UserError(f"{what} of this name in the tar file: there is {there}")
    if len(found) > 1:
        raise UserError(
            f"{len(found)} images with one name up to the first dot: {', '.join(found)}; choose one of these "
            "endings with data.image_column"
        )
    return next(iter(found.values()))


def _caption(group: _Group, data: Data) -> tuple[Any, Any]:
    """What is written as its captions, and their weight, as of a picture in a folder: .txt, .caption, .json.

    Raises `UserError` with the reason where nothing can be read.
    """
    wanted = data.caption_column
    names = [ending.lstrip(".") for ending in ENDINGS] if wanted == COLUMN else [wanted]
    for name in (name for name in names if name in group.texts and not name.endswith(_JSON)):
        return _text(name, group.texts[name]), None
    for name in (name for name in group.texts if name.endswith(_JSON)):
        row = _row(name, group.texts[name])
        if says_something(row, wanted):
            return captioned(row, wanted, data.captions.lines), row.get("weight")
    what = "neither .txt nor .caption, nor a .json with text" if wanted == COLUMN else f"no {wanted}"
    raise UserError(f"no caption: there is {what} of its name beside it in the tar file")


def _text(name: str, content: bytes) -> str:
    try:
        return decoded(content)
    except UnicodeDecodeError as error:
        raise UserError(f"caption file {name} cannot be read ({error})") from error


def _row(name: str, content: bytes) -> dict[str, Any]:
    row = loaded(content)
    if row is None:
        raise UserError(f"{name} is not JSON")
    if not isinstance(row, dict):
        raise UserError(f"{name} holds no JSON object")
    return row


# --- The archive ---


def _groups(place: At) -> Iterator[_Group]:
    """The files of the archive by key, as far as they follow one another."""
    count, group = 0, None
    try:
        with Reader(place) as reader:
            for member, archive in _members(reader):
                key, ending = _named(member.name)
                if not ending:
                    continue
                if group is None or group.key != key:
                    if group is not None:
                        count += group.is_record
                        yield group
                    group = _Group(key)
                _add(group, ending, member, archive)
            if group is not None:
                yield group
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(
            f"{place.shown}: a broken tar file ({first_line(error)}); {count} records could be read before "
            "that: fetch or write it again"
        ) from error


def _named(path: str) -> tuple[str, str]:
    """Key and ending: of a/b.hr.JPG a/b and hr.jpg; no ending for what belongs to no record."""
    folder, base = posixpath.split(posixpath.normpath(path))
    stem, _, ending = base.partition(".")
    if any(_NO_RECORD.match(part) for part in (*folder.split("/"), base)) or not stem:
        return "", ""
    return posixpath.join(folder, stem), ending.lower()


def _add(group: _Group, ending: str, member: tarfile.TarInfo, archive: tarfile.TarFile) -> None:
    """Take a file into its group, if it is one that counts: others are passed over unread."""
    last = f".{ending.rpartition('.')[2]}"
    text = last in (*ENDINGS, JSON)
    if not member.isreg():
        if text or last in SUFFIXES:
            group.faults.append(f"{member.name} is a link, not a file; write the tar file with its content")
        return
    if text and member.size > (LARGEST_JSON if last == JSON else 8 * LONGEST):
        group.faults.append(f"caption is too long: {ending} is no caption of one picture")
        return
    if member.size > _LARGEST:
        if last in SUFFIXES:
            group.faults.append(f"{member.size / 2**30:.1f} GiB; too large for a picture")
        return
    file = cast(IO[bytes], archive.extractfile(member))
    head = file.read(HEAD)
    picture = not text and (last in SUFFIXES or is_picture(head))
    if not picture and not text:
        group.others.append(ending)
        return
    into = group.pictures if picture else group.texts
    if ending in into:
        group.faults.append(f"{member.name} is there twice")
    into[ending] = head + file.read()


def _members(reader: Reader) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarFile]]:
    """The files of an archive that is read once, forward, with checks of all that tarfile passes over."""
    packed = reader.read(2) == b"\x1f\x8b"
    reader.seek(0)
    stream = _Watched(cast(IO[bytes], gzip.GzipFile(fileobj=reader)) if packed else cast(IO[bytes], reader))
    with tarfile.open(fileobj=cast(IO[bytes], stream), mode="r:", errorlevel=2) as archive:
        while (member := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # it would hold all headers
            if not member.isdir():
                yield member, archive
        if stream.last != bytes(_BLOCK):
            broken = len(stream.last) == _BLOCK
            raise tarfile.ReadError(
                f"no header of a file at byte {archive.offset:,}" if broken else "it is cut off: no end mark"
            )
        while rest := stream.read(1 << 20):  # also for the checksum at the end of a .gz
            if rest.strip(b"\0"):
                raise tarfile.ReadError("there is more after its end mark, as of two files that were joined")


class _Watched(io.RawIOBase):
    """A file that is read forward, and what it gave last: whether an archive's end is one."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__()
        self._file, self.last = file, b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def read(self, size: int | None = -1) -> bytes:
        self.last = self._file.read(-1 if size is None else size)
        return self.last
