"""A file read piece by piece from wherever it is; where a connection breaks it goes on from there."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from time import sleep
from typing import Any, TypeVar

from lcm_kit.errors import UserError, first_line
from lcm_kit.io.urls import At, identity, info_of, is_final, refused

WAITS = (0.5, 2.0, 8.0)  # seconds before each new try; a byte that arrives begins the count anew
BLOCK = 1 << 23  # bytes that are asked for at once, and of a URL the most that is held of it
T = TypeVar("T")


def tried(action: Callable[[], T], url: str, doing: str = "read") -> T:
    """What `action` gives, tried again after `WAITS` where it fails for a reason that may pass.

    Raises `UserError` with the address when it fails for good.
    """
    for wait in (*WAITS, None):
        try:
            return action()
        except Exception as error:  # each service's library has its own
            if wait is None or is_final(error):
                raise refused(url, error, doing) from error
            sleep(wait)
    raise AssertionError  # the last wait is None


class Reader(io.RawIOBase):
    """The bytes of a file as a file object: `read`, `seek`, `tell`; forward reading is cheap.

    A read that fails, or ends before the file does, is tried again from the same byte on a new connection
    (`WAITS`). It is a `UserError` if that does not help, or if the file is another one by then: what is read
    is never silently short.
    """

    def __init__(self, place: At, *, ahead: bool = True) -> None:
        """`ahead`: read in blocks, for reading from begin to end; else what is asked for and no more.

        Raises `UserError` if the file is not there, or not for us.
        """
        super().__init__()
        self.place = place
        self._how: dict[str, Any] = {"block_size": BLOCK, "cache_type": "readahead" if ahead else "none"}
        self._file: Any = None
        self._at = self._in_file = 0  # where the next byte is read, and where the connection is
        info = tried(lambda: info_of(place), place.url)
        if info.get("type") == "directory":
            raise UserError(f"{place.shown}: is a folder, where a file is meant; check the address")
        self._identity = identity(info)
        self.size: int | None = info.get("size")

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes; a server that gives no parts of a file is read again from its begin for a step back."""
        return True

    def tell(self) -> int:
        """The place of the next byte."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a byte; nothing is read before `read`. Raises `UserError` from the end of an unknown size."""
        if whence == io.SEEK_END and self.size is None:
            raise UserError(f"{self.place.shown}: its server does not say how long it is; download it first")
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size or 0}[whence]
        self._at = max(0, start + offset)
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        """The next `size` bytes, fewer only at the end of the file; all that is left for -1 or None."""
        left = None if self.size is None else max(0, self.size - self._at)
        wanted = left if size is None or size < 0 else size if left is None else min(size, left)
        parts: list[bytes] = []
        waits = iter(WAITS)
        while wanted is None or wanted > 0:
            try:
                part = self._piece(BLOCK if wanted is None else min(wanted, BLOCK))
                if not part and self.size is None:
                    break
                if not part:
                    raise EOFError(f"the connection ended at byte {self._at:,} of {self.size:,}")
            except Exception as error:  # each service's library has its own
                self._again(error, next(waits, None))
                continue
            waits = iter(WAITS)
            parts.append(part)
            self._at += len(part)
            wanted = None if wanted is None else wanted - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def readinto(self, buffer: Any) -> int:
        """As `read`, into `buffer`."""
        found = self.read(len(buffer))
        buffer[: len(found)] = found
        return len(found)

    def close(self) -> None:
        """End the connection."""
        self._drop()
        super().close()

    def _piece(self, count: int) -> bytes:
        try:
            return self._next(count)
        except ValueError as error:
            if "range requests" not in str(error) or not self._how["block_size"]:
                raise
        self._drop()
        self._how = {"block_size": 0}  # for fsspec a server that gives no parts of a file is another kind
        return self._next(count)

    def _next(self, count: int) -> bytes:
        if self._file is None:
            self._connect()
        if self._in_file != self._at:
            self._go_there()
        part = bytes(self._file.read(count))
        self._in_file += len(part)
        return part

    def _connect(self) -> None:
        self._file, self._in_file = self.place.fs.open(self.place.path, "rb", **self._how), 0

    def _go_there(self) -> None:
        """Bring the connection to where the next byte is; a stream without parts by reading."""
        with contextlib.suppress(ValueError, NotImplementedError, io.UnsupportedOperation):
            self._file.seek(self._at)
            self._in_file = self._at
            return
        if self._in_file > self._at:
            self._drop()
            self._connect()
        while self._in_file < self._at:
            passed = len(self._file.read(min(BLOCK, self._at - self._in_file)))
            if not passed:
                raise EOFError(f"the connection ended at byte {self._in_file:,}")
            self._in_file += passed

    def _again(self, error: Exception, wait: float | None) -> None:
        """Drop the connection and wait; raise where that is no use, or the file is another one now."""
        self._drop()
        if is_final(error):
            raise refused(self.place.url, error) from error
        if wait is None:
            raise UserError(
                f"{self.place.shown}: cannot be read on from byte {self._at:,} after {len(WAITS)} new tries "
                f"({first_line(error)}); check the connection and run the same command again"
            ) from error
        sleep(wait)
        try:
            now = identity(info_of(self.place, anew=True))
        except UserError:  # a server that is away: the next try finds out
            return
        if now != self._identity:
            raise UserError(
                f"{self.place.shown}: another file took its place while it was being read; run the same "
                "command again when nobody writes there"
            ) from error

    def _drop(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(Exception):  # it is broken, or it is not, and we are done with it
                file.close()
