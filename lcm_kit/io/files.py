"""Writing so that nothing is ever half there: a temporary name first, then a rename. And content hashes.

This is the one door through which the kit writes. Whatever the file system says against it (full, read-only,
no permission, a file where a folder should be, a name that it cannot hold) comes out as one `UserError` with
the path, the reason and what to do.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
import platform
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lcm_kit.errors import UserError

_MOST_BYTES = 180  # of a name within a temporary one: file systems hold 255, and ours adds to it
LEFTOVER = re.compile(r"\.([0-9a-f]{8})-(\d+)\.(?:\w+\.)?(?:tmp|old)$")  # as `_temporary` names it
_TRIAL = 2**16  # bytes that must be free where anything is to be written
ASIDE = ".old"  # ends the name of a folder that holds what another is put in the place of
_ELSEWHERE = "choose another place for it"
_REMEDIES = {
    errno.ENOSPC: "free some space or choose another output",
    errno.EDQUOT: "free some space or choose another output",
    errno.EROFS: "choose a place on a file system that can be written to",
    errno.EACCES: "get the right to write there or choose another output",
    errno.EPERM: "get the right to write there or choose another output",
    errno.ENAMETOOLONG: "choose a shorter name",
}
# torch and safetensors write in other languages, and what the file system said is lost or is in their text
_FULL_IN_WORDS = ("PytorchStreamWriter failed", "unexpected pos ", "(os error 28)")


def reason_of(error: BaseException | None) -> OSError | None:
    """The file system's refusal that `error` is, was raised from, or tells of in a library's own words.

    None if it is something else.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error
        if any(words in str(error) for words in _FULL_IN_WORDS):
            return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if isinstance(error, ValueError) and re.search("null (byte|character)", str(error)):  # of a path
            return OSError(errno.EINVAL, "its name holds a NUL character")
        error = error.__cause__ or error.__context__
    return None


def refusal_of(error: Exception) -> UserError | None:
    """The sentence for what the file system refused; None if `error` is something else."""
    reason = reason_of(error)
    if reason is None or reason.errno == errno.EPIPE:  # nobody reads on: the program ends quietly
        return None
    if reason.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            f"the disk is full ({error}); free some space and run the same command again, it continues"
        )
    if reason is not error:  # it came on the way, and something else went wrong since
        return None
    name = "" if reason.filename is None else f"{os.fsdecode(reason.filename)}: "
    return UserError(f"{name}{reason.strerror}; check that the path is right, is there and may be used")


def unwritable(path: Path, error: OSError, what: str = "written") -> UserError:
    """The sentence for a `path` that could not be `what` because of `error`."""
    reason, remedy = error.strerror or str(error), _REMEDIES.get(error.errno or 0, _ELSEWHERE)
    in_the_way = (errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, *([errno.EACCES] * (os.name == "nt")))
    if error.errno in (errno.ENOTDIR, errno.EEXIST, errno.ELOOP) and (file := _no_folder(path)):
        kind = "a link to no folder" if file.is_symlink() else "a file, not a folder"
        reason, remedy = f"{file} is {kind}", f"remove it or {_ELSEWHERE}"
    elif error.errno in in_the_way and os.path.isdir(path):
        reason, remedy = "a folder of that name is there", f"remove it or {_ELSEWHERE}"
    return UserError(f"{path}: cannot be {what} ({reason}); {remedy}")


def _no_folder(path: Path) -> Path | None:
    """What stands where `path` needs a folder."""
    above = (path, *path.parents)
    return next((each for each in above if os.path.lexists(each) and not os.path.isdir(each)), None)


@contextlib.contextmanager
def _writing(path: Path, what: str = "written") -> Iterator[None]:
    """Turn the file system's refusal to write at `path` into the sentence.

    A refusal that names a file away from `path` is of something that was read, and is passed on as it is.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        refusal = reason_of(error)
        if refusal is None or not _of(path, refusal):
            raise
        raise unwritable(path, refusal, what) from error


def _of(path: Path, refusal: OSError) -> bool:
    """Whether `refusal` is about `path`, its temporary neighbour or a folder that either lies in."""
    if not isinstance(refusal.filename, str | bytes):
        return True  # a handle's: it writes what we opened
    place = Path(os.path.abspath(os.fsdecode(refusal.filename)))
    parent = Path(os.path.abspath(path.parent))
    return place == parent or parent in place.parents or place in parent.parents


def _temporary(path: Path) -> Path:
    """A hidden name beside `path` that begins with its own, as far as a file system holds both.

    It says which process of which machine writes there.
    """
    name = path.name
    while len(os.fsencode(name)) > _MOST_BYTES:
        name = name[:-1]
    return path.parent / f".{name}.{machine()}-{os.getpid()}.tmp"


@functools.cache
def machine() -> str:
    """A short name of this machine, for names of temporary files."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


@contextlib.contextmanager
def _within(folder: Path) -> Iterator[None]:
    """`folder` with all above it, made where it is not there, and gone again if the block fails."""
    made = [each for each in (folder, *folder.parents) if not os.path.lexists(each)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        _remove_empty(made)
        raise


def _remove_empty(folders: list[Path]) -> None:
    """Remove folders, the innermost first, as far as there is nothing in them."""
    for each in folders:
        with contextlib.suppress(OSError, ValueError):  # another process may have begun there
            each.rmdir()


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, renamed onto it when the block ends well, else removed.

    Raises `UserError` if the file system refuses (full disk, no permission); what stood at `path` is then
    unharmed.
    """
    temporary = _temporary(path)
    with _writing(path), _within(path.parent):
        try:
            yield temporary
            with temporary.open("rb+") as handle:
                os.fsync(handle.fileno())
            temporary.replace(path)
        finally:
            with contextlib.suppress(OSError, ValueError):  # it would hide what went wrong
                temporary.unlink(missing_ok=True)


def atomic_write(path: Path, content: bytes | str) -> None:
    """Write `content` to `path`, whole or not at all."""
    data = content.encode() if isinstance(content, str) else content
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)


def append(path: Path, line: str) -> None:
    """Add `line` and its end to the text file at `path`. Raises `UserError` as `atomic_file`."""
    with _writing(path), path.open("a", encoding="utf-8") as handle:
        handle.write(f"{line}\n")
        handle.flush()
        os.fsync(handle.fileno())  # before the state that counts on it


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path` that takes its place when the block ends well.

    A folder that already stands at `path` is replaced. Raises `UserError` if the file system refuses.
    """
    with _writing(path), _within(path.parent):
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
        begin = _temporary(path).name.removesuffix("tmp")
        temporary = Path(tempfile.mkdtemp(prefix=begin, suffix=".tmp", dir=path.parent))
        try:
            temporary.chmod(0o755)  # mkdtemp makes it private
            yield temporary
            _put(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _put(folder: Path, path: Path) -> None:
    """Rename `folder` to `path`; what stood there is put aside, and comes back if that fails."""
    if not path.exists():
        folder.replace(path)
        return
    begin = _temporary(path).name.removesuffix("tmp")
    aside = Path(tempfile.mkdtemp(prefix=begin, suffix=ASIDE, dir=path.parent))
    try:
        path.replace(aside / path.name)
        folder.replace(path)
    finally:
        give_back(aside)


def give_back(aside: Path) -> None:
    """Rename what was put `aside` to where it stood, unless another took its place; then remove the rest.

    Where it cannot be given back it stays where it is, for the next who holds the folder's lock.
    """
    with contextlib.suppress(OSError):
        for each in aside.iterdir():
            if not os.path.lexists(aside.parent / each.name):
                each.replace(aside.parent / each.name)
        shutil.rmtree(aside)


def discard(path: Path) -> None:
    """Remove the file or the folder `path`, if it is there: all of it or nothing, whatever comes between.

    Raises `UserError` if the file system refuses.
    """
    with _writing(path, "removed"):
        if path.is_dir() and not path.is_symlink():
            doomed = _temporary(path)
            shutil.rmtree(doomed, ignore_errors=True)
            path.replace(doomed)
            shutil.rmtree(doomed, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def make_folder(path: Path) -> Path:
    """`path`, made with all above it if it is not there. Raises `UserError` as `atomic_file`."""
    with _writing(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


def require_writable(folder: Path) -> None:
    """Raise `UserError` now if nothing can be written into `folder`; a trial that leaves nothing behind.

    On a full disk too, which makes an empty file but takes no byte.
    """
    with _writing(folder):
        made = [each for each in (folder, *folder.parents) if not os.path.lexists(each)]
        with _within(folder), tempfile.TemporaryFile(dir=folder) as trial:
            trial.write(bytes(_TRIAL))
            trial.flush()
            os.fsync(trial.fileno())  # where space is only taken then
        _remove_empty(made)


@contextlib.contextmanager
def signed(folder: Path) -> Iterator[str | None]:
    """Yield the name of a file in `folder` that nobody wrote before, there while the block runs, and hidden.

    None where nothing can be written, which is not refused here: nothing may be to be written.
    """
    file = _temporary(folder / f"signed-{secrets.token_hex(8)}")
    try:
        file.touch()
    except OSError:
        yield None
        return
    try:
        yield file.name
    finally:
        with contextlib.suppress(OSError):
            file.unlink()


@contextlib.contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """Yield a hidden folder in `folder` for what is not to stay; it is gone afterwards.

    Not in the system's place for temporary files, where nobody removes what a killed process left, and which
    may be too small. Raises `UserError` as `atomic_file`.
    """
    temporary = _temporary(folder / "scratch")
    with _writing(temporary):
        shutil.rmtree(temporary, ignore_errors=True)  # of a killed process that had the same number
        temporary.mkdir(parents=True)
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sha256_bytes(data: bytes) -> str:
    """Hex SHA-256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's content."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
