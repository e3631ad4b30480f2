"""Reading a LoRA file that a stranger made: safetensors only, every claim of its header checked first.

The format (safetensors' README, "Format"): 8 bytes with the header's length, a JSON header, then the bytes of
the tensors, one after the other without holes. The checks are our own and the bytes are read into tensors of
our own, so nothing that a file claims is allocated before it has been held against the file's true size.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcm_kit.errors import UserError

# No BOOL and no complex numbers: a LoRA has none, and a byte other than 0 and 1 is no bool of torch's
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
}  # fmt: skip
# Bytes. The format allows 100 MB, of which Python makes gigabytes; a header with all captions has a few
MAX_HEADER = 20_000_000
MAX_TENSORS = 20_000  # SDXL with both text encoders has 3,156 in the kohya format, 7,400 as a LoKr
_MAX_BRACKETS = 400_000  # of a header, which has three a tensor: Python takes long to make millions of lists
MAX_NAME = 300  # characters; the longest of a LoRA in circulation have some 140
MAX_DIMS = 5
_PICKLES = (".ckpt", ".pt", ".pth", ".bin")
_AGAIN = "download it again or ask its maker for another file"


class _Refused(Exception):
    """The rest of the sentence that begins with the path."""


@dataclass(frozen=True)
class Header:
    """What a file says it holds: (dtype, shape) by name in the order of the bytes, and the metadata."""

    entries: dict[str, tuple[str, tuple[int, ...]]]
    metadata: dict[str, str]


def inspect(path: Path) -> Header:
    """The header of the safetensors file at `path`, checked against the file's size; reads no tensor.

    Raises `UserError` if it is missing, truncated, no safetensors file, or not what its header says.
    """
    with _opened(path) as handle:
        return _header(handle)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors at `path` (on the CPU, in their own dtype) and its metadata, after the checks of `inspect`.

    Raises `UserError` as `inspect` does. Values are as they stand: see `not_finite`.
    """
    with _opened(path) as handle:
        header = _header(handle)
        tensors = {name: _tensor(handle, *entry) for name, entry in header.entries.items()}
    return tensors, header.metadata


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of the tensors that hold a NaN or an Inf, sorted."""
    return sorted(name for name, tensor in tensors.items() if not _finite(tensor))


def _finite(tensor: Tensor) -> bool:
    # 8-bit floats have no isfinite of their own in torch
    wide = tensor.float() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor
    return bool(torch.isfinite(wide).all())


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BufferedReader]:
    try:
        if path.is_dir():
            raise _Refused("this is a folder; name the .safetensors file in it")
        if not path.is_file():  # also a pipe, on which open() would wait for ever
            raise _Refused("there is no such file; check the path")
        if path.suffix.lower() in _PICKLES:
            raise _pickle()
        with path.open("rb") as handle:
            yield handle
    except _Refused as refusal:
        raise UserError(f"{path}: {refusal}") from refusal
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check its rights") from error


def _pickle() -> _Refused:
    return _Refused(
        "a file of this kind (pickle: .ckpt, .pt, .pth, .bin) can run code when it is loaded; ask for a "
        "safetensors file or convert it to one"
    )


def _header(handle: BufferedReader) -> Header:
    """Checks everything but the values; leaves `handle` at the first byte of the tensors."""
    size = os.fstat(handle.fileno()).st_size
    length = _header_length(handle.read(64), size)
    handle.seek(8)
    parsed = _parse(handle.read(length))
    metadata = _metadata(parsed.pop("__metadata__", {}))
    if not 1 <= len(parsed) <= MAX_TENSORS:
        raise _Refused(f"it holds {len(parsed)} tensors, not 1 to {MAX_TENSORS}; {_AGAIN}")
    spans = {name: _span(name, entry) for name, entry in parsed.items()}
    order = sorted(spans, key=spans.__getitem__)
    _check_bytes([(name, *spans[name]) for name in order], size - 8 - length)
    entries = {name: (parsed[name]["dtype"], tuple(parsed[name]["shape"])) for name in order}
    return Header(entries, metadata)


def _header_length(head: bytes, size: int) -> int:
    """From the first bytes of a file of `size` bytes, after a look at what else it may be."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if size == 0:
        raise _Refused("this file is empty (0 bytes); download it again")
    if text.startswith(b"version https://git-lfs"):
        raise _Refused("this is a git-lfs pointer and not the file that it stands for; run `git lfs pull`")
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise _Refused(
            "this is a web page, as a failed download leaves it; download the file itself, logged in if the "
            "site asks for it"
        )
    # The length of a true header can begin with the same bytes: 640 is 80 02, 19280 is "PK"
    if head.startswith((b"\x80", b"PK")) and head[8:9] != b"{":
        raise _pickle()
    length = int.from_bytes(head[:8], "little")
    if size < 8 or (size > 8 and head[8:9] != b"{"):
        raise _Refused(f"this is not a safetensors file (its {size} bytes do not start as one); {_AGAIN}")
    if length > MAX_HEADER:
        raise _Refused(
            f"its header claims {length} bytes, and the most that is read is {MAX_HEADER}; {_AGAIN}"
        )
    if 8 + length > size:
        raise _Refused(
            f"it is truncated: its header ends at byte {8 + length}, and {size} bytes are there; download it "
            "again"
        )
    return length


def _parse(raw: bytes) -> dict[str, Any]:
    if raw.count(b"[") + raw.count(b"{") > _MAX_BRACKETS:
        raise _Refused(f"its header has more than {_MAX_BRACKETS} lists and objects; {_AGAIN}")
    try:
        parsed = json.loads(raw.decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _Refused(f"its header is not valid JSON; {_AGAIN}") from error
    if not isinstance(parsed, dict):
        raise _Refused(f"its header is not a JSON object; {_AGAIN}")
    return parsed


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """One reader takes the first of two equal names and another the last: neither is what was checked."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _Refused(f"its header has {_quoted(key)} twice; {_AGAIN}")
        _check_text(key)
        found[key] = value
    return found


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can spell
        raise _Refused(f"its header has the text {_quoted(text)}, which is not Unicode; {_AGAIN}") from error


def _metadata(value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        raise _Refused(f"its __metadata__ is not a JSON object; {_AGAIN}")
    for key, text in value.items():
        if not isinstance(text, str):
            raise _Refused(f"its __metadata__ has {_quoted(key)}, whose value is not a string; {_AGAIN}")
        _check_text(text)
    return value


def _span(name: str, entry: Any) -> tuple[int, int]:
    """Where the tensor's bytes start and end, after the checks that need this entry alone."""

    def natural(value: Any, count: int) -> bool:
        fits = isinstance(value, list) and len(value) <= count
        return fits and all(type(number) is int and number >= 0 for number in value)

    tensor = f"its tensor {_quoted(name)}"
    if len(name) > MAX_NAME:
        raise _Refused(f"{tensor} has a name of {len(name)} characters, above {MAX_NAME}; {_AGAIN}")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _Refused(f"{tensor} is not given by dtype, shape and data_offsets; {_AGAIN}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _Refused(f"{tensor} has the dtype {_quoted(dtype)}, not one of {', '.join(DTYPES)}; {_AGAIN}")
    if not natural(shape, MAX_DIMS):
        raise _Refused(
            f"{tensor} has the shape {_quoted(shape)}, not up to {MAX_DIMS} whole numbers; {_AGAIN}"
        )
    if not natural(offsets, 2) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _Refused(f"{tensor} has the data_offsets {_quoted(offsets)}, not a start and an end; {_AGAIN}")
    itemsize = DTYPES[dtype].itemsize
    needed, given = math.prod(shape) * itemsize, offsets[1] - offsets[0]
    # A shape such as [0, 2**62, 2**62] takes no bytes, but its strides would overflow
    if needed != given or math.prod(max(n, 1) for n in shape) * itemsize >= 2**63:
        raise _Refused(
            f"{tensor} of shape {_quoted(shape)} and dtype {dtype} does not fit into its {_quoted(given)} "
            f"bytes; {_AGAIN}"
        )
    return offsets[0], offsets[1]


def _check_bytes(spans: list[tuple[str, int, int]], available: int) -> None:
    """`spans`: (name, start, end) in order. They must follow each other and fill `available` bytes."""
    place = 0
    for name, start, end in spans:
        if start != place:
            fault = "overlaps with the one before it" if start < place else "starts after a hole"
            raise _Refused(f"its tensor {_quoted(name)} {fault}; {_AGAIN}")
        place = end
    if place > available:
        raise _Refused(
            f"it is truncated: its tensors take {_quoted(place)} bytes, and {available} bytes are there; "
            "download it again"
        )
    if place < available:
        raise _Refused(f"{available - place} bytes follow its last tensor; {_AGAIN}")


def _tensor(handle: BufferedReader, dtype: str, shape: tuple[int, ...]) -> Tensor:
    tensor = torch.empty(shape, dtype=DTYPES[dtype])
    data = tensor.reshape(-1).view(torch.uint8).numpy().data
    if handle.readinto(data) != len(data):
        raise _Refused("it became shorter while it was read; wait until its download is done")
    return tensor


def _quoted(value: Any) -> str:
    """For a sentence: control characters spelled out, and not longer than a line."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # more digits than Python prints, or lists in lists in lists
        return "(too large to show)"
    return text if len(text) <= 80 else text[:76] + " ..."
