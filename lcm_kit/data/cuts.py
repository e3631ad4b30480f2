"""What encoding makes of each picture, said and shown: cropped, scaled, weighed, left out."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from lcm_kit.data import masks
from lcm_kit.data.buckets import Cut
from lcm_kit.data.crops import placed
from lcm_kit.data.image_files import of_image
from lcm_kit.data.lost import SHOWN, Lost, Named
from lcm_kit.data.records import Record
from lcm_kit.data.shards import Entry
from lcm_kit.data.survey import Survey
from lcm_kit.data.transforms import resized, upright_for
from lcm_kit.drawing.pictures import contact_sheet, save_png, tile_of
from lcm_kit.errors import UserError
from lcm_kit.io.files import atomic_write

TABLE, SHEET = "pictures.csv", "worst.png"  # in a cache's folder
_COLUMNS_SHOWN = 4  # of the sheet
_SIDE = 256  # pixels of the longer side there
_DIMMED = 0.35  # brightness of what is cut away
_COLUMNS = (
    "id", "width", "height", "shape_width", "shape_height", "scale", "cut_away", "crop", "mask", "captions",
    "repeats", "left_out",
)  # fmt: skip


def write(folder: Path, found: Survey, lost: Lost) -> None:
    """Write `pictures.csv` and `worst.png`, of the pictures that lose or are enlarged most, into `folder`.

    `lost`: the account of what was `found`. There is no sheet where nothing is lost or scaled up; an older
    one goes.
    """
    atomic_write(folder / TABLE, table(found))
    worst = Worst()
    worst.add(found, lost)
    if worst.sheet is None:
        (folder / SHEET).unlink(missing_ok=True)
    else:
        save_png(worst.sheet, folder / SHEET)


def places(folder: str, lost: Lost, *, parts: bool = False) -> str:
    """In words where both files are: in `folder`, with `parts` the table in each of its parts."""
    found = f"each picture: {folder}/{'part-*/' if parts else ''}{TABLE}"
    return f"{found}; the worst: {folder}/{SHEET}" if lost.worst else found


def table(found: Survey, *, header: bool = True) -> str:
    """CSV: a line for each picture, those that are left out with the reason."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
    if header:
        writer.writeheader()
    crops = {entry.id: entry.crop.partition(" ")[0] for entry in found.entries}
    for id, look in found.seen.items():
        cut, record = look.cut, found.records[id]
        writer.writerow({
            "id": id, "width": cut.size[0], "height": cut.size[1], "shape_width": cut.target[0],
            "shape_height": cut.target[1], "scale": f"{cut.scale:.4f}", "cut_away": f"{cut.lost:.4f}",
            "crop": crops.get(id) or "center", "mask": look.weights.partition(" ")[0][:16],
            "captions": len(record.captions), "repeats": record.repeats,
        })  # fmt: skip
    for id, reason in {**dict(found.bad), **dict(found.dropped)}.items():
        writer.writerow({"id": id, "left_out": reason})
    return text.getvalue()


class Worst:
    """The pictures that lose most of many that pass by, drawn while each is at hand."""

    def __init__(self) -> None:  # noqa: D107
        self._drawn: list[tuple[str, float, Image.Image]] = []

    def add(self, found: Survey, lost: Lost) -> None:
        """Draw those of `found`, by its account, that are worse than the least bad of so many until now."""
        first = {entry.id: entry for entry in reversed(found.entries)}
        for id, much in lost.worst:
            if len(self._drawn) == SHOWN and much <= self._drawn[-1][1]:
                return
            if tile := shown(found.records[id], first[id], found.seen[id].cut):
                self._drawn = sorted([*self._drawn, (id, much, tile)], key=lambda each: -each[1])[:SHOWN]

    @property
    def named(self) -> Named:
        """By id, with their harm, in the order of `sheet`."""
        return [(id, much) for id, much, _ in self._drawn]

    @property
    def sheet(self) -> Image.Image | None:
        """All of them, the worst first; None where nothing is lost or scaled up."""
        return _sheet([tile for _, _, tile in self._drawn])


def of_sheets(tiles: Iterable[tuple[Image.Image, int]]) -> Image.Image | None:
    """A sheet of tiles from other sheets, each with its number there."""
    return _sheet([tile_of(sheet, at, (_SIDE, _SIDE), _COLUMNS_SHOWN) for sheet, at in tiles])


def _sheet(tiles: Sequence[Image.Image]) -> Image.Image | None:
    return contact_sheet(tiles, _COLUMNS_SHOWN) if tiles else None


def shown(record: Record, entry: Entry, cut: Cut) -> Image.Image | None:
    """The picture with what is cut away darkened and the crop framed; None if it is not to be read now."""

    def drawn(image: Image.Image) -> Image.Image:
        image, _ = upright_for(image, _SIDE)
        mask = masks.of_alpha(image) if entry.weights.startswith(masks.ALPHA) else None
        if mask is None and entry.weights and record.mask is not None:
            mask = masks.read(record.mask())
        how = placed(entry.crop, cut, image, mask, entry.image)
        scale = _SIDE / max(how.resized)
        size = max(1, round(how.resized[0] * scale)), max(1, round(how.resized[1] * scale))
        whole = resized(image, size)
        left, top = (round(corner * scale) for corner in how.corner)
        right, bottom = left + round(how.target[0] * scale), top + round(how.target[1] * scale)
        found = whole.point(lambda value: value * _DIMMED)
        found.paste(whole.crop((left, top, right, bottom)), (left, top))
        ImageDraw.Draw(found).rectangle((left, top, right - 1, bottom - 1), outline="white", width=2)
        square = Image.new("RGB", (_SIDE, _SIDE), "white")
        square.paste(found, ((_SIDE - size[0]) // 2, (_SIDE - size[1]) // 2))
        ImageDraw.Draw(square).text(
            (3, _SIDE - 13), record.id[-40:], fill="black", stroke_width=2, stroke_fill="white"
        )
        return square

    try:
        return of_image(record.read(), drawn)
    except (UserError, OSError):
        return None
