"""One process at a time in a folder: a lock of the operating system's, which a dead process does not hold.

The lock lies in the folder as `.WORK.lock` and holds the number of the process that has it. It is removed
with the work, and so is the folder if the work left nothing there: what was refused leaves no trace.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ParamSpec, TypeVar

import psutil
from filelock import FileLock, Timeout

from lcm_kit import console
from lcm_kit.errors import UserError
from lcm_kit.io.files import ASIDE, LEFTOVER, give_back, machine, reason_of, unwritable

_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
_A_DAY = 86_400  # seconds
# Seconds that a process waits for the one before it where a launcher starts processes again: what is left of
# a killed node finishes its step and saves, and a file server frees a vanished machine's locks (NFS 4: 90 s)
_PREDECESSOR = 120.0
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # of the file system
P = ParamSpec("P")
T = TypeVar("T")


@contextlib.contextmanager
def held(folder: Path, work: str, *, needed: bool = True) -> Iterator[None]:
    """Do `work` (a word or two, as "train") in `folder`, made if it is not there, while nobody else does.

    Of the processes of one distributed run the first holds the lock for all, and waits for it a while: it may
    have been started anew while its predecessor dies. Raises `UserError` naming the folder and the process if
    another holds it, and if the folder cannot be written; where work may turn out to be done already (not
    `needed`) it goes on without a lock there. What killed processes left half-written in the folder is
    removed.
    """
    if os.environ.get("RANK", "0") != "0":  # as torchrun and accelerate number them
        yield
        return
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    file = folder / f".{work.replace('/', '-')}.lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock, holder = FileLock(file), _holder(file)
        _acquire(lock, file, holder, work)
        sweep(folder)
    except UserError:
        raise
    except (OSError, ValueError, NotImplementedError) as error:
        _remove(made)
        _without(folder, error, needed)
        yield
        return
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # while it is held: who opened it meanwhile tries again
            file.unlink()
        lock.release()
        _remove(made)


@contextlib.contextmanager
def turn(file: Path) -> Iterator[None]:
    """Wait for the lock `file`, which stays where it is, and hold it while the block runs.

    Where the file system has no locks the block runs without. Raises `UserError` if nothing can be written
    there.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(file)
        lock.acquire()
    except (OSError, NotImplementedError) as error:
        _without(file.parent, error, needed=True)
        yield
        return
    try:
        yield
    finally:
        lock.release()


def sweep(folder: Path, *, deep: bool = True) -> None:
    """Remove what processes that were killed left half-written in `folder`, and if `deep` below it.

    What another machine writes is left alone for a day: whether its process lives cannot be seen from here.
    """
    for leftover in (folder.rglob if deep else folder.glob)(".*"):
        if (made := LEFTOVER.search(leftover.name)) and _is_dead(leftover, made[1], int(made[2])):
            with contextlib.suppress(OSError):  # where nothing can be removed nothing can be written
                if leftover.suffix == ASIDE:
                    give_back(leftover)  # of a process that died before another folder took its place
                else:
                    shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def _is_dead(leftover: Path, place: str, process: int) -> bool:
    if place == machine():
        return not psutil.pid_exists(process)
    try:
        return time.time() - leftover.stat().st_mtime > _A_DAY
    except OSError:
        return False


def _acquire(lock: FileLock, file: Path, holder: str, work: str) -> None:
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if "TORCHELASTIC_RUN_ID" not in os.environ:  # torchrun's, and accelerate's of several processes
                raise
            told = f"waiting up to {_PREDECESSOR:.0f} s for it to end"
            console.say(f"{file.parent}: {holder} is at work there ({work}); {told}", err=True)
            lock.acquire(timeout=_PREDECESSOR, poll_interval=0.2)
    except Timeout as error:
        raise UserError(
            f"{file.parent}: {holder} is at work there ({work}); wait until it is done, stop it, or give "
            "another output"
        ) from error
    with contextlib.suppress(OSError):  # where a locked file may not be written twice its name must do
        file.write_text(str(os.getpid()))


def _without(folder: Path, error: Exception, needed: bool) -> None:
    """Raise for a lock that cannot be had, unless it is not needed; say so where there are no locks."""
    reason = reason_of(error) or OSError(errno.ENOLCK, str(error))
    if reason.errno in _NO_LOCKS:
        console.say(f"note: {folder}: its file system has no locks; start nothing else there", err=True)
    elif needed or reason.errno not in _READ_ONLY:
        raise unwritable(folder, reason) from error


def _holder(file: Path) -> str:
    """Who has the lock, or had it last."""
    try:
        return f"process {int(file.read_text())}"
    except (OSError, ValueError):
        return "another process"


def _remove(made: list[Path]) -> None:
    """The folders in `made`, innermost first, that are empty."""
    with contextlib.suppress(OSError):
        for each in made:
            each.rmdir()


def alone(
    work: str, folder: Callable[P, str | Path], *, needed: bool = True
) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """A decorator: `held(folder(...), work)` around every call, with the call's own arguments."""

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(function)
        def locked(*args: P.args, **kwargs: P.kwargs) -> T:
            with held(Path(folder(*args, **kwargs)), work, needed=needed):
                return function(*args, **kwargs)

        return locked

    return decorate
