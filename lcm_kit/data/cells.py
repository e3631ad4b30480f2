"""The picture in a cell of a table: its bytes, or where they are on this machine or in the hub's cache."""

from __future__ import annotations

from typing import Any

from lcm_kit.errors import UserError

# Addresses of what is here or in the hub's cache; a stranger's table must not make the kit call on a server
_INSIDE = ("zip://", "tar://", "gzip://", "file://", "hf://")


def content_of(cell: Any) -> bytes:
    """The image file's content that a cell holds: bytes, or `datasets`' pair of `bytes` and `path`.

    Raises `UserError` with the reason if there is none, and `OSError` where a file cannot be read.
    """
    import fsspec

    if cell is None:
        raise UserError("no image in this row")
    if isinstance(cell, bytes):
        return cell
    if not isinstance(cell, dict) or not {"bytes", "path"} & cell.keys():
        raise UserError(f"not an image but {type(cell).__name__} in this row")
    if cell.get("bytes") is not None:
        return bytes(cell["bytes"])
    if cell.get("path") is None:
        raise UserError("no image in this row")
    place = str(cell["path"])
    if "://" in place and not place.startswith(_INSIDE):
        raise UserError(f"an address in place of an image, {place!r}; download the images first")
    with fsspec.open(place, "rb") as handle:  # also zip://a.png::/folder/pictures.zip
        return handle.read()
