"""What a safetensors file holds, read from its header: names, dtypes and shapes, no tensor."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from lcm_kit.errors import UserError, first_line

_POINTER = b"version https://git-lfs"


class Entry(NamedTuple):
    """One tensor, as the file's header has it."""

    dtype: str
    shape: tuple[int, ...]


class Header(NamedTuple):
    """Tensors by name, and the strings beside them."""

    entries: dict[str, Entry]
    metadata: dict[str, str]


def read_header(file: Path, name: str) -> Header:
    """The header of `file`, which a user calls `name`, in milliseconds.

    The file's size has to be what the header promises. Raises `UserError` for a file that is cut short, for
    Git LFS's stand-in and for what is no safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    require_content(file, name)
    try:
        with safe_open(file, framework="pt") as handle:
            slices = {key: handle.get_slice(key) for key in handle.keys()}  # noqa: SIM118
            entries = {key: Entry(s.get_dtype(), tuple(s.get_shape())) for key, s in slices.items()}
            return Header(entries, handle.metadata() or {})
    except (SafetensorError, OSError) as error:
        reason = first_line(error)
        raise UserError(
            f"{name} cannot be read as a safetensors file ({reason}); download it again"
        ) from error


def require_content(file: Path, name: str) -> None:
    """Raise `UserError` if `file`, which a user calls `name`, is Git LFS's note of where the content lies."""
    try:
        with file.open("rb") as handle:
            pointer = handle.read(len(_POINTER)) == _POINTER
    except OSError as error:
        raise UserError(f"{name} cannot be read ({error.strerror}); download it again") from error
    if pointer:
        raise UserError(
            f"{name} is a Git LFS pointer and not the file itself; run `git lfs pull` in its folder, or "
            "download it again"
        )
