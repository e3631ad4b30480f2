"""Reading back what the kit wrote itself: the one door, which never believes a damaged file.

Whatever the kit writes to read again carries a hash of its content (XXH3: memory's speed): JSON under "hash",
a line of JSON lines too, tensors in the header; PNG files have their own checksums. Every file is checked
against it when it is opened, a cache's shards once a process while they are unchanged. One that is not as it
was written is `Damaged`, which names the file and what makes it again. Files of kits that wrote no hash are
held against their shape alone. `lcm_kit.io.own_shapes` has the shapes; `lcm_kit.io.files` is the door for
writing.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import torch
import xxhash
from PIL import Image
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lcm_kit import __version__
from lcm_kit.errors import UserError, first_line
from lcm_kit.io.files import append, atomic_write

HASH = "hash"  # the key of a JSON object's own hash
_PNG_ENDS = b"\0\0\0\0IEND\xaeB`\x82"
_ENTRY = "content"  # of a safetensors header
T = TypeVar("T")


class Damaged(UserError):
    """A file of ours is not as it was written; `reason` says why, without what to do."""

    reason = ""


def damaged(path: Path | str, why: str | BaseException, again: str) -> Damaged:
    """That `path` is not as it was written, why, and what to do."""
    reason = first_line(why) if isinstance(why, BaseException) else why
    found = Damaged(f"{path} is damaged ({reason}); {again}")
    found.reason = reason
    return found


# -- Text ----------------------------------------------------------------------------------------------------


def read_text(path: Path, again: str) -> str:
    """The text of `path`. Raises `Damaged` where it cannot be read; `again` says what makes it anew."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise damaged(path, getattr(error, "strerror", None) or "it is not text in UTF-8", again) from error


# -- JSON ----------------------------------------------------------------------------------------------------


def json_text(content: Mapping[str, Any], indent: int | None = 1) -> str:
    """`content` as a JSON file holds it, with its hash; NaN and infinity are not JSON, and a `ValueError`."""
    plain = json.loads(json.dumps(content, allow_nan=False))  # as it will be read: lists, text as keys
    hashed = {**plain, HASH: _hash_of(plain)}
    return json.dumps(hashed, indent=indent, ensure_ascii=False) + "\n" * (indent is not None)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` with its hash, whole or not at all. Raises `UserError` as `files.atomic_file`."""
    atomic_write(path, json_text(content))


def read_json(path: Path, shape: type[T], again: str) -> T:
    """The content of a JSON file of ours, of `shape`: a `TypedDict`, which may say more, or a dataclass.

    Raises `Damaged` if it is not of that shape or not what was written; `again` says what makes it anew.
    Raises `UserError` where another kit wrote what a dataclass has no field for.
    """
    return parse_json(path, read_text(path, again), shape, again)


def parse_json(path: Path | str, text: str | bytes, shape: type[T], again: str) -> T:
    """As `read_json`, of what a file holds, wherever it lies: `path` names it. Raises as that."""
    try:
        text = text if isinstance(text, str) else text.decode()
    except UnicodeDecodeError as error:
        raise damaged(path, "it is not text in UTF-8", again) from error
    return _of_shape(path, _object(path, text, again), shape, again)


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write a file that `append_line` goes on with. Raises `UserError` as `files.atomic_file`."""
    atomic_write(path, "".join(f"{json_text(line, indent=None)}\n" for line in lines))


def append_line(path: Path, values: Mapping[str, Any]) -> None:
    """Add `values` as a line of JSON, with its hash. Raises `UserError` as `files.append`."""
    append(path, json_text(values, indent=None))


def read_lines(path: Path, shape: type[T], again: str) -> list[T]:
    """The lines of a file that `append_line` writes, none where there is no file.

    The last one may have been cut short by a kill, and is then left out. Raises `Damaged` for another.
    """
    if not path.is_file():
        return []
    lines = read_text(path, again).split("\n")
    del lines[-1]  # "" after a whole line
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            place = f"line {number}: "
            found.append(_of_shape(path, _object(path, line, again, place), shape, again, place))
    return found


def _object(path: Path | str, text: str, again: str, place: str = "") -> dict[str, Any]:
    """A JSON object without its hash, which it is held against."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"{place}it is not JSON", again) from error
    if not isinstance(found, dict):
        raise damaged(path, f"{place}it holds no JSON object", again)
    said = found.pop(HASH, None)
    if said is not None and said != _hash_of(found):
        raise damaged(path, f"{place}its content is not what was written", again)
    return found


def _of_shape(path: Path | str, found: Mapping[str, Any], shape: type[T], again: str, place: str = "") -> T:
    check = _validator(cast(Any, shape))
    try:
        if is_dataclass(shape):
            return cast(T, check.validate_json(json.dumps(found), strict=True))
        check.validate_python(found, strict=True)
        return cast(T, found)  # with what the shape does not list
    except ValidationError as error:
        _refuse_another_kits(path, found, error)
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        what = _WRONG.get(first["type"], f"is not as it should be: {first['msg']}")
        raise damaged(path, f"{place}{where or 'it'} {what}", again) from error


_WRONG = {"missing": "is missing", "unexpected_keyword_argument": "is unknown"}


def unknown_keys(error: ValidationError) -> list[str]:
    """The keys, in dots, for which a dataclass has no field."""
    return [
        ".".join(map(str, each["loc"]))
        for each in error.errors(include_url=False, include_input=False, include_context=False)
        if each["type"] == "unexpected_keyword_argument"
    ]


def _refuse_another_kits(path: Path | str, found: Mapping[str, Any], error: ValidationError) -> None:
    """Raise `UserError` for keys that the kit that wrote them may know, and this one does not."""
    unknown, theirs = unknown_keys(error), found.get("kit_version")
    if unknown and isinstance(theirs, str) and theirs != __version__:
        raise UserError(
            f"{path} was written by lcm-kit {theirs} and says {', '.join(unknown)}, which lcm-kit "
            f"{__version__} does not know; use lcm-kit {theirs} for it"
        ) from error


@cache
def _validator(shape: Any) -> TypeAdapter[Any]:
    return TypeAdapter(shape)


def _hash_of(content: Any) -> str:
    """Of the values, however they are laid out: pretty-printing a file again is no damage."""
    return xxhash.xxh3_128(json.dumps(content, sort_keys=True).encode()).hexdigest()


# -- Tensors -------------------------------------------------------------------------------------------------


def write_tensors(path: Path, tensors: Mapping[str, Tensor], made_from: str = "") -> None:
    """Write a safetensors file whole or not at all, with what it was made from and a hash of its tensors."""
    atomic_write(path, tensor_bytes(tensors, made_from))


def tensor_bytes(tensors: Mapping[str, Tensor], made_from: str = "") -> bytes:
    """What `write_tensors` writes. `made_from` has no spaces.

    Both hashes are one entry of the header, since safetensors writes several in any order.
    """
    from safetensors.torch import save

    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    return save(whole, {_ENTRY: f"{made_from} {_hash_of_tensors(sorted(whole.items()))}"})


def made_from(path: Path) -> str | None:
    """What a file of tensors says that it was made from; None if there is none, or it is not one of ours."""
    return _said(path)[0]


def hash_of(path: Path) -> str | None:
    """The hash of its tensors that a file of ours carries; None if it carries none."""
    return _said(path)[1]


class Said(NamedTuple):
    """What the header of a file of tensors says of it."""

    made_from: str | None
    length: int  # bytes of the whole file


def header_length(head: bytes) -> int:
    """How many bytes of a file of tensors its header takes, by its first eight; 0 if these are no begin."""
    return 8 + int.from_bytes(head[:8], "little") if len(head) >= 8 else 0


def said_in_head(head: bytes) -> Said | None:
    """What a file that begins with `head` says of itself; None if there is less than its header, or none."""
    length = header_length(head)
    if not 8 < length <= len(head):
        return None
    try:
        header = json.loads(head[8:length])
        entry = header.pop("__metadata__", {}).get(_ENTRY, "")
        ends = [tensor["data_offsets"][1] for tensor in header.values()]
        content, found, _ = entry.partition(" ")
        return Said(content if found else None, length + max(ends, default=0))
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError):
        return None


def is_whole(path: Path) -> bool:
    """Whether the tensors at `path` are those that were written: every byte is read, once a process."""
    try:
        state = path.stat()
    except OSError:
        return False
    return _is_whole(path, state.st_size, state.st_mtime_ns)


def read_tensors(path: Path, again: str) -> dict[str, Tensor]:
    """The tensors of a file of ours, on the CPU, by name in order.

    Raises `Damaged` if they are not what was written, as far as the file has a hash; `again` says what makes
    it anew.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors, said = dict(_tensors_in(file)), _said_in(file)[1]
    except (OSError, SafetensorError) as error:
        raise damaged(path, getattr(error, "strerror", None) or error, again) from error
    if said is not None and said != _hash_of_tensors(tensors.items()):
        raise damaged(path, "its tensors are not what was written", again)
    return tensors


def _said(path: Path) -> tuple[str | None, str | None]:
    """What a file says that it was made from, and the hash of its tensors."""
    try:
        with safe_open(path, framework="pt") as file:
            return _said_in(file)
    except (OSError, SafetensorError):
        return None, None


def _said_in(file: Any) -> tuple[str | None, str | None]:
    """As `_said`, of an open file."""
    content, found, tensors = (file.metadata() or {}).get(_ENTRY, "").partition(" ")
    return (content, tensors) if found else (None, None)


def _tensors_in(file: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors of an open file by name, in order, one after another."""
    return ((name, file.get_tensor(name)) for name in sorted(file.keys()))


@cache
def _is_whole(path: Path, size: int, modified: int) -> bool:
    try:
        with safe_open(path, framework="pt") as file:
            return _hash_of_tensors(_tensors_in(file)) == _said_in(file)[1]
    except (OSError, SafetensorError):
        return False


def _hash_of_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """XXH3 of names, kinds, shapes and values, in the order given."""
    found = xxhash.xxh3_128()
    for name, tensor in tensors:
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


# -- Pictures ------------------------------------------------------------------------------------------------


def read_picture(path: Path, again: str) -> Image.Image:
    """A PNG file of ours. Raises `Damaged` if its checksums say so; `again` says what makes it anew."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise damaged(path, error.strerror or "it cannot be read", again) from error
    return parse_picture(path, content, again)


def parse_picture(path: Path | str, content: bytes, again: str) -> Image.Image:
    """As `read_picture`, of what a file holds, wherever it lies: `path` names it. Raises as that."""
    try:
        with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
            image.verify()  # of all of its parts, which Pillow does not look at when it decodes
        if not content.endswith(_PNG_ENDS):  # nor at the checksum of the last
            raise ValueError
        with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
            return image.copy()
    except Exception as error:  # Pillow raises of all kinds
        raise damaged(path, getattr(error, "strerror", None) or "it is no whole PNG file", again) from error
