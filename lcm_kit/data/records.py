"""Where images and captions come from: a folder, or a data set of the `datasets` library (local or hub).

A source gives usable records and, for the rest, what is wrong with each; whether that stops a run is decided
in `cache.py`. Images are opened later: `Record.load` finds out whether one can be read.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from lcm_kit import assets
from lcm_kit.assets import resolve
from lcm_kit.config.schema import Data
from lcm_kit.data.transforms import to_rgb
from lcm_kit.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
METADATA = "metadata.jsonl"
_SAVED = ("dataset_info.json", "state.json", "dataset_dict.json")  # what `Dataset.save_to_disk` writes

Bad = tuple[str, str]  # id, reason


@dataclass(frozen=True)
class Record:
    """An image and its caption."""

    id: str  # path within the folder, or row of the data set
    caption: str
    read: Callable[[], bytes]  # the image file's content

    def load(self) -> Image.Image:
        """The decoded picture, RGB. Raises `UserError` with the reason if it cannot be read."""
        return decode(self.read())


def decode(content: bytes) -> Image.Image:
    """An image file's content as an RGB picture. Raises `UserError` with the reason if it cannot be read."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            return to_rgb(image)
    # PIL's plugins raise nearly anything on broken files (struct.error, SyntaxError, IndexError, ...)
    except Exception as error:
        known = not isinstance(error, UnidentifiedImageError)  # that one's text is only a memory address
        reason = (str(error) or type(error).__name__) if known else "not an image, or broken"
        raise UserError(f"unreadable image: {reason}") from error


def open_records(data: Data) -> tuple[list[Record], list[Bad]]:
    """The records of `data.path`, in a fixed order, and those without a usable caption with the reason.

    The pictures of `data.regularisation` follow, their ids under `regularisation/`. Raises `UserError` if
    there is no such source, or nothing in it.
    """
    folder = Path(resolve(data.path)).expanduser()
    if data.kind == "folder" or (data.kind == "auto" and _holds_images(folder)):
        found = list(_folder(folder, f"data.path {data.path!r}"))
    else:
        if data.kind == "auto" and folder.is_dir() and not _holds_dataset(folder):
            raise UserError(f"data.path {data.path!r} holds no image; put images and their captions there")
        found = list(_datasets(folder, data))
    if not found:
        raise UserError(f"data.path {data.path!r} holds no image; put images and their captions there")
    if data.regularisation is not None:
        name = f"data.regularisation {data.regularisation!r}"
        general = list(_folder(Path(resolve(data.regularisation)).expanduser(), name))
        if not general:
            raise UserError(f"{name} holds no image; give another folder")
        found += [_below("regularisation", item) for item in general]
    return [r for r in found if isinstance(r, Record)], [b for b in found if not isinstance(b, Record)]


def pictures(folder: Path, name: str) -> list[Record]:
    """Every image below `folder` by path, without captions; `name` is what messages call the folder.

    Raises `UserError` if there is no such folder, or no image in it.
    """
    paths = sorted(_images(folder)) if folder.is_dir() else []
    if not paths:
        raise UserError(f"{name}: there is no such folder or no image in it; check the path")
    return [Record(path.relative_to(folder).as_posix(), "", path.read_bytes) for path in paths]


def prompts(text: str) -> list[str]:
    """The lines of a prompt file (`assets.prompts`), or the captions of a folder of pictures without one.

    Raises `UserError` if there is none.
    """
    folder = Path(resolve(text)).expanduser()
    if not folder.is_dir() or (folder / "prompts.txt").is_file():
        return assets.prompts(text)
    found = [item.caption for item in _folder(folder, text) if isinstance(item, Record)]
    if not found:
        raise UserError(f"prompts {text!r}: no picture there has a caption; write a file, one prompt a line")
    return found


def _below(prefix: str, item: Record | Bad) -> Record | Bad:
    if isinstance(item, Record):
        return replace(item, id=f"{prefix}/{item.id}")
    return f"{prefix}/{item[0]}", item[1]


def _images(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.suffix.lower() in SUFFIXES and not hidden and path.is_file():
            yield path


def _holds_images(folder: Path) -> bool:
    saved = any((folder / name).is_file() for name in _SAVED)
    return folder.is_dir() and not saved and next(_images(folder), None) is not None


def _holds_dataset(folder: Path) -> bool:
    ends = (".json", ".jsonl", ".csv", ".parquet", ".arrow", ".tar", ".zip")
    return any(path.suffix.lower() in ends for path in folder.rglob("*"))


def _folder(folder: Path, name: str) -> Iterator[Record | Bad]:
    """Every image below `folder` by path. A `.txt` beside one goes before its line in `metadata.jsonl`."""
    if not folder.is_dir():
        raise UserError(f"{name}: there is no such folder; check the path")
    lines = _metadata(folder)
    paths = {path.relative_to(folder).as_posix(): path for path in _images(folder)}
    for id in sorted(paths.keys() | lines.keys()):
        if id in paths:
            yield _record(id, paths[id], lines)
        else:
            yield id, f"is named in {METADATA}, but there is no such image"


def _record(id: str, path: Path, lines: dict[str, Any]) -> Record | Bad:
    beside = path.with_suffix(".txt")
    if beside.is_file():
        try:
            caption: Any = beside.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            return id, f"caption file {beside.name} cannot be read ({error})"
    elif id in lines:
        caption = lines[id]
    else:
        return id, f"no caption: there is neither {beside.name} nor a line for it in {METADATA}"
    return _checked(id, caption, path.read_bytes)


def _checked(id: str, caption: Any, read: Callable[[], bytes]) -> Record | Bad:
    """The record with white space in its caption tidied, or why the caption is of no use."""
    if caption is None:
        return id, "no caption"
    if not isinstance(caption, str):
        return id, f"caption is not text but {type(caption).__name__}"
    tidy = " ".join(caption.split())
    return Record(id, tidy, read) if tidy else (id, "empty caption")


def _metadata(folder: Path) -> dict[str, Any]:
    """Captions by image path from every metadata.jsonl below `folder`; `file_name` counts from beside it."""
    found: dict[str, Any] = {}
    for file in sorted(folder.rglob(METADATA)):
        for number, line in enumerate(file.read_bytes().splitlines(), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                path = file.parent / row["file_name"]
                found[path.relative_to(folder).as_posix()] = row.get("text")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(
                    f"{file}, line {number}: not a JSON object with file_name and text "
                    f"({type(error).__name__}: {error}); mend the line"
                ) from error
    return found


def _open_dataset(folder: Path, data: Data) -> Any:
    import datasets

    try:
        if folder.is_dir() and any((folder / name).is_file() for name in _SAVED):
            found = datasets.load_from_disk(str(folder))
            return found[data.split] if isinstance(found, datasets.DatasetDict) else found
        return datasets.load_dataset(str(folder) if folder.is_dir() else data.path, split=data.split)
    # a wrong name or split, the network, a broken file: `datasets` raises of all kinds, and none is our bug
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(
            f"data.path {data.path!r} is neither a folder of images nor a data set that can be opened with "
            f"split {data.split!r} ({reason}); check data.path and data.split"
        ) from error


def _datasets(folder: Path, data: Data) -> Iterator[Record | Bad]:
    import datasets

    rows = _open_dataset(folder, data)
    for key, column in (("image_column", data.image_column), ("caption_column", data.caption_column)):
        if column not in rows.column_names:
            raise UserError(
                f"data.{key} {column!r} is no column of {data.path!r}; it has {', '.join(rows.column_names)}"
            )
    images = rows.select_columns([data.image_column]).cast_column(
        data.image_column, datasets.Image(decode=False)
    )
    for row, caption in enumerate(rows[data.caption_column]):
        yield _checked(f"row {row}", caption, partial(_read_row, images, row, data.image_column))


def _read_row(images: Any, row: int, column: str) -> bytes:
    cell = images[row][column]
    if cell is None:
        raise UserError("no image in this row")
    return cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()
