"""A disk that counts what is done to it, and refuses from a chosen operation on, or ends the process there.

Everything that Python changes on a disk is seen: making, renaming and removing, opening to write, every write
of the raw file below any buffer (so a refusal may come when a file is closed, as in life), fsync. What a
library writes by itself when it is given a path is seen as far as it is safetensors'.
"""

from __future__ import annotations

import builtins
import errno
import functools
import io
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import safetensors.torch

BY_PATH = ("mkdir", "rename", "replace", "unlink", "remove", "rmdir", "chmod", "symlink", "link", "truncate")
BY_HANDLE = ("fsync", "ftruncate", "sendfile")
# A full disk allows these
FREEING = ("unlink", "remove", "rmdir", "rename", "replace", "chmod", "truncate", "ftruncate")


class Refusal(NamedTuple):
    """Which operation is the first to be refused (from 1), why, and whether all later ones are as well."""

    at: int
    number: int  # of errno
    stays: bool

    def says_no(self, at: int, name: str) -> bool:
        """To operation `at`, `name`. A full disk lets go of what is there."""
        if self.number == errno.ENOSPC and name in FREEING:
            return False
        return at == self.at or (self.stays and at > self.at)

    def __str__(self) -> str:
        """For a test's name."""
        return f"{errno.errorcode[self.number]} at {self.at}"


class Disk:
    """What is done below `place`, in order, as "name path"."""

    def __init__(self, place: Path, refusal: Refusal | None = None, kill: int | None = None) -> None:
        self.place, self.refusal, self.kill = os.path.realpath(place), refusal, kill
        self.done: list[str] = []
        self.refused: list[str] = []

    def sees(self, name: str, target: Any, folder: int | None = None, *, named: bool = True) -> None:
        """Count operation `name` on a path or an open file, and refuse it if it is time.

        `folder`: open, which a relative path is in. An error tells the path if it is `named`.
        """
        path = self._path(target, folder)
        if not f"{path}/".startswith(f"{self.place}/"):
            return
        self.done.append(f"{name} {os.path.relpath(path, self.place)}")
        if len(self.done) == self.kill:
            os.killpg(0, signal.SIGKILL)
        if self.refusal and self.refusal.says_no(len(self.done), name):
            self.refused.append(self.done[-1])
            number = self.refusal.number
            raise OSError(number, os.strerror(number), *([path] if named else []))

    @property
    def about_to_kill(self) -> bool:
        """Whether the next operation is the last."""
        return len(self.done) + 1 == self.kill

    def _path(self, target: Any, folder: int | None) -> str:
        if isinstance(target, int):
            return os.readlink(f"/proc/self/fd/{target}").removesuffix(" (deleted)")
        path = os.fsdecode(target)
        return os.path.join(self._path(folder, None) if folder is not None else os.getcwd(), path)


@contextmanager
def disk(place: Path, refusal: Refusal | None = None, kill: int | None = None) -> Iterator[Disk]:
    """A `Disk` that watches `place` within the block.

    `refusal`: it then is as another process would see it, which ends with the block: what it leaves
    half-written is a dead process's afterwards. `kill`: the number of the operation, from 1, at which this
    process and its group are killed, a write being half done.
    """
    seen = Disk(place, refusal, kill)
    with pytest.MonkeyPatch.context() as patch:
        if refusal:
            patch.setattr(os, "getpid", lambda: 2**30)  # no kernel gives so high a number
        for name in BY_PATH:
            patch.setattr(os, name, _by_path(seen, name))
        for name in BY_HANDLE:
            patch.setattr(os, name, _by_handle(seen, name))
        patch.setattr(os, "open", _os_open(seen))
        for module in (io, builtins):
            patch.setattr(module, "open", _open(seen))
        patch.setattr(safetensors.torch, "serialize_file", _serialize(seen))
        yield seen


def _by_path(seen: Disk, name: str) -> Callable[..., Any]:
    real = getattr(os, name)

    @functools.wraps(real)
    def operation(path: Any, *arguments: Any, **named: Any) -> Any:
        seen.sees(name, path, named.get("dir_fd", named.get("src_dir_fd")))
        return real(path, *arguments, **named)

    return operation


def _by_handle(seen: Disk, name: str) -> Callable[..., Any]:
    real = getattr(os, name)

    @functools.wraps(real)
    def operation(handle: Any, *arguments: Any, **named: Any) -> Any:
        seen.sees(name, handle if isinstance(handle, int) else handle.fileno(), named=False)
        return real(handle, *arguments, **named)

    return operation


def _os_open(seen: Disk) -> Callable[..., int]:
    real = os.open

    def operation(path: Any, flags: int, *arguments: Any, **named: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR):
            seen.sees("open", path, named.get("dir_fd"))
        return real(path, flags, *arguments, **named)

    return operation


def _serialize(seen: Disk) -> Callable[..., Any]:
    real = safetensors.torch.serialize_file

    def operation(tensors: Any, file: Any, *arguments: Any, **named: Any) -> Any:
        try:
            seen.sees("save", file)
        except OSError as error:  # as safetensors words it
            words = f"I/O error: {error.strerror} (os error {error.errno})"
            raise safetensors.SafetensorError(f"Error while serializing: {words}") from None
        return real(tensors, file, *arguments, **named)

    return operation


class _Raw(io.FileIO):
    """A file whose writes are seen."""

    seen: Disk

    def write(self, data: Any) -> int:
        if self.seen.about_to_kill:
            self._half(data)
        try:
            self.seen.sees("write", self.fileno(), named=False)
        except OSError as error:
            if error.errno == errno.ENOSPC:  # the last that there is room for is written
                self._half(data)
            raise
        return super().write(data)

    def _half(self, data: Any) -> None:
        whole = memoryview(data).cast("B")
        super().write(whole[: len(whole) // 2])


def _open(seen: Disk) -> Callable[..., Any]:
    real = io.open

    @functools.wraps(real)
    def opened(
        file: Any, mode: str = "r", buffering: int = -1, encoding: str | None = None,
        errors: str | None = None, newline: str | None = None, closefd: bool = True, opener: Any = None,
    ) -> Any:  # fmt: skip
        if not set(mode) & set("wax+"):
            return real(file, mode, buffering, encoding, errors, newline, closefd, opener)
        if not isinstance(file, int):
            seen.sees("open", file)
        raw = _Raw(file, mode.replace("b", "").replace("t", ""), closefd, opener)
        raw.seen = seen
        if buffering == 0:
            return raw
        buffered: Any = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)

    return opened
