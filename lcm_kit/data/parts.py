"""A stream as a cache: a part for each shard of the source, each made whole by whoever has it, and a list.

No machine lists, holds or shuffles all pictures: what is in memory is a shard's pictures as they come, and
rows of some shapes until they fill a file. A part is a function of its source shard and the settings alone,
so that one process, several, and a run that was killed write the same bytes. The folder is here or at an
address (`io.remote`):

    parts.json                     the parts in order, the settings; last
    empty.safetensors              the unconditional pass
    part-HASH/part.json            what it was made from and holds; last of its files: it is done
    part-HASH/records.json         its rows
    part-HASH/pictures.csv         what became of each picture, for people
    part-HASH/worst.png            those that lose most; the worst of all parts are in worst.png
    part-HASH/shard-00000.safetensors, ...
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, islice
from typing import Any, TypeVar

from PIL import Image
from torch import Tensor

from lcm_kit.bases.tokens import too_long
from lcm_kit.data import cuts, rights, shards
from lcm_kit.data.caption_files import Bad
from lcm_kit.data.encoding import RowMaker, computed
from lcm_kit.data.findings import number
from lcm_kit.data.lost import Lost, captions_by_name
from lcm_kit.data.progress import listing
from lcm_kit.data.records import Record
from lcm_kit.data.shards import Entry
from lcm_kit.data.streams import SourceShard
from lcm_kit.data.survey import Survey, Surveyor
from lcm_kit.drawing.pictures import png_bytes
from lcm_kit.errors import UserError
from lcm_kit.io import own_files, own_shapes
from lcm_kit.io.files import sha256_bytes
from lcm_kit.io.remote import Folder

T = TypeVar("T")
Shape = tuple[int, int] | None  # as of an `Entry`
PARTS, PART, RECORDS = "parts.json", "part.json", "records.json"
_AT_ONCE = 32  # records that are looked at together
_HELD = 4  # times `data.shard_size`: rows that are in memory at most, of all shapes
_AGAIN = "run `lcm-kit encode` with this config again, which keeps what is whole"


def folder_name(source: str) -> str:
    """The folder of a source shard's part: by its name alone, so that a set that grows keeps its parts."""
    return f"part-{sha256_bytes(source.encode())[:16]}"


def made_by(settings: Mapping[str, Any]) -> str:
    """Hash of all that says which rows there are of a source shard's records, and what is in them."""
    return sha256_bytes(json.dumps(shards.without_places(settings), sort_keys=True).encode())


def read_json(folder: Folder, name: str, shape: type[T]) -> T | None:
    """A JSON file of ours in `folder`; None if it is not there. Raises `UserError` if it is damaged."""
    if folder.size(name) is None:
        return None
    return own_files.parse_json(f"{folder.shown}/{name}", folder.read(name), shape, _AGAIN)


def done(folder: Folder, source: SourceShard, settings: Mapping[str, Any]) -> own_shapes.Part | None:
    """The part of a source shard in the cache `folder`; None if it is missing or made from something else."""
    part = folder.below(folder_name(source.name))
    try:
        found = read_json(part, PART, own_shapes.Part)
    except UserError:  # it is made anew
        return None
    if found is None or found["source"] != source.name or found["made_by"] != made_by(settings):
        return None
    if found["identity"] != source.identity():
        return None
    whole = all(part.made_from(shard["file"]) == shard["content"] for shard in found["shards"])
    return found if whole else None


def worst_of(folder: Folder, source: str) -> Image.Image:
    """The sheet of the worst pictures of a part, in the order of its account. Raises `UserError` without."""
    part = folder.below(folder_name(source))
    again = f"its pictures are on no sheet; to have them there remove {PART} beside it, and encode again"
    return own_files.parse_picture(f"{part.shown}/{cuts.SHEET}", part.read(cuts.SHEET), again)


@dataclass
class _Rows:
    """Rows of one shape that wait to fill a file."""

    entries: list[Entry] = field(default_factory=list)
    batches: list[Mapping[str, Tensor]] = field(default_factory=list)


@dataclass(frozen=True)
class PartMaker:
    """Makes the part of a source shard: a pure function of it, of the base and of the settings."""

    surveyor: Surveyor
    settings: Mapping[str, Any]
    folder: Folder
    maker: Callable[[Mapping[str, Record]], RowMaker]  # of the rows of records, by id
    batch: int  # pictures a pass of the VAE

    def make(self, source: SourceShard) -> own_shapes.Part:
        """Encode all pictures of `source` and write its part, `part.json` last.

        Raises `UserError` with the shard's name for pictures that cannot be used, unless `data.skip_bad`.
        """
        identity = source.identity()
        data = self.surveyor.data
        writer = _Writer(self.folder.below(folder_name(source.name)), self.settings, data.shard_size)
        bad: list[Bad] = []
        dropped: list[Bad] = []
        told: list[tuple[own_shapes.Rights | None, int]] = []
        waiting: dict[Shape, list[Entry]] = {}
        records: dict[str, Record] = {}  # of the rows that wait: their pictures are in memory
        rows_of: Counter[str] = Counter()

        def encode(shape: Shape) -> None:
            entries = waiting.pop(shape)
            for some, tensors in computed(self.maker(records), entries):
                writer.add(shape, some, tensors)
            rows_of.subtract(entry.id for entry in entries)
            for id in {entry.id for entry in entries if not rows_of[entry.id]}:
                del records[id], rows_of[id]

        stream = source.records()
        while some := list(islice(stream, _AT_ONCE)):
            found = self.surveyor.look_at([each for each in some if isinstance(each, Record)])
            bad += [*(each for each in some if not isinstance(each, Record)), *found.bad]
            dropped += found.dropped
            told.append((found.rights, len(found.records)))
            writer.lines.append(cuts.table(found, header=not writer.lines))
            lost = self._lost(found)
            writer.worst.add(found, lost)
            writer.lost += lost
            records |= found.records
            rows_of.update(entry.id for entry in found.entries)
            for entry in found.entries:
                rows = waiting.setdefault(entry.size, [])
                rows.append(entry)
                if len(rows) >= self.batch:
                    encode(entry.size)
        for shape in sorted(waiting, key=lambda shape: shape or ()):
            encode(shape)
        if bad and not data.skip_bad:
            raise UserError(
                f"{number(len(bad), 'record')} of {source.name} of {data.path!r} cannot be used; fix them, "
                "or leave them out with data.skip_bad=true; parts that are done are kept:",
                listing(bad),
            )
        return writer.finish(source.name, identity, [*bad, *dropped], told)

    def _lost(self, found: Survey) -> Lost:
        texts = captions_by_name((record.id, record.captions) for record in found.records.values())
        long, room = too_long(self.surveyor.tokenizers, texts, self.surveyor.data.chunks)
        return Lost.of({id: look.cut for id, look in found.seen.items()}, long, room)


@dataclass
class _Writer:
    """Writes a part's files as rows come."""

    folder: Folder
    settings: Mapping[str, Any]
    size: int  # rows a file
    rows: dict[Shape, _Rows] = field(default_factory=dict)
    entries: list[Entry] = field(default_factory=list)  # that are written
    files: list[own_shapes.Shard] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)  # of the table for people
    lost: Lost = field(default_factory=Lost)
    worst: cuts.Worst = field(default_factory=cuts.Worst)

    def add(self, shape: Shape, entries: Sequence[Entry], tensors: Mapping[str, Tensor]) -> None:
        held = self.rows.setdefault(shape, _Rows())
        held.entries += entries
        held.batches.append(tensors)
        if len(held.entries) >= self.size:
            self._write(shape)
        elif sum(len(each.entries) for each in self.rows.values()) > _HELD * self.size:
            self._write(max(self.rows, key=lambda shape: len(self.rows[shape].entries)))

    def _write(self, shape: Shape) -> None:
        held = self.rows.pop(shape)
        content = shards.content_hash(self.settings, held.entries)
        shard = shards.Shard(f"shard-{len(self.files):05d}.safetensors", content, held.entries)
        self.folder.write(shard.file, own_files.tensor_bytes(shards.gathered(held.batches), content))
        self.entries += held.entries
        self.files.append(shard.row)

    def finish(
        self,
        source: str,
        identity: str,
        skipped: Sequence[Bad],
        rights_told: Sequence[tuple[own_shapes.Rights | None, int]],
    ) -> own_shapes.Part:
        for shape in sorted(self.rows, key=lambda shape: shape or ()):
            self._write(shape)
        told = [{"id": id, "reason": reason} for id, reason in skipped]
        records = {"records": [entry.row for entry in self.entries], "skipped": told}
        self.folder.write(RECORDS, own_files.json_text(records))
        self.folder.write(cuts.TABLE, "".join(self.lines))
        if (sheet := self.worst.sheet) is not None:
            self.folder.write(cuts.SHEET, png_bytes(sheet))
        shapes = [(tuple(f.get("size", ())), f["rows"]) for f in self.files]
        runs = [
            [sum(n for _, n in same), list(shape)] for shape, same in groupby(shapes, lambda each: each[0])
        ]
        part: own_shapes.Part = {
            "source": source, "identity": identity, "made_by": made_by(self.settings),
            "rows": len(self.entries), "runs": runs, "shards": self.files, "skipped": len(told),
            "pictures": sum(count for _, count in rights_told), 
            "several": any(entry.captions for entry in self.entries),
            "weighted": any(entry.weights for entry in self.entries),
            # in the order of the sheet: a picture that could not be drawn is not there
            "lost": replace(self.lost, worst=self.worst.named).plain,
        }  # fmt: skip
        if (found := rights.merged(rights_told)) is not None:
            part["rights"] = found
        self._tidy({RECORDS, cuts.TABLE, PART, *(each["file"] for each in self.files)}, sheet is not None)
        self.folder.write(PART, own_files.json_text(part))
        return part

    def _tidy(self, written: set[str], sheet: bool) -> None:
        """Remove what the part has of before, when it was made otherwise."""
        for name in self.folder.sizes().keys() - written - ({cuts.SHEET} if sheet else set()):
            self.folder.delete(name)
