"""What encoding took from pictures and captions: told of a stream as of a folder, part by part or at once."""

from __future__ import annotations

import csv
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lcm_kit.data import parts, sources
from lcm_kit.data.buckets import buckets, cut, nearest
from lcm_kit.data.lost import SHOWN, Lost, harm
from lcm_kit.drawing.pictures import contact_sheet, tile_of
from lcm_kit.io import own_files
from tests.recipes.small import TEMPLATE, configure
from tests.sources import rows, write_folder, write_tars

SIZES = [(64, 64), (130, 30), (210, 50), (40, 120), (30, 30), (64, 48)]
SHARDS, EACH = 3, 6


@pytest.fixture
def config(tmp_path: Path, sd_base: Callable[..., Path]) -> Callable[..., Any]:
    """`config(path, cache)`: of pictures of many sizes, as three tar files and as one folder; one caption is
    longer than any encoder reads."""
    shards = []
    for k in range(SHARDS):
        some = []
        for at, (key, png, text) in enumerate(rows(range(k * EACH, (k + 1) * EACH), 64)):
            with Image.open(io.BytesIO(png)) as image:
                image.resize(SIZES[(k + at) % len(SIZES)]).save(content := io.BytesIO(), "PNG")
            some.append(
                (key, content.getvalue(), "a very long caption " * 200 if (k, at) == (1, 2) else text)
            )
        shards.append(some)
    write_tars(tmp_path / "set", shards)
    write_folder(tmp_path / "folder", [row for some in shards for row in some])

    def build(path: str, cache: str) -> Any:
        where = {
            "path": str(tmp_path / path), "cache": str(tmp_path / cache), "resolution": 64, "batch_size": 2,
            "shapes": {"multiple": 16}, "chunks": 1,
        }  # fmt: skip
        return configure({**TEMPLATE, "base": {"path": str(sd_base())}, "data": where}, tmp_path / "run")

    return build


def test_a_stream_is_told_of_like_a_folder(
    config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (of_folder,) = sources.encode(config("folder", "plain"), progress=False)
    warned = capsys.readouterr().err
    (of_stream,) = sources.encode(config("set/data-{000000..000002}.tar", "stream"), progress=False)

    def bare(sentence: str) -> str:
        for number in range(SHARDS):
            sentence = sentence.replace(f"data-{number:06d}.tar/", "")
        return sentence.replace(".png", "")

    assert len(of_folder.remarks) == 4 and of_folder.remarks[0].startswith("shapes: ")
    assert [bare(each) for each in of_stream.remarks[:3]] == [bare(each) for each in of_folder.remarks[:3]]
    assert of_stream.remarks[3].startswith("1 caption has more tokens than the ")
    assert f"warning: {bare(of_stream.remarks[3])}" in bare(warned).splitlines()
    assert "cut off: data-000001.tar/" in of_stream.remarks[3]
    for said, cache, table in ((of_folder, "plain", ""), (of_stream, "stream", "part-*/")):
        folder = tmp_path / cache
        told = f"each picture: {folder}/{table}pictures.csv; the worst: {folder}/worst.png"
        assert said.remarks[-1] == told
        assert (folder / "worst.png").is_file() and any(folder.glob(f"{table}pictures.csv"))

    # by the tables, line by line
    tables = sorted((tmp_path / "stream").glob("part-*/pictures.csv"))
    lines = [line for table in tables for line in csv.DictReader(table.open())]
    assert len(lines) == SHARDS * EACH == len([*csv.DictReader((tmp_path / "plain/pictures.csv").open())])
    cropped = [line for line in lines if float(line["cut_away"]) > 0.1]
    enlarged = [line for line in lines if float(line["scale"]) > 1]
    assert of_stream.remarks[1].startswith(f"{len(cropped)} pictures lose more than 10% to the crop: ")
    assert of_stream.remarks[2].startswith(f"{len(enlarged)} pictures are scaled up")
    most = max(enlarged, key=lambda line: float(line["scale"]))
    assert f"{most['id']} ({float(most['scale']):.2f} times)" in of_stream.remarks[2]


def test_the_worst_of_all_parts_are_on_one_sheet(config: Any, tmp_path: Path) -> None:
    sources.encode(config("set/data-{000000..000002}.tar", "stream"), progress=False)
    cache = tmp_path / "stream"
    sheet, found = Image.open(cache / "worst.png"), []
    for part in sorted(cache.glob("part-*")):
        told = json.loads((part / "part.json").read_text())
        assert len(told["lost"]["worst"]) <= SHOWN
        own = Image.open(part / "worst.png")
        found += [(-much, told["source"], own, at) for at, (_, much) in enumerate(told["lost"]["worst"])]
    assert len(found) > SHOWN  # so that some are not shown
    found.sort(key=lambda each: each[:2])
    for number, (_, _, own, at) in enumerate(found[:SHOWN]):
        same = (tile_of(each, k, (256, 256), 4) for each, k in ((sheet, number), (own, at)))
        first, second = (tile.convert("RGB").tobytes() for tile in same)
        assert first == second, number
    before = (cache / "worst.png").read_bytes()
    sources.encode(config("set/data-{000000..000002}.tar", "stream"), progress=False)
    assert (cache / "worst.png").read_bytes() == before


def test_parts_of_an_older_version_are_said_not_to_tell(config: Any, tmp_path: Path) -> None:
    stream = config("set/data-{000000..000002}.tar", "stream")
    sources.encode(stream, progress=False)
    file = tmp_path / "stream" / parts.folder_name("data-000000.tar") / "part.json"
    told = json.loads(file.read_text())
    del told["lost"], told[own_files.HASH]
    file.write_text(own_files.json_text(told))
    (again,) = sources.encode(stream, progress=False)
    assert again.encoded == 0
    assert again.remarks[-1].startswith("of 1 shard that an older version encoded it is not known")


def test_two_accounts_make_that_of_all() -> None:
    """Against one account of all, for random pictures in random parts; and after JSON."""
    draw, shapes = random.Random(7), buckets(512, 64, 4.0)
    sizes = [(draw.randrange(100, 3000), draw.randrange(100, 3000)) for _ in range(200)]
    cuts = {str(at): cut(size, nearest(size, shapes)) for at, size in enumerate(sizes)}
    long = {str(at): draw.randrange(80, 90) for at in range(0, 200, 9)}
    total = Lost()
    names = list(cuts)
    for first in range(0, 200, 17):
        some = names[first : first + 17]
        part = Lost.of({id: cuts[id] for id in some}, {id: long[id] for id in some if id in long}, 75)
        total += Lost.read(json.loads(json.dumps(part.plain)))
    whole = Lost.of(cuts, long, 75)
    assert total == whole and [*total.sentences()] == [*whole.sentences()]
    assert sum(total.shapes.values()) == 200 and total.cut_captions == len(long)
    assert total.cropped == sum(each.lost > 0.1 for each in cuts.values())
    worst = sorted(cuts, key=lambda id: -harm(cuts[id]))[:SHOWN]
    assert [id for id, _ in total.worst] == worst
    said = [*total.sentences()]
    assert f" and {total.cropped - 3} more" in said[1]


def test_a_tile_is_found_on_its_sheet() -> None:
    tiles = [Image.new("RGB", (6, 5), (k * 20, 0, 255 - k)) for k in range(7)]
    sheet = contact_sheet(tiles, 4)
    for k, tile in enumerate(tiles):
        assert tile_of(sheet, k, (6, 5), 4).tobytes() == tile.tobytes()
