"""A folder of files that the kit wrote, on this machine or at an address (s3://, gs://): one door to both.

Files are written whole: a rename here, one put there, which object stores show only when all of it has come.
Elsewhere half a file may stay behind a broken connection; its hash says so (`own_files`).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from lcm_kit.io import own_files
from lcm_kit.io.copies import Copies, default_root
from lcm_kit.io.files import atomic_write, discard
from lcm_kit.io.reading import tried
from lcm_kit.io.urls import At, at, is_url, refused, shown

_HEAD = 1 << 16  # bytes that hold the header of nearly every file of tensors
T = TypeVar("T")


@dataclass(frozen=True)
class Folder:
    """A folder here or at an address; files are named within it, as "shard-00000.safetensors".

    Every method raises `UserError` with the address where the service, or the file system, refuses.
    """

    place: str
    copies: Copies | None  # of the files of a remote one; None: the folder is here

    @staticmethod
    def of(
        place: str | os.PathLike[str], local_cache: str | None = None, local_cache_gb: float = 50.0
    ) -> Folder:
        """The folder at `place`, which need not be there yet. The others as the keys of `data`."""
        place = os.fspath(place).removeprefix("file://")
        if not is_url(place):
            return Folder(place, None)
        root = Path(local_cache) if local_cache is not None else default_root()
        return Folder(place.rstrip("/"), Copies(root, int(local_cache_gb * 1e9)))

    def below(self, name: str) -> Folder:
        """A folder in it."""
        return replace(self, place=f"{self.place}/{name}")

    @property
    def is_remote(self) -> bool:
        """Whether it is at an address."""
        return self.copies is not None

    @property
    def shown(self) -> str:
        """Its place for messages."""
        return shown(self.place)

    def path(self, name: str) -> Path:
        """Where a file of a folder of this machine is. A remote one has `local`."""
        assert self.copies is None
        return Path(self.place) / name

    def read(self, name: str, first: int | None = None) -> bytes:
        """The content of a file, or so many of its `first` bytes, as far as it has them."""
        if self.copies is None:
            try:
                with self.path(name).open("rb") as file:
                    return file.read(-1 if first is None else first)
            except OSError as error:
                raise refused(str(self.path(name)), error) from error
        found = self._at(name)
        part = {} if first is None else {"start": 0, "end": first}
        # an HTTP server that knows no parts gives all, and fsspec hands that on
        return bytes(tried(lambda: found.fs.cat_file(found.path, **part), found.url))[:first]

    def write(self, name: str, content: bytes | str) -> None:
        """Write a file, whole or not at all; one that is there is replaced."""
        if self.copies is None:
            atomic_write(self.path(name), content)
            return
        found, data = self._at(name), content.encode() if isinstance(content, str) else content
        tried(lambda: found.fs.pipe_file(found.path, data), found.url, "written")
        found.fs.invalidate_cache()

    def sizes(self) -> dict[str, int]:
        """The files directly in it by name, with their bytes, by one listing; none where it is not there.

        Hidden ones are left out: they are on their way.
        """
        found = at(str(self.place))

        def listed() -> dict[str, int]:
            found.fs.invalidate_cache()
            with contextlib.suppress(FileNotFoundError):
                return {
                    info["name"].rpartition("/")[2]: info["size"]
                    for info in found.fs.ls(found.path, detail=True)
                    if info["type"] == "file" and not info["name"].rpartition("/")[2].startswith(".")
                }
            return {}

        return dict(sorted(tried(listed, found.url).items()))

    def size(self, name: str) -> int | None:
        """The bytes of a file; None if it is not there."""
        found = self._at(name)

        def asked() -> int | None:
            found.fs.invalidate_cache()
            with contextlib.suppress(FileNotFoundError):
                return int(found.fs.info(found.path)["size"])
            return None

        return tried(asked, found.url)

    def delete(self, name: str) -> None:
        """Remove a file, if it is there."""
        if self.copies is None:
            discard(self.path(name))
            return
        found = self._at(name)

        def gone() -> None:
            with contextlib.suppress(FileNotFoundError):
                found.fs.rm_file(found.path)

        tried(gone, found.url, "removed")
        found.fs.invalidate_cache()

    def made_from(self, name: str) -> str | None:
        """What a file of tensors says that it was made from, by its header alone; None: none there, or half.

        It is whole if its length is what the header says; its tensors are held against their hash when it is
        used (`local`, `own_files.is_whole`).
        """
        if self.copies is None:
            return own_files.made_from(self.path(name))
        size = self.size(name)
        if size is None:
            return None
        head = self.read(name, min(size, _HEAD))
        if (more := own_files.header_length(head)) and len(head) < more <= size:
            head = self.read(name, more)
        said = own_files.said_in_head(head)
        return said.made_from if said is not None and said.length == size else None

    def local(self, name: str, content: str) -> Path:
        """A file of tensors on this machine, made from `content`; of a remote one a copy, held to its hash.

        It may be gone once other processes need the room: `opened` is for what maps it. Raises `UserError` if
        what comes is damaged or was made from something else.
        """
        if self.copies is None:
            return self.path(name)
        return self.copies.of(self._at(name), lambda path: _is(path, content))

    def opened(self, name: str, content: str, use: Callable[[Path], T]) -> T:
        """What `use` makes of `local`, as mapping it into memory: no other process takes it away before."""
        if self.copies is None:
            return use(self.path(name))
        return self.copies.opened(self._at(name), lambda path: _is(path, content), use)

    def _at(self, name: str) -> At:
        return at(f"{self.place}/{name}")


def _is(path: Path, content: str) -> bool:
    return own_files.made_from(path) == content and own_files.is_whole(path)
