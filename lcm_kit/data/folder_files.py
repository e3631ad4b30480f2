"""The files below a folder, or in a zip file, by their paths: also behind links, and without what is no data.

Hidden files and folders are not looked at. A folder that the kit wrote (a run, a cache) is left out: what a
run draws would otherwise be taken for data when `encode` is run again.
"""

from __future__ import annotations

import os
import re
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from lcm_kit.data.shards import EMPTY, MANIFEST
from lcm_kit.errors import UserError

DRAWN = "drawn.json"  # beside pictures that the kit drew: what they were drawn from
_RUN = re.compile(rb"^recipe:", re.MULTILINE)  # in a config.yaml of this kit
_LARGEST = 1 << 30  # bytes of a file in a zip: more is no picture


@dataclass(frozen=True)
class File:
    """A file that can be read, wherever it lies."""

    open: Callable[[], Any]  # a file object to read bytes from

    def read(self, count: int = -1) -> bytes:
        """Its first `count` bytes, or all. Raises `OSError`, and `UserError` for a broken zip file."""
        try:
            with self.open() as handle:
                return handle.read(count)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
            raise UserError(f"cannot be unpacked ({error}); pack the zip file again") from error


@dataclass
class Files:
    """What lies below `root`, by path with `/` between the parts."""

    root: Path
    found: dict[str, File] = field(default_factory=dict)
    bad: list[tuple[str, str]] = field(default_factory=list)  # what cannot be looked at, and why
    written: list[str] = field(default_factory=list)  # folders that the kit wrote
    linked_twice: list[str] = field(default_factory=list)  # links to folders that are read already


def files_of(root: Path) -> Files:
    """The files below the folder, or in the zip file, at `root`. Raises `UserError` for a broken zip."""
    files = Files(root)
    if root.is_dir():
        _walk_all(files)
    else:
        add_zip(files, root)
    return files


def _walk_all(files: Files) -> None:
    """Real folders first, so that a link to one of them takes no name away; then linked ones, each once."""
    seen, links = {os.path.realpath(files.root)}, [("", files.root)]
    while links:
        begin, folder = links.pop(0)
        real = os.path.realpath(folder)
        holds = any(other.startswith(os.path.join(real, "")) for other in seen)
        if begin and (real in seen or holds):
            files.linked_twice.append(begin.rstrip("/"))
            continue
        _walk(files, begin, folder, seen, links)


def _walk(files: Files, begin: str, folder: Path, seen: set[str], links: list[tuple[str, Path]]) -> None:
    """All below one folder; links to other folders are noted in `links`, real folders in `seen`."""
    inside = [(begin, folder)]
    while inside:
        begin, folder = inside.pop()
        seen.add(os.path.realpath(folder))
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            files.bad.append((begin.rstrip("/") or ".", f"folder cannot be read: {error.strerror or error}"))
            continue
        for entry in entries:
            name, path = begin + entry.name, Path(entry.path)
            if entry.name.startswith("."):
                continue
            if reason := _fault(entry):
                files.bad.append((name, reason))
            elif path.is_file():
                files.found[name] = File(partial(path.open, "rb"))
            elif path.is_dir() and written_by_the_kit(path):
                files.written.append(name)
            elif entry.is_symlink() and path.is_dir():
                links.append((f"{name}/", path))
            elif path.is_dir():
                inside.append((f"{name}/", path))


def _fault(entry: os.DirEntry[str]) -> str | None:
    """Why an entry of a folder cannot be looked at."""
    try:
        entry.name.encode()
    except UnicodeEncodeError:
        return "file name is not in UTF-8; rename it"
    if entry.is_symlink() and not Path(entry.path).exists():
        return f"link to nothing: {os.readlink(entry.path)} is not there"
    return None


def written_by_the_kit(folder: Path) -> bool:
    """Whether this is a run's folder, a cache, or a folder of pictures that were drawn for one."""
    try:
        if (folder / "config.yaml").is_file():
            with (folder / "config.yaml").open("rb") as handle:
                return bool(_RUN.search(handle.read(1 << 14)))
        cache = (folder / MANIFEST).is_file() and (folder / EMPTY).is_file()
        drawn = (folder / "results.json").is_file() and (folder / "pictures").is_dir()
        return cache or drawn or (folder / DRAWN).is_file()
    except OSError:  # its own fault is named when it is looked into
        return False


def add_zip(files: Files, archive: Path, begin: str = "") -> None:
    """Add what is in a zip file, its paths below `begin`. Raises `UserError` if it cannot be read."""
    try:
        opened = zipfile.ZipFile(archive)
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise UserError(f"{archive}: not a zip file that can be read ({error}); pack it again") from error
    for info in sorted(opened.infolist(), key=lambda info: info.filename):
        parts = info.filename.split("/")
        if info.is_dir() or any(part.startswith(".") for part in parts) or parts[0] == "__MACOSX":
            continue
        name = begin + info.filename
        if info.flag_bits & 1:
            files.bad.append((name, "locked with a password; pack it again without one"))
        elif info.file_size > _LARGEST:
            files.bad.append(
                (name, f"{info.file_size / 2**30:.1f} GiB in a zip file; too large for a picture")
            )
        else:
            files.found[name] = File(partial(opened.open, info))
