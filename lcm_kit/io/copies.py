"""Copies of remote files on this machine, within a bound: what was not used for longest makes room.

Several processes may use one folder of copies: a file is fetched once, and room is made by one at a time. A
copy that goes while somebody has it mapped stays readable for him; the system frees it when he is done.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import xxhash

from lcm_kit.errors import UserError
from lcm_kit.io.files import LEFTOVER, atomic_file
from lcm_kit.io.locks import sweep, turn
from lcm_kit.io.reading import BLOCK, Reader
from lcm_kit.io.urls import At

_LOCKS = 64  # files to wait at: fewer than copies, which only makes some wait for no reason
_WAIT = 0.1  # seconds
_TRIES = 5  # to open a copy before other processes make room for theirs in its place
T = TypeVar("T")


def default_root() -> Path:
    """Where copies lie unless a config says: $XDG_CACHE_HOME/lcm-kit/shards."""
    cache = os.environ.get("LCM_KIT_CACHE") or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expanduser(cache)) / "lcm-kit" / "shards"


@dataclass(frozen=True)
class Copies:
    """A folder of copies that takes at most `most` bytes, what is being fetched included."""

    root: Path
    most: int

    def of(self, source: At, sound: Callable[[Path], bool]) -> Path:
        """The copy of a remote file, fetched if it is not there or not `sound`, and marked as used now.

        Raises `UserError` if it cannot be fetched, is not `sound` as it comes, or is larger than all
        copies may be together.
        """
        target = self._path(source)
        if not (target.is_file() and sound(target)):
            number = xxhash.xxh3_64_intdigest(str(target).encode()) % _LOCKS
            with turn(self.root / ".locks" / f"{number:02d}.lock"):
                if not (target.is_file() and sound(target)):  # another process may have been faster
                    self._fetch(source, target)
                    self._require_sound(source, target, sound)
        _mark_as_used(target)
        return target

    def opened(self, source: At, sound: Callable[[Path], bool], use: Callable[[Path], T]) -> T:
        """What `use` makes of the copy, as mapping it; fetched again where others took it away before.

        Raises `UserError` as `of`, and if others always do.
        """
        for _ in range(_TRIES):
            with contextlib.suppress(FileNotFoundError):
                return use(self.of(source, sound))
        raise self._too_small(source)

    def _path(self, source: At) -> Path:
        """One folder for each remote one, its name as far as people know it."""
        folder, _, name = source.url.rpartition("/")
        known = re.sub(r"[^A-Za-z0-9.-]+", "-", source.shown.rpartition("/")[0].partition("://")[2])[-60:]
        return self.root / f"{known.strip('-')}-{xxhash.xxh3_64_hexdigest(folder.encode())}" / name

    def _fetch(self, source: At, target: Path) -> None:
        with Reader(source) as reader, atomic_file(target) as temporary:
            self._make_room(reader.size or 0, temporary, source)
            with temporary.open("r+b") as file:
                while block := reader.read(BLOCK):
                    file.write(block)

    def _require_sound(self, source: At, target: Path, sound: Callable[[Path], bool]) -> None:
        if not sound(target):
            target.unlink(missing_ok=True)
            raise UserError(
                f"{source.shown} is not what was written there, or was written anew meanwhile; run `lcm-kit "
                "encode` with this config again, which makes what is damaged anew and keeps the rest"
            )

    def _make_room(self, size: int, temporary: Path, source: At) -> None:
        """Remove what was not used for longest until `size` more bytes fit; then `temporary` takes them."""
        if size > self.most:
            raise UserError(
                f"{source.shown} has {size / 1e9:.3g} GB, more than the {self.most / 1e9:.3g} GB that all "
                "copies may take; raise data.local_cache_gb"
            )
        while True:
            with turn(self.root / ".locks" / "room.lock"):
                sweep(self.root)
                coming = self._take_away(size)
                if coming is None:
                    with temporary.open("wb") as file:
                        file.truncate(size)  # so that others count it
                    return
            if not coming:  # what is there is open, on a system that then removes nothing
                raise self._too_small(source)
            time.sleep(_WAIT)  # until others have fetched theirs, which can then make room

    def _take_away(self, size: int) -> int | None:
        """None where `size` bytes are free now, else how many files others are fetching."""
        files = sorted(self._files())
        free = self.most - sum(taken for _, taken, _ in files)
        coming = [path for _, _, path in files if LEFTOVER.search(path.name)]
        for _, taken, path in files:
            if free < size and path not in coming:
                with contextlib.suppress(OSError):
                    path.unlink()
                    free += taken
        return None if free >= size else len(coming)

    def _too_small(self, source: At) -> UserError:
        return UserError(
            f"{source.shown}: there is no room for its copy in {self.root}, since processes of this machine "
            f"use more at once than {self.most / 1e9:g} GB; raise data.local_cache_gb"
        )

    def _files(self) -> Iterator[tuple[int, int, Path]]:
        """When each file was used last, its bytes, and its path."""
        for path in self.root.glob("*/*"):
            if path.parent.name != ".locks":
                with contextlib.suppress(OSError):
                    state = path.stat()
                    yield state.st_atime_ns, state.st_size, path


def _mark_as_used(path: Path) -> None:
    """Now; not by the time of its last change, by which it is known as looked at (`own_files.is_whole`)."""
    with contextlib.suppress(OSError):
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
