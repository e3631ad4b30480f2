"""What encoding makes of each picture, said and shown: cropped, scaled, weighed, left out."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from lcm_kit.data import masks
from lcm_kit.data.buckets import Cut
from lcm_kit.data.crops import placed
from lcm_kit.data.findings import few, number
from lcm_kit.data.image_files import of_image
from lcm_kit.data.records import Record
from lcm_kit.data.shards import Entry
from lcm_kit.data.survey import Survey
from lcm_kit.data.transforms import resized, upright_for
from lcm_kit.drawing.pictures import contact_sheet, save_png
from lcm_kit.errors import UserError
from lcm_kit.io.files import atomic_write

TABLE, SHEET = "pictures.csv", "worst.png"  # in a cache's folder
_MUCH = 0.1  # share of a picture that is cut away from where it is said
_SHOWN = 12  # pictures of the sheet
_SIDE = 256  # pixels of the longer side there
_DIMMED = 0.35  # brightness of what is cut away
_COLUMNS = (
    "id", "width", "height", "shape_width", "shape_height", "scale", "cut_away", "crop", "mask", "captions",
    "repeats", "left_out",
)  # fmt: skip


def sentences(cuts: Mapping[str, Cut]) -> Iterator[str]:
    """What becomes of pictures, by id: their shapes, what is cut away most, what is scaled up."""
    shapes = Counter(cut.target for cut in cuts.values())
    named = [f"{width} x {height} ({count})" for (width, height), count in shapes.most_common()]
    yield f"shapes: {few(named, 8)}"
    much = sorted((id for id, cut in cuts.items() if cut.lost > _MUCH), key=lambda id: -cuts[id].lost)
    if much:
        what = number(len(much), "picture", after=("loses", "lose"))
        worst = few([f"{id} ({cuts[id].lost:.0%})" for id in much])
        yield f"{what} more than {_MUCH:.0%} to the crop: {worst}"
    large = sorted((id for id, cut in cuts.items() if cut.scale > 1), key=lambda id: -cuts[id].scale)
    if large:
        what = number(len(large), "picture", after=("is", "are"))
        worst = few([f"{id} ({cuts[id].scale:.2f} times)" for id in large])
        yield f"{what} scaled up, which teaches blur: {worst} (data.shapes.small)"


def write(folder: Path, found: Survey) -> None:
    """Write `pictures.csv` and `worst.png`, of the pictures that lose or are enlarged most, into `folder`.

    There is no sheet where nothing is lost or scaled up; an older one goes.
    """
    atomic_write(folder / TABLE, table(found))
    worst = _worst({id: look.cut for id, look in found.seen.items()})
    if not worst:
        (folder / SHEET).unlink(missing_ok=True)
        return
    first = {entry.id: entry for entry in reversed(found.entries)}
    tiles = [tile for id in worst if (tile := shown(found.records[id], first[id], found.seen[id].cut))]
    if tiles:
        save_png(contact_sheet(tiles), folder / SHEET)


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


def _worst(cuts: Mapping[str, Cut]) -> Sequence[str]:
    """The pictures that lose most, by what is cut away or, if that is more, by how much they are enlarged."""
    harm = {id: max(cut.lost, 1 - 1 / max(cut.scale, 1.0)) for id, cut in cuts.items()}
    return sorted((id for id in harm if harm[id] > 0.005), key=lambda id: -harm[id])[:_SHOWN]


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
