"""Where images and captions come from: a folder or zip file, or a data set of the `datasets` library.

A source gives usable records and, for the rest, what is wrong with each; whether that stops a run is decided
in `cache.py`. Images are opened later: `Record.load` finds out whether one can be read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image
from torch import Tensor

from lcm_kit import assets
from lcm_kit.assets import place
from lcm_kit.config.data import Captions as HowCaptions
from lcm_kit.config.resolution import Resolution, width_height
from lcm_kit.config.schema import Data
from lcm_kit.data.buckets import cut
from lcm_kit.data.caption_files import ENDINGS, Bad, Captions, captions_of
from lcm_kit.data.caption_tables import COLUMN, TABLES, same, stem
from lcm_kit.data.caption_tags import of_cell, prepared
from lcm_kit.data.caption_texts import Caption
from lcm_kit.data.cells import content_of
from lcm_kit.data.folder_files import Files, add_zip, files_of
from lcm_kit.data.image_files import HEAD, SUFFIXES, UNREAD, decode, is_picture, of_image
from lcm_kit.data.kohya_folders import Layout, layout_of
from lcm_kit.data.left_out import PROMPTS, LeftOut, left_out
from lcm_kit.data.rights import NOTHING, FolderRights, Rights, of_columns
from lcm_kit.data.shards import GENERAL
from lcm_kit.data.stream_kinds import is_stream
from lcm_kit.data.transforms import to_pixels, upright_for
from lcm_kit.errors import UserError, first_line
from lcm_kit.io.urls import shown

_SAVED = ("dataset_info.json", "state.json", "dataset_dict.json")  # what `Dataset.save_to_disk` writes
_DATASET = (".json", ".jsonl", ".csv", ".parquet", ".arrow", ".tar")
MASK = ".mask"  # ends the name, before its own ending, of the file that says what counts in a picture


@dataclass(frozen=True)
class Record:
    """An image and its captions, of which each step draws one."""

    id: str  # path within the folder, or row of the data set
    captions: tuple[Caption, ...]
    read: Callable[[], bytes]  # the image file's content
    repeats: int = 1  # times that an epoch has it
    mask: Callable[[], bytes] | None = None  # the content of the file that says what counts in it
    rights: Rights = NOTHING

    @property
    def caption(self) -> str:
        """The first caption: that by which the picture is named where one is enough."""
        return self.captions[0].text if self.captions else ""

    def load(self) -> Image.Image:
        """The decoded picture, RGB. Raises `UserError` with the reason if it cannot be read."""
        return decode(self.read())

    def pixels(self, resolution: Resolution) -> Tensor:
        """The largest part of that shape in its middle, [3, height, width] in [-1, 1].

        Without the whole of a very large picture. Raises as `load`.
        """
        shape = width_height(resolution)

        def shaped(image: Image.Image) -> Tensor:
            image, whole = upright_for(image, max(shape))
            return to_pixels(image, cut(whole, shape))

        return of_image(self.read(), shaped)


@dataclass(frozen=True)
class Listing:
    """What a source holds, in a fixed order."""

    items: list[Record | Bad]
    left_out: LeftOut = field(default_factory=LeftOut)
    several_lines: Sequence[str] = ()  # caption files, and lines of tables, that have several
    layout: Layout = field(default_factory=Layout)
    named: Sequence[str] = ()  # pictures whose caption is their folder's name

    @property
    def good(self) -> list[Record]:
        """The records with a usable caption."""
        return [item for item in self.items if isinstance(item, Record)]

    @property
    def bad(self) -> list[Bad]:
        """The others, each with the reason."""
        return [item for item in self.items if not isinstance(item, Record)]


def open_records(data: Data) -> tuple[list[Record], list[Bad]]:
    """The records of `data.path`, in a fixed order, and those without a usable caption with the reason.

    The pictures of `data.regularization` follow, their ids under `regularisation/`. Raises `UserError` if
    there is no such source, or nothing in it.
    """
    found = list_source(data)
    items = found.items
    if data.regularization is not None:
        name = f"data.regularization {data.regularization!r}"
        general = _folder(place(data.regularization), name, data.captions).items
        if not general:
            raise UserError(f"{name} holds no image; give another folder")
        items = items + [_below(GENERAL.rstrip("/"), item) for item in general]
    whole = Listing(items)
    return whole.good, whole.bad


def list_source(data: Data) -> Listing:
    """What `data.path` holds, without `data.regularization`. Raises `UserError` as `open_records`."""
    path, name = place(data.path), f"data.path {shown(data.path)!r}"
    if is_stream(data):
        raise UserError(
            f"{name} is read as a stream (docs/scale.md), which cannot be listed; give a folder here"
        )
    files = None if data.kind == "datasets" else _own_files(path, data)
    if files is not None:
        _refuse_without_effect(data)
        found = _listed(files, data.caption_column, data.captions, data.trigger)
    elif data.kind == "folder":
        raise UserError(f"{name}: there is no such folder; check the path")
    else:
        if data.kind == "auto" and path.is_dir() and not _holds_dataset(path):
            raise UserError(f"{name} holds no image; put images and their captions there")
        if data.captions.layout == "kohya":
            raise UserError(
                f"data.captions.layout kohya has no effect on {data.path!r}, which is no folder of images; "
                "remove it"
            )
        found = Listing(list(_datasets(path, data)))
    if not found.items:
        if path.is_dir() and _holds_dataset(path):
            raise UserError(
                f"{name} holds no image but a data set, or shards; check a config that has it as data.path"
            )
        raise UserError(f"{name} holds no image; put images and their captions there")
    return found


def _own_files(path: Path, data: Data) -> Files | None:
    """The files of a folder of pictures or of a zip file; None if `path` is for `datasets`, or nothing."""
    if path.is_file():
        if path.suffix.lower() == ".zip":
            return files_of(path)
        if data.kind == "folder" and path.suffix.lower() == ".parquet":
            raise UserError(f"data.path {data.path!r} is a data set; check a config that has it as data.path")
        if path.suffix.lower() != ".parquet":
            raise UserError(
                f"data.path {data.path!r} is a file that is not read; give a folder of images, a .zip file "
                "of one, or a .parquet file"
            )
        return None
    if not path.is_dir() or (data.kind == "auto" and any((path / name).is_file() for name in _SAVED)):
        return None
    files = files_of(path)
    if not _pictures(files):  # nothing but what was packed: as if it were unpacked
        for name in [name for name in files.found if name.lower().endswith(".zip")]:
            del files.found[name]
            add_zip(files, path / name, f"{name}/")
    return files if data.kind == "folder" or _pictures(files) else None


def _refuse_without_effect(data: Data) -> None:
    """Keys for data sets that say something of a folder would be passed over in silence."""
    for key, default in (("split", "train"), ("image_column", "image")):
        if (value := getattr(data, key)) != default:
            raise UserError(
                f"data.{key} {value!r} has no effect on {data.path!r}, which is a folder of images; remove it"
            )


def pictures(folder: Path, name: str) -> list[Record]:
    """Every image below `folder` by path, without captions; `name` is what messages call the folder.

    Raises `UserError` if there is no such folder, or no image in it.
    """
    files = files_of(folder) if folder.is_dir() else Files(folder)
    found = sorted({*_pictures(files)} - {*_masks(files).values()})
    if not found:
        raise UserError(f"{name}: there is no such folder or no image in it; check the path")
    return [Record(path, (), files.found[path].read) for path in found]


def prompts(text: str) -> list[str]:
    """The lines of a prompt file (`assets.prompts`), or the captions of a folder of pictures without one.

    Raises `UserError` if there is none.
    """
    folder = place(text)
    if not folder.is_dir() or (folder / PROMPTS).is_file():
        return assets.prompts(text)
    found = [record.caption for record in _folder(folder, text).good]
    if not found:
        raise UserError(f"prompts {text!r}: no picture there has a caption; write a file, one prompt a line")
    return found


def left_out_of(folder: Path) -> LeftOut:
    """What a folder holds that cannot be trained on, where nothing in it can; empty if it is not there."""
    if not folder.is_dir():
        return LeftOut()
    files = files_of(folder)
    try:
        return _listed(files, COLUMN, HowCaptions()).left_out
    except UserError:  # of its tables: that was said already
        return LeftOut(pictures=sorted(n for n in files.found if PurePosixPath(n).suffix.lower() in UNREAD))


def _below(prefix: str, item: Record | Bad) -> Record | Bad:
    if isinstance(item, Record):
        return replace(item, id=f"{prefix}/{item.id}")
    return f"{prefix}/{item[0]}", item[1]


def _holds_dataset(folder: Path) -> bool:
    return any(path.suffix.lower() in _DATASET for path in folder.rglob("*"))


# --- folders ---


def _folder(folder: Path, name: str, how: HowCaptions | None = None) -> Listing:
    """The pictures and captions of a folder, or of a zip file; no trigger is put before these."""
    if not folder.is_dir() and not (folder.is_file() and folder.suffix.lower() == ".zip"):
        raise UserError(f"{name}: there is no such folder; check the path")
    return _listed(files_of(folder), COLUMN, how or HowCaptions())


def _pictures(files: Files) -> list[str]:
    """The files that are pictures, sorted: by their ending, or where that says nothing by their content."""
    return sorted(name for name in files.found if _is_picture(files, name))


def _is_picture(files: Files, name: str) -> bool:
    ending = PurePosixPath(name).suffix.lower()
    if ending in SUFFIXES:
        return True
    if ending in (*ENDINGS, *_DATASET) or PurePosixPath(name).name.lower() in TABLES:
        return False
    try:
        return is_picture(files.found[name].read(HEAD))
    except (OSError, UserError):  # it is named among the files that are left out
        return False


def _listed(files: Files, column: str, how: HowCaptions, trigger: str | None = None) -> Listing:
    """Every picture with its captions or what is wrong with it, and what is left out."""
    captions, masks = captions_of(files, column, how.lines), _masks(files)
    found = [name for name in _pictures(files) if name not in masks.values()]
    layout, rights = layout_of(found, how.layout), FolderRights(files.found, captions.lines)
    items: dict[str, Record | Bad] = dict(_named_only(captions, found))
    items |= {name: (name, reason) for name, reason in files.bad}
    for name in found:
        its = layout.classes.get(name)
        told, reason = captions.of(name, its.name if its else None)
        if reason := layout.faults.get(name) or reason:
            items[name] = (name, reason)
            continue
        told, repeats = prepared(told, how, trigger), its.repeats if its else 1
        mask = masks.get(same(stem(name)))
        its_mask = None if mask is None else files.found[mask].read
        items[name] = Record(
            name, told, files.found[name].read, repeats, its_mask, rights.of(name)
        )  # fmt: skip
    stems = {same(stem(name)) for name in found}
    used = {name for path, name in masks.items() if path in stems}
    return Listing(
        [items[name] for name in sorted(items)],
        left_out(files, captions, {*found, *used, *rights.used}),
        captions.several,
        layout,
        captions.otherwise,
    )


def _masks(files: Files) -> dict[str, str]:
    """Files that say what counts in a picture, by the picture's path without its ending."""
    stems = {name: stem(name) for name in _pictures(files)}
    return {same(path.removesuffix(MASK)): name for name, path in stems.items() if path.endswith(MASK)}


def _named_only(captions: Captions, found: list[str]) -> Iterator[tuple[str, Bad]]:
    there = {same(name) for name in found}
    for name, lines in captions.lines.items():
        if name not in there:
            table = lines[0].where.partition(",")[0]
            yield name, (name, f"is named in {table}, but there is no such image")


# --- data sets ---


def _open_dataset(path: Path, data: Data) -> Any:
    import datasets

    try:
        if path.is_dir() and any((path / name).is_file() for name in _SAVED):
            found = datasets.load_from_disk(str(path))
            return found[data.split] if isinstance(found, datasets.DatasetDict) else found
        if path.is_file():
            return datasets.load_dataset("parquet", data_files=str(path), split=data.split)
        return datasets.load_dataset(str(path) if path.is_dir() else data.path, split=data.split)
    # a wrong name or split, the network, a broken file: `datasets` raises of all kinds, and none is our bug
    except Exception as error:
        reason = first_line(error)
        raise UserError(
            f"data.path {data.path!r} is neither a folder of images nor a data set that can be opened with "
            f"split {data.split!r} ({reason}); check data.path and data.split"
        ) from error


def _datasets(path: Path, data: Data) -> Iterator[Record | Bad]:
    import datasets

    rows = _open_dataset(path, data)
    for key, column in (("image_column", data.image_column), ("caption_column", data.caption_column)):
        if column not in rows.column_names:
            raise UserError(
                f"data.{key} {column!r} is no column of {data.path!r}; it has {', '.join(rows.column_names)}"
            )
    images = rows.select_columns([data.image_column]).cast_column(
        data.image_column, datasets.Image(decode=False)
    )
    rights = of_columns(rows, but=(data.image_column, data.caption_column))
    for row, given in enumerate(rows[data.caption_column]):
        told, reason = of_cell(given, data)
        id, read = f"row {row}", partial(_read_row, images, row, data.image_column)
        yield (id, reason) if reason else Record(id, told, read, rights=rights[row])


def _read_row(images: Any, row: int, column: str) -> bytes:
    return content_of(images[row][column])
