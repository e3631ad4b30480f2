"""Sources for the tests of streams: small pictures with captions, as tar and parquet files."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from lcm_kit.data.streams import SourceShard

Row = tuple[str, bytes, str]  # key, PNG, caption


def picture(number: int, side: int = 8) -> bytes:
    """A PNG of noise, another one for every number."""
    noise = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    return file.getvalue()


def rows(numbers: Iterable[int], side: int = 8) -> list[Row]:
    return [(f"{number:06d}", picture(number, side), f"picture {number}") for number in numbers]


def tar_bytes(files: Iterable[tuple[str, bytes]], mode: str = "w") -> bytes:
    """A tar file of these names and contents, in order."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:  # type: ignore[call-overload]
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def pairs(some: Sequence[Row]) -> list[tuple[str, bytes]]:
    """The files of rows: a picture and its caption each."""
    return [file for key, png, text in some for file in ((f"{key}.png", png), (f"{key}.txt", text.encode()))]


def write_folder(folder: Path, some: Sequence[Row]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in pairs(some):
        (folder / name).write_bytes(content)


def write_tars(folder: Path, shards: Sequence[Sequence[Row]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, some in enumerate(shards):
        (folder / f"data-{number:06d}.tar").write_bytes(tar_bytes(pairs(some)))


def write_parquet(path: Path, some: Sequence[Row], group: int = 4, *, struct: bool = True) -> None:
    """As `datasets` writes pictures (a struct), or as bytes alone; row groups of `group` rows."""
    images = [{"bytes": png, "path": f"{key}.png"} if struct else png for key, png, _ in some]
    table = pa.table({"image": images, "text": [text for *_, text in some], "other": list(range(len(some)))})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=group)


def read(shards: Iterable[SourceShard]) -> tuple[list[tuple[str, str, bytes]], dict[str, str]]:
    """All records as (id, caption, picture), and what is wrong with the others, by id."""
    good, bad = [], {}
    for shard in shards:
        for item in shard.records():
            if isinstance(item, tuple):
                bad[item[0]] = item[1]
            else:
                good.append((item.id, item.caption, item.read()))
    return good, bad
