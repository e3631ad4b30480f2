"""Sources that are read as streams: tar and parquet files and `datasets`, here and in fsspec's memory."""

from __future__ import annotations

import gzip
import io
import re
import subprocess
import tarfile
import tracemalloc
from pathlib import Path

import fsspec
import pytest

from lcm_kit.cli.check import check
from lcm_kit.config import shipped
from lcm_kit.config.data import Captions
from lcm_kit.config.load import load
from lcm_kit.config.schema import Data
from lcm_kit.data.records import Record, open_records
from lcm_kit.data.stream_kinds import is_stream
from lcm_kit.data.streams import source_shards
from lcm_kit.errors import UserError
from lcm_kit.io import reading, urls
from lcm_kit.plan.disk import _pictures
from tests.sources import pairs, picture, read, rows, tar_bytes, write_folder, write_parquet, write_tars


def _one(path: Path, content: bytes, **kwargs: str) -> tuple[list[tuple[str, str, bytes]], dict[str, str]]:
    path.write_bytes(content)
    return read(source_shards(Data(path=str(path), **kwargs)))  # type: ignore[arg-type]


# -- Tar files -----------------------------------------------------------------------------------------------


def test_a_set_of_tar_files_is_read_in_order_wherever_it_lies(tmp_path: Path) -> None:
    shards = [rows(range(0, 3)), rows(range(3, 4)), rows(range(4, 9))]
    write_tars(tmp_path / "set", shards)
    wanted = [
        (f"data-{number:06d}.tar/{key}", text, png)
        for number, some in enumerate(shards)
        for key, png, text in some
    ]
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "set"), "/tars", recursive=True)
    for path in (
        f"{tmp_path}/set", f"{tmp_path}/set/*.tar", f"{tmp_path}/set/data-{{000000..000002}}.tar",
        "memory://tars", "memory://tars/", "memory://tars/data-*.tar", "memory://tars/data-00000[0-2].tar",
        "memory://tars/data-{000000..000002}.tar",
    ):  # fmt: skip
        found = source_shards(Data(path=path))
        assert [shard.name for shard in found] == [f"data-{n:06d}.tar" for n in range(3)], path
        assert read(found) == (wanted, {}), path
    backwards = source_shards(Data(path=f"{tmp_path}/set/data-00000{{2,0}}.tar"))
    assert [shard.name for shard in backwards] == ["data-000002.tar", "data-000000.tar"]
    assert read(backwards)[0] == wanted[4:] + wanted[:3]
    first, again = (list(backwards[1].records()) for _ in range(2))  # a new stream at every call
    assert [item.read() for item in first] == [item.read() for item in again] == [w[2] for w in wanted[:3]]


def test_captions_and_pictures_by_their_endings(tmp_path: Path) -> None:
    one, two = picture(1), picture(2)
    content = tar_bytes([
        ("./a/x.png", one), ("./a/x.txt", b"  from the\n text "), ("./a/x.json", b'{"caption": "not read"}'),
        ("a/y.PNG", one), ("a/y.json", '{"caption": "Größe", "n": 3}'.encode()),
        ("b.caption", b"before its picture"), ("b.bin", two),  # a picture whatever its ending
        ("c.jpg", one), ("c.hr.jpg", two), ("c.txt", b"two"),
        ("d.png", one), ("e.txt", b"alone"), ("f.png", one), ("f.json", b"[1]"), ("g.png", one),
        ("g.txt", b" "), ("h.svg", b"<svg/>"), ("h.txt", b"h"), ("README.md", b"# about"), ("._a.png", one),
        ("__note__", b"n"), ("i.png", one), ("i.txt", b"\xff"), ("j.png", one), ("j.png", one),
        ("j.txt", b"twice"), ("b.png", two), ("b.txt", b"again"),
    ])  # fmt: skip
    good, bad = _one(tmp_path / "mixed.tar", content)
    assert good == [
        ("mixed.tar/a/x", "from the text", one),
        ("mixed.tar/a/y", "Größe", one),
        ("mixed.tar/b", "before its picture", two),
    ]
    for key, words in {
        "c": "2 images with one name up to the first dot: jpg, hr.jpg; choose one of these endings",
        "d": "no caption: there is neither .txt nor .caption, nor a .json with text",
        "e": "no image of this name in the tar file: there is txt",
        "f": "json holds no JSON object",
        "g": "empty caption",
        "h": "no image of this name in the tar file: there is txt, svg",
        "i": "caption file txt cannot be read",
        "j": "j.png is there twice",
        "b": "its name came before in this file",
    }.items():
        assert bad.pop(f"mixed.tar/{key}").startswith(words), key
    assert not bad
    chosen, _ = _one(tmp_path / "mixed.tar", content, image_column="hr.jpg")
    assert chosen == [("mixed.tar/c", "two", two)]
    chosen, _ = _one(tmp_path / "mixed.tar", content, caption_column="caption")
    assert [each[:2] for each in chosen] == [
        ("mixed.tar/a/x", "not read"), ("mixed.tar/a/y", "Größe"), ("mixed.tar/b", "before its picture"),
    ]  # fmt: skip


def test_masks_tags_and_several_captions_as_in_a_folder(tmp_path: Path) -> None:
    files = [
        ("a.png", picture(1)), ("a.mask.png", picture(2)), ("a.txt", b"one\n\nother one"),
        ("b.png", picture(3)), ("b.json", b'{"caption": [{"text": "x", "weight": 3}, "y"], "weight": 2}'),
        ("c.png", picture(4)), ("c.json", b'{"tags": ["red", "round"], "license": "CC0-1.0"}'),
        ("d.mask.png", picture(5)), ("d.txt", b"a mask alone"),
    ]  # fmt: skip
    for name, content in files:
        if not name.startswith("d"):
            (tmp_path / "folder" / name).parent.mkdir(exist_ok=True)
            (tmp_path / "folder" / name).write_bytes(content)
    (tmp_path / "x.tar").write_bytes(tar_bytes(files))
    how = {"trigger": "brandx", "captions": Captions(lines="each", shuffle_tags=2, trigger_in_front=True)}
    good, bad = open_records(Data(path=str(tmp_path / "folder"), kind="folder", **how))  # type: ignore[arg-type]
    assert len(good) == 3 and not bad
    *found, last = source_shards(Data(path=str(tmp_path / "x.tar"), **how))[0].records()  # type: ignore[arg-type]
    assert last == ("x.tar/d", "no image of this name in the tar file: there is mask.png, txt")
    for item, wanted in zip(found, good, strict=True):
        assert isinstance(item, Record) and item.id == f"x.tar/{wanted.id[0]}"
        assert item.captions == wanted.captions and item.read() == wanted.read()
    assert [caption.text for caption in good[0].captions] == ["brandx, one", "brandx, other one"]
    assert [item.mask and item.mask() for item in found] == [picture(2), None, None]  # type: ignore[union-attr]


def test_a_packed_tar_file_of_one_or_several_parts(tmp_path: Path) -> None:
    some = rows(range(6))
    plain = tar_bytes(pairs(some))
    parts = gzip.compress(plain[:5000]) + gzip.compress(plain[5000:])  # as pigz and bgzip write
    for content in (gzip.compress(plain), parts, tar_bytes(pairs(some), "w:gz")):
        good, bad = _one(tmp_path / "x.tar.gz", content)
        assert [(text, png) for _, text, png in good] == [(text, png) for _, png, text in some] and not bad
    broken = bytearray(gzip.compress(plain))
    broken[-5] ^= 1  # the checksum, which tarfile's own streams do not look at
    for content in (bytes(broken), gzip.compress(plain)[:-200]):
        with pytest.raises(UserError, match=r"x.tar.gz: a broken tar file .*records could be read before"):
            _one(tmp_path / "x.tar.gz", content)


def test_a_tar_file_that_is_not_whole_is_never_just_short(tmp_path: Path) -> None:
    """tarfile itself, webdataset and `datasets` read some of the records of most of these and say nothing."""
    whole = tar_bytes(pairs(rows(range(10))))
    with tarfile.open(fileobj=io.BytesIO(whole)) as archive:
        members = archive.getmembers()
    seventh = members[12]  # the picture of the seventh record
    header = bytearray(whole)
    header[seventh.offset + 150] ^= 1
    silent = 0
    for content, records, words in (  # a record is whole when another one begins
        (whole[: seventh.offset], 5, "it is cut off: no end mark"),
        (whole[: seventh.offset + 100], 5, "it is cut off"),
        (whole[: seventh.offset_data + 10], 6, "unexpected end of data"),
        (whole[: members[-1].offset_data + 4], 9, "unexpected end of data"),
        (bytes(header), 5, "no header of a file at byte"),
        (whole + whole, 9, "there is more after its end mark"),
        (b"no tar file at all" * 60, 0, "."),
        (b"", 0, "empty file"),
    ):
        count, path = 0, tmp_path / "x.tar"
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"{words}.*; {records} records could be read") as caught:
            for _ in source_shards(Data(path=str(path)))[0].records():
                count += 1
        assert count == records and "x.tar: a broken tar file" in str(caught.value)
        try:
            with tarfile.open(fileobj=io.BytesIO(content), mode="r|") as archive:
                silent += len([archive.extractfile(member).read() for member in archive]) > 0  # type: ignore[union-attr]
        except tarfile.TarError:
            pass
    assert silent >= 4  # so these checks are needed
    import datasets

    for content in (whole[: seventh.offset], bytes(header)):
        (tmp_path / "x.tar").write_bytes(content)
        some = datasets.load_dataset(
            "webdataset", data_files=f"{tmp_path}/x.tar", split="train", streaming=True
        )
        assert len(list(some)) == 6


def test_shards_made_as_the_page_says(tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "scale.md").read_text()
    (lines,) = re.findall(r"```bash\n(find photos .*?)```", page, re.DOTALL)
    some = rows(range(7))
    write_folder(tmp_path / "photos", some)
    subprocess.run(["bash", "-ec", lines.replace("4000", "4")], cwd=tmp_path, check=True)
    good, bad = read(source_shards(Data(path=f"{tmp_path}/data-{{000000..000003}}.tar")))
    assert [(text, png) for _, text, png in good] == [(text, png) for _, png, text in some] and not bad
    assert [id for id, *_ in good][5:] == ["data-000002.tar/photos/000005", "data-000003.tar/photos/000006"]


def test_a_link_is_no_picture(tmp_path: Path) -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        link = tarfile.TarInfo("a.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        text = tarfile.TarInfo("a.txt")
        text.size = 1
        archive.addfile(text, io.BytesIO(b"x"))
    assert _one(tmp_path / "x.tar", file.getvalue()) == (
        [], {"x.tar/a": "a.png is a link, not a file; write the tar file with its content"},
    )  # fmt: skip


# -- Parquet files and data sets -----------------------------------------------------------------------------


@pytest.mark.parametrize("struct", [True, False])
def test_parquet_files_row_by_row(tmp_path: Path, struct: bool) -> None:
    some = rows(range(19))
    some[3] = ("000003", some[3][1], " ")
    write_parquet(tmp_path / "p" / "b.parquet", some, struct=struct)
    write_parquet(tmp_path / "p" / "a.parquet", rows(range(50, 53)), struct=struct)
    fsspec.filesystem("memory").put(str(tmp_path / "p"), "/parquet", recursive=True)
    wanted = [(f"a.parquet/{n}", f"picture {50 + n}", picture(50 + n)) for n in range(3)]
    wanted += [(f"b.parquet/{n}", text, png) for n, (_, png, text) in enumerate(some) if n != 3]
    for path, kind in (
        (f"{tmp_path}/p", "parquet"),
        ("memory://parquet", "auto"),
        (f"{tmp_path}/p/*.parquet", "auto"),
    ):
        assert read(source_shards(Data(path=path, kind=kind))) == (wanted, {"b.parquet/3": "empty caption"})
    data = Data(path="memory://parquet", caption_column="words")
    with pytest.raises(
        UserError, match="data.caption_column 'words' is no column of .*it has image, text, other"
    ):
        read(source_shards(data))


def test_a_broken_parquet_file_says_how_far_it_could_be_read(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    write_parquet(path, rows(range(20), side=32))
    whole = path.read_bytes()
    second = whole.index(picture(9, 32))
    for content, read_before in (
        (whole[:-5], "0"), (b"", "0"), (whole[:100], "0"),
        (whole[: second - 40] + bytes(5000) + whole[second + 4960 :], "[0-9]+"),
    ):  # fmt: skip
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"x.parquet: a broken parquet file .*; {read_before} rows could"):
            read(source_shards(Data(path=str(path), kind="parquet")))


def test_a_path_without_its_picture_is_not_looked_for(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "a.png").write_bytes(picture(1))
    cells = [{"bytes": None, "path": str(tmp_path / "a.png")}, None, {"bytes": b"x", "path": None}]
    pq.write_table(pa.table({"image": cells, "text": ["a", "b", "c"]}), tmp_path / "x.parquet")
    shard = source_shards(Data(path=str(tmp_path / "x.parquet"), kind="parquet"))[0]
    first, second, third = shard.records()
    assert isinstance(first, tuple) and "the path of an image without its bytes" in first[1]
    with pytest.raises(UserError, match="no image in this row"):
        second.read()  # type: ignore[union-attr]
    with pytest.raises(UserError, match="not an image, or broken"):
        third.load()  # type: ignore[union-attr]


def test_a_streamed_data_set_is_the_same_rows_as_the_one_that_is_not(tmp_path: Path) -> None:
    for number in range(3):
        some = rows(range(number * 4, number * 4 + 4))
        if number == 1:
            some[2] = (some[2][0], some[2][1], "")
        write_parquet(tmp_path / "set" / f"train-{number:05d}-of-00003.parquet", some)
    listed, bad = open_records(Data(path=str(tmp_path / "set"), kind="datasets"))
    data = Data(path=str(tmp_path / "set"), streaming=True)
    shards = source_shards(data)
    good, missing = read(shards)
    assert [shard.name for shard in shards] == [f"train-{n:05d}-of-00003" for n in range(3)]
    assert [(text, png) for _, text, png in good] == [(r.caption, r.read()) for r in listed] and len(
        good
    ) == 11
    assert good[5][0] == "train-00001-of-00003/1" and good[6][0] == "train-00001-of-00003/3"
    assert missing == {"train-00001-of-00003/2": "empty caption"} and bad == [("row 6", "empty caption")]
    marks = [shard.identity() for shard in shards]
    assert len(set(marks)) == 3 and "" not in marks
    assert [shard.identity() for shard in source_shards(data)] == marks
    write_parquet(tmp_path / "set" / "train-00001-of-00003.parquet", rows(range(9)))
    assert source_shards(data)[1].identity() != marks[1]
    with pytest.raises(UserError, match="can be streamed with split 'test'"):
        source_shards(Data(path=str(tmp_path / "set"), streaming=True, split="test"))
    with pytest.raises(
        UserError, match="data.image_column 'picture' is no column of .*it has image, text, other"
    ):
        source_shards(Data(path=str(tmp_path / "set"), streaming=True, image_column="picture"))


# -- Which sources, and their shards -------------------------------------------------------------------------


def test_patterns_are_spelled_out_as_a_shell_does() -> None:
    for pattern in (
        "x-{000..012}.tar", "{a,b}/x-{8..11}.tar", "x-{3..1}", "x-{007..9}", "{1..3}{a,}", "plain.tar", "{a}",
    ):  # fmt: skip
        shell = subprocess.run(["bash", "-c", f"echo {pattern}"], capture_output=True, text=True, check=True)
        assert list(urls.spelled_out(pattern)) == shell.stdout.split(), pattern
    with pytest.raises(UserError, match="more than 1,000,000 addresses"):
        urls.spelled_out("x-{0000000..9999999}.tar")


def test_names_begin_where_the_pattern_does(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        write_tars(tmp_path / folder, [rows(range(1))])
    names = [shard.name for shard in source_shards(Data(path=f"{tmp_path}/{{one,two}}/*.tar"))]
    assert names == ["one/data-000000.tar", "two/data-000000.tar"]
    odd = tmp_path / "a{1,2}b*"
    write_tars(odd, [rows(range(2))])  # a folder's own name is no pattern
    assert [shard.name for shard in source_shards(Data(path=str(odd)))] == ["data-000000.tar"]
    (single,) = source_shards(Data(path=str(odd / "data-000000.tar")))
    assert single.name == "data-000000.tar" and len(list(single.records())) == 2


def test_what_is_a_stream(tmp_path: Path) -> None:
    write_tars(tmp_path / "tars", [rows(range(1))])
    write_parquet(tmp_path / "parquet" / "x.parquet", rows(range(1)))
    (tmp_path / "mixed").mkdir()
    for name, content in (("a.png", picture(1)), ("x.tar", b"")):
        (tmp_path / "mixed" / name).write_bytes(content)
    for path, kind, stream in (
        ("tars", "auto", True), ("tars/data-000000.tar", "auto", True), ("tars/*.tar", "auto", True),
        ("tars", "datasets", False), ("tars", "folder", False), ("parquet", "auto", False),
        ("parquet/x.parquet", "auto", False), ("parquet", "parquet", True), ("mixed", "auto", False),
        ("mixed", "webdataset", True), ("nowhere", "auto", False),
    ):  # fmt: skip
        assert is_stream(Data(path=str(tmp_path / path), kind=kind)) is stream, (path, kind)  # type: ignore[arg-type]
    assert is_stream(Data(path="s3://bucket/x.tar")) and is_stream(Data(path="org/name", streaming=True))
    assert not is_stream(Data(path="org/name")) and not is_stream(Data(path="asset:brand"))
    for path, streaming in (("s3://bucket/x.tar", False), ("org/name", True)):
        assert _pictures(Data(path=path, streaming=streaming)) is None  # `plan` does not count them
    with pytest.raises(UserError, match="is read as a stream"):
        open_records(Data(path=str(tmp_path / "tars")))


def test_check_reads_the_first_records(tmp_path: Path) -> None:
    some = rows(range(40))
    write_tars(tmp_path / "set", [some, some])
    config = shipped.config_path("configs/distill/tiny_lcm.yaml")
    given = [f"data.path={tmp_path}/set"]
    assert check(load(config, given))[2:4] == [
        f"data: {tmp_path}/set, 2 shards",
        "  note: only the first 16 records of data-000000.tar were read by this check.",
    ]
    some[3] = ("000003", b"\x89PNG\r\n\x1a\n broken", "x")
    write_tars(tmp_path / "set", [some])
    with pytest.raises(
        UserError, match=r"data-000000.tar/000003 \(unreadable image.*or set data.skip_bad=true"
    ):
        check(load(config, given))
    found = check(load(config, [*given, "data.skip_bad=true"]))
    assert found[3].endswith("were read by this check, of which 1 would be left out.")
    (tmp_path / "set" / "data-000000.tar").write_bytes(tar_bytes([]))
    with pytest.raises(UserError, match="data-000000.tar holds no record"):
        check(load(config, given))


def test_what_cannot_be_meant_is_a_sentence(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/faults/a.png", picture(1))
    memory.pipe("/two/a.tar", b"")
    memory.pipe("/two/a.parquet", b"")
    for path, words in {
        "memory://faults": "holds no file that ends in .tar, .tar.gz, .tgz, .parquet; pictures one by one",
        "memory://faults/*.tar": "no file has such a name; check the pattern",
        "memory://nowhere/x.tar": "there is no such file, folder or bucket; check the address",
        "memory://two": "what it is cannot be told from the names",
        "memory://faults/a.png": "what it is cannot be told from the names",
        "nothing://x/a.tar": "nothing:// is no kind of address that can be opened",
        "oci://bucket/x.tar": "the package that opens oci:// is not installed; install what it names",
        f"{tmp_path}/*.tar": "no file has such a name",
    }.items():
        with pytest.raises(UserError, match=words) as caught:
            source_shards(Data(path=path))
        assert path.partition("*")[0].rstrip("/") in str(caught.value)
    with pytest.raises(UserError, match="data.split 'test' has no effect on 'memory://two'"):
        source_shards(Data(path="memory://two", kind="webdataset", split="test"))
    late = source_shards(Data(path="memory://two/{a,b}.tar"))  # nothing is asked before it is read
    for ask in (late[1].identity, lambda: list(late[1].records())):
        with pytest.raises(UserError, match="memory://two/b.tar: there is no such file"):
            ask()


def test_secrets_in_an_address_are_not_said() -> None:
    assert urls.shown("https://me:word@host/x.tar?X-Amz-Signature=1#a") == "https://host/x.tar"
    assert urls.shown("s3://key:secret@bucket/x-{0..3}.tar") == "s3://bucket/x-{0..3}.tar"
    assert urls.shown("s3://bucket-[ab]/x?.tar") == "s3://bucket-[ab]/x?.tar"
    assert urls.shown("/a/b?c.tar") == "/a/b?c.tar"


def test_an_identity_follows_the_content(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(b"a" * 100)
    (shard,) = source_shards(Data(path=str(path)))
    first = shard.identity()
    assert first == shard.identity() and first.startswith("100-")
    path.write_bytes(b"b" * 101)
    assert shard.identity() != first
    assert (
        urls.identity({"size": 3, "ETag": '"abc"', "LastModified": "x"}) == "3-abc"
        and urls.identity({}) == ""
    )


# -- Connections that break ----------------------------------------------------------------------------------


class Flaky:
    """Connections to fsspec's memory that break after so many bytes, as often as `drops` says."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, every: int, drops: int, error: Exception | None
    ) -> None:
        self.every, self.left, self.error = every, drops, error
        self.opened, self.waited = 0, list[float]()
        memory = type(fsspec.filesystem("memory"))
        monkeypatch.setattr(memory, "_open", lambda fs, path, mode, **_: self.connection(fs.store[path]))
        monkeypatch.setattr(reading, "sleep", self.waited.append)

    def connection(self, stored: io.BytesIO) -> io.BytesIO:
        self.opened += 1
        flaky, first = self, stored.getvalue()

        class Connection(io.BytesIO):
            given = 0

            def read(self, size: int | None = -1) -> bytes:
                if flaky.left and self.given >= flaky.every:
                    flaky.left -= 1
                    if flaky.error is not None:
                        raise flaky.error
                    return b""
                found = super().read(size)
                self.given += len(found)
                return found

        return Connection(first)


@pytest.mark.parametrize("error", [ConnectionResetError("peer went away"), TimeoutError(), None])
def test_a_dropped_connection_goes_on_at_the_same_byte(
    monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    some = rows(range(40), side=16)
    fsspec.filesystem("memory").pipe("/flaky/x.tar", tar_bytes(pairs(some)))
    flaky = Flaky(monkeypatch, every=7000, drops=5, error=error)
    good, bad = read(source_shards(Data(path="memory://flaky/x.tar")))
    assert [(text, png) for _, text, png in good] == [(text, png) for _, png, text in some] and not bad
    assert flaky.left == 0 and flaky.opened == 6 and flaky.waited == [reading.WAITS[0]] * 5


def test_every_byte_that_arrives_begins_the_count_of_tries_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    content = tar_bytes(pairs(rows(range(40), side=16)))
    fsspec.filesystem("memory").pipe("/flaky/x.tar", content)
    monkeypatch.setattr(reading, "BLOCK", 4096)
    flaky = Flaky(monkeypatch, every=4096, drops=9, error=ConnectionResetError())
    with reading.Reader(urls.at("memory://flaky/x.tar")) as reader:
        assert reader.read() == content and reader.read(1) == b""
    assert flaky.waited == [reading.WAITS[0]] * 9


def test_a_connection_that_stays_away_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.filesystem("memory").pipe("/flaky/x.tar", tar_bytes(pairs(rows(range(40), side=16))))
    flaky = Flaky(monkeypatch, every=0, drops=1000, error=OSError("no route to host"))
    with pytest.raises(
        UserError, match=r"memory://flaky/x.tar: cannot be read on from byte 0 after 3 new tries \(no route"
    ):
        read(source_shards(Data(path="memory://flaky/x.tar")))
    assert flaky.waited == list(reading.WAITS) and flaky.opened == 4


def test_a_file_that_is_replaced_while_it_is_read_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its second half would follow the first half of another one."""
    memory = fsspec.filesystem("memory")
    memory.pipe("/flaky/x.tar", tar_bytes(pairs(rows(range(40), side=16))))
    memory.pipe("/flaky/other.tar", tar_bytes(pairs(rows(range(60, 120), side=16))))
    stream = source_shards(Data(path="memory://flaky/x.tar"))[0].records()
    Flaky(monkeypatch, every=7000, drops=1, error=ConnectionResetError())
    next(stream)
    memory.store["/flaky/x.tar"] = memory.store["/flaky/other.tar"]
    with pytest.raises(UserError, match="another file took its place while it was being read"):
        list(stream)


# -- Memory --------------------------------------------------------------------------------------------------


def _peak(path: str, kind: str) -> tuple[int, int]:
    """The most bytes that Python held while all records were read once, and the number of records."""
    count = 0
    tracemalloc.start()
    try:
        for shard in source_shards(Data(path=path, kind=kind)):  # type: ignore[arg-type]
            for item in shard.records():
                count += len(item.read()) > 0  # type: ignore[union-attr]
        return tracemalloc.get_traced_memory()[1], count
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_number_of_records(tmp_path: Path) -> None:
    """16 KiB a picture: 1 MB of them, then 10 MB, in one file and in ten."""
    some = rows(range(64), side=72)
    write_tars(tmp_path / "small", [some])
    write_tars(tmp_path / "many", [some] * 10)
    renamed = [(f"{n}-{key}", png, text) for n in range(10) for key, png, text in some]
    write_tars(tmp_path / "large", [renamed])
    _peak(f"{tmp_path}/small", "webdataset")  # imports
    small, many, large = (_peak(f"{tmp_path}/{name}", "webdataset") for name in ("small", "many", "large"))
    assert (small[1], many[1], large[1]) == (64, 640, 640)
    assert small[0] < 500_000 and many[0] < 1.2 * small[0] + 50_000
    assert large[0] < 1.2 * small[0] + 640 * 150  # a number for each key of one file


def test_files_that_a_pattern_spells_out_and_are_not_there_are_named_first(tmp_path: Path) -> None:
    write_tars(tmp_path, [rows([1]), rows([2])])
    with pytest.raises(
        UserError, match=r"2 of 4 files are not there: .*data-000002\.tar, .*data-000003\.tar"
    ):
        source_shards(Data(path=f"{tmp_path}/data-{{000000..000003}}.tar"))
