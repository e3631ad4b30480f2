"""Streams and remote folders against a real S3 server on this machine, moto's, whose connections break."""

from __future__ import annotations

import contextlib
import http.server
import re
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lcm_kit.config.schema import Data
from lcm_kit.data import sources
from lcm_kit.data.streams import source_shards
from lcm_kit.errors import UserError
from lcm_kit.io import own_files, reading
from lcm_kit.io.copies import Copies
from lcm_kit.io.remote import Folder
from tests.recipes.small import TEMPLATE, configure
from tests.sources import pairs, read, rows, tar_bytes, write_parquet, write_tars
from tests.test_remote import _bytes, _first
from train import distill

s3fs = pytest.importorskip("s3fs", reason="the extra `s3` is not installed")
pytest.importorskip("moto.server", reason="moto's S3 server is not installed")


class Proxy:
    """Passes connections on to a server, and cuts them off after so many bytes, so many times."""

    def __init__(self, port: int) -> None:
        self.cut_after, self.cuts, self.cut, self.away = 0, 0, 0, False
        self.waited: list[float] = []  # by the kit's reader
        self._server, self._open = port, set[socket.socket]()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client = self._listener.accept()[0]
                if self.away:
                    client.close()
                    continue
                upstream = socket.create_connection(("127.0.0.1", self._server))
                self._open |= {client, upstream}
                threading.Thread(target=self._pump, args=(client, upstream, False), daemon=True).start()
                threading.Thread(target=self._pump, args=(upstream, client, True), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, answers: bool) -> None:
        with contextlib.suppress(OSError):
            given = 0
            while part := source.recv(1 << 14):
                target.sendall(part)
                given += len(part)
                if answers and self.away or self.cuts and answers and given >= self.cut_after:
                    self.cuts, self.cut = max(0, self.cuts - 1), self.cut + 1
                    break
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def go_away(self) -> None:
        """Cut all connections, and take no more."""
        self.away = True
        for each in self._open:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.go_away()
        self._listener.close()


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """That of an S3 server for the tests of this file; another process, so that its memory is not ours."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        number = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(number)]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", number)):
                break
            assert running.poll() is None
            time.sleep(0.1)
        yield number
    finally:
        running.kill()
        running.wait()


@pytest.fixture
def bucket(port: int, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Proxy]:
    """The bucket `lcm`, empty, reached through a proxy by nothing but the usual environment."""
    proxy = Proxy(port)
    for key, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}", "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1", "AWS_MAX_ATTEMPTS": "1",
        "AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": "/none",
        "AWS_SHARED_CREDENTIALS_FILE": "/none",
    }.items():  # fmt: skip
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(reading, "sleep", proxy.waited.append)
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 2)  # it waits up to a second for each of its five
    s3fs.S3FileSystem.clear_instance_cache()
    fs = s3fs.S3FileSystem()
    if fs.exists("lcm"):
        fs.rm("lcm", recursive=True)
    fs.mkdir("lcm")
    yield proxy
    proxy.close()
    s3fs.S3FileSystem.clear_instance_cache()


def _upload(folder: Path, to: str) -> None:
    s3fs.S3FileSystem().put(f"{folder}/", f"{to}/", recursive=True)


def test_a_bucket_gives_the_records_of_the_folder_bit_for_bit(bucket: Proxy, tmp_path: Path) -> None:
    write_tars(tmp_path / "set", [rows(range(0, 7)), rows(range(7, 9)), rows(range(9, 20))])
    write_parquet(tmp_path / "set" / "more" / "p.parquet", rows(range(30, 43)))
    _upload(tmp_path / "set", "lcm/set")
    here = read(source_shards(Data(path=f"{tmp_path}/set/*.tar")))
    assert len(here[0]) == 20 and not here[1]
    for path in ("s3://lcm/set", "s3://lcm/set/*.tar", "s3://lcm/set/data-{000000..000002}.tar"):
        assert read(source_shards(Data(path=path))) == here, path
    table = read(source_shards(Data(path=f"{tmp_path}/set/more", kind="parquet")))
    assert read(source_shards(Data(path="s3://lcm/set/more/p.parquet"))) == table and len(table[0]) == 13
    first, second = source_shards(Data(path="s3://lcm/set/data-{000000..000001}.tar"))
    mark = first.identity()
    assert mark == first.identity() != second.identity()
    _upload(tmp_path / "set", "lcm/set")  # the same again, at another time
    assert first.identity() == mark
    s3fs.S3FileSystem().pipe("lcm/set/data-000000.tar", tar_bytes(pairs(rows(range(6)))))
    assert first.identity() != mark


def test_connections_that_break_cost_nothing_but_time(bucket: Proxy, tmp_path: Path) -> None:
    """s3fs tries twice by itself; what it gives up on, the kit's reader takes up."""
    write_tars(tmp_path / "set", [rows(range(300), side=32)])
    write_parquet(tmp_path / "p" / "p.parquet", rows(range(300), side=32), group=40)
    _upload(tmp_path / "set", "lcm/set")
    _upload(tmp_path / "p", "lcm/p")
    for path, local, kind in (
        ("s3://lcm/set/*.tar", f"{tmp_path}/set", "webdataset"),
        ("s3://lcm/p/*.parquet", f"{tmp_path}/p", "parquet"),
    ):
        wanted = read(source_shards(Data(path=local, kind=kind)))  # type: ignore[arg-type]
        bucket.cut_after, bucket.cuts, bucket.cut = 20_000, 7, 0
        bucket.waited.clear()
        assert read(source_shards(Data(path=path))) == wanted and len(wanted[0]) == 300
        assert bucket.cut == 7 and bucket.waited == list(reading.WAITS)


def test_a_server_that_goes_away_within_a_shard_is_a_sentence(
    bucket: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "BLOCK", 1 << 16)
    write_tars(tmp_path / "set", [rows(range(300), side=32)])
    _upload(tmp_path / "set", "lcm/set")
    stream = source_shards(Data(path="s3://lcm/set/data-000000.tar"))[0].records()
    assert [next(stream).id for _ in range(2)][1] == "data-000000.tar/000001"  # type: ignore[union-attr]
    bucket.go_away()
    with pytest.raises(
        UserError,
        match=r"s3://lcm/set/data-000000.tar: cannot be read on from byte [0-9,]+ after 3 new tries",
    ):
        list(stream)


@pytest.mark.parametrize("parts", [True, False], ids=["parts", "whole"])
def test_a_web_server_with_and_without_parts_of_files(tmp_path: Path, parts: bool) -> None:
    """Python's own gives files from begin to end alone; a step back begins anew."""
    write_tars(tmp_path / "set", [rows(range(30)), rows(range(30, 50))])
    write_parquet(tmp_path / "set" / "p.parquet", rows(range(60, 90)))
    serving = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(_Parts if parts else _Quiet, directory=str(tmp_path / "set"))
    )
    threading.Thread(target=serving.serve_forever, daemon=True).start()
    try:
        place = f"http://127.0.0.1:{serving.server_address[1]}"
        wanted = read(source_shards(Data(path=f"{tmp_path}/set/*.tar")))
        assert read(source_shards(Data(path=f"{place}/data-{{000000..000001}}.tar"))) == wanted
        wanted = read(source_shards(Data(path=f"{tmp_path}/set/p.parquet", kind="parquet")))
        assert read(source_shards(Data(path=f"{place}/p.parquet?signature=secret"))) == wanted
        with pytest.raises(UserError, match=f"{place}/none.tar: there is no such file"):
            source_shards(Data(path=f"{place}/none.tar"))
    finally:
        serving.shutdown()
        serving.server_close()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


class _Parts(_Quiet):
    """Answers a request for a range with that range."""

    def do_GET(self) -> None:
        content = Path(self.translate_path(self.path)).read_bytes()
        asked = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            return super().do_GET()
        part = content[int(asked[1]) : int(asked[2]) + 1 if asked[2] else None]
        self.send_response(206)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Content-Range", f"bytes {asked[1]}-{int(asked[1]) + len(part) - 1}/{len(content)}")
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        self.wfile.write(part)


def test_memory_is_that_of_a_shard_however_many_there_are(bucket: Proxy, tmp_path: Path) -> None:
    some = rows(range(64), side=72)
    write_tars(tmp_path / "set", [some] * 10)
    _upload(tmp_path / "set", "lcm/set")

    def peak(path: str) -> tuple[int, int]:
        tracemalloc.start()
        try:
            count = sum(
                len(item.read()) > 0 for shard in source_shards(Data(path=path)) for item in shard.records()
            )  # type: ignore[union-attr]
            return tracemalloc.get_traced_memory()[1], count
        finally:
            tracemalloc.stop()

    one = "s3://lcm/set/data-00000{0..0}.tar"
    peak(one)  # imports, the connection
    few, many = peak(one), peak("s3://lcm/set/data-00000{0..9}.tar")
    assert (few[1], many[1]) == (64, 640)
    size = (tmp_path / "set" / "data-000000.tar").stat().st_size
    assert size > 1_000_000 and many[0] < 1.2 * few[0] + 200_000 and many[0] < 6 * size


def test_what_a_service_refuses_says_what_to_do(bucket: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in ("s3://nobody-has-this/x.tar", "s3://lcm/x.tar", "s3://nobody-has-this/set/"):
        with pytest.raises(UserError, match=f"{path}: there is no such file, folder or bucket; check"):
            source_shards(Data(path=path))
    with pytest.raises(UserError, match="s3://lcm/.*.tar: no file has such a name"):
        source_shards(Data(path="s3://lcm/*.tar"))
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(key)
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(
        UserError, match="s3://lcm/x.tar: cannot be read with the credentials that are here .*AWS_PROFILE"
    ):
        source_shards(Data(path="s3://lcm/x.tar"))


def test_a_folder_of_ours_in_a_bucket(bucket: Proxy, tmp_path: Path) -> None:
    folder = Folder.of("s3://lcm/cache/", str(tmp_path / "copies"))
    assert folder.sizes() == {} and folder.size("manifest.json") is None
    folder.write("manifest.json", own_files.json_text({"rows": 3}))
    for number in range(3):
        folder.write(f"shard-{number:05d}.safetensors", _bytes(number))
    folder.below("teacher").write("x.json", "{}")
    assert list(folder.sizes()) == ["manifest.json", *(f"shard-{n:05d}.safetensors" for n in range(3))]
    assert folder.made_from("shard-00002.safetensors") == "content2" and folder.made_from("none") is None
    text = folder.read("manifest.json")
    assert own_files.parse_json(folder.shown, text, dict, "make it anew") == {"rows": 3}
    assert folder.read("manifest.json", 4) == text[:4]
    assert folder.opened("shard-00001.safetensors", "content1", _first) == 1
    assert folder.copies == Copies(tmp_path / "copies", 50_000_000_000)
    folder.delete("shard-00001.safetensors")
    assert "shard-00001.safetensors" not in folder.sizes()
    assert folder.opened("shard-00001.safetensors", "content1", _first) == 1  # the copy is what was asked for
    with pytest.raises(UserError, match="s3://lcm/cache/gone.safetensors: there is no such file"):
        folder.local("gone.safetensors", "content9")
    with pytest.raises(
        UserError, match="s3://nobody-has-this/cache/a.json: (there is no such|cannot be written)"
    ):
        Folder.of("s3://nobody-has-this/cache").write("a.json", "{}")


def test_encoded_from_a_bucket_into_a_bucket_and_trained_from_there(
    bucket: Proxy, tmp_path: Path, sd_base: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The adapter is that of the same tar files and a cache on the disk, to the bit."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    write_tars(tmp_path / "set", [rows(range(0, 3), 64), rows(range(3, 6), 64)])
    _upload(tmp_path / "set", "lcm/set")
    copies = str(tmp_path / "copies")
    there = {"path": "s3://lcm/set/*.tar", "cache": "s3://lcm/cache", "local_cache": copies}
    places = {"disk": {"path": f"{tmp_path}/set/*.tar", "cache": str(tmp_path / "cache")}, "bucket": there}
    found = {}
    for name, data in places.items():
        keys = {
            **TEMPLATE,
            "base": {"path": str(sd_base())},
            "data": {"resolution": 64, "shard_size": 2, **data},
        }
        config = configure(keys, tmp_path / name, steps=3)
        sources.encode(config, progress=False)
        found[name] = load_file(distill.main(config) / "adapter/lora.safetensors")
    assert all(torch.equal(found["disk"][key], found["bucket"][key]) for key in found["disk"])
    assert sorted(path.name for path in tmp_path.rglob("copies/**/*.safetensors"))
    assert s3fs.S3FileSystem().exists("lcm/cache/parts.json")
