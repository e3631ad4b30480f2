"""A folder of ours at an address: the same doors as here; and copies of its files within a bound."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path
from threading import Thread

import fsspec
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from lcm_kit.errors import UserError
from lcm_kit.io import copies, own_files
from lcm_kit.io.copies import Copies, default_root
from lcm_kit.io.remote import Folder

ROOT = Path(__file__).parents[1]


def _tensors(number: int, rows: int = 100) -> dict[str, Tensor]:
    return {"latents": torch.full((rows, 25), float(number)), "embeds": torch.arange(3.0)}


def _bytes(number: int, rows: int = 100) -> bytes:
    return own_files.tensor_bytes(_tensors(number, rows), f"content{number}")


def _first(path: Path) -> float:
    with safe_open(path, framework="pt") as file:
        return float(file.get_tensor("latents")[0, 0])


@pytest.fixture
def remote(tmp_path: Path, request: pytest.FixtureRequest) -> Folder:
    """A folder in fsspec's memory, another one for each test, with room for three and a half files."""
    folder = Folder.of(f"memory://{request.node.name}/cache", str(tmp_path / "copies"))
    assert folder.copies is not None
    return Folder(folder.place, Copies(folder.copies.root, int(3.5 * len(_bytes(0)))))


@pytest.mark.parametrize("kind", ["here", "remote"])
def test_both_kinds_of_folder_do_the_same(kind: str, tmp_path: Path, remote: Folder) -> None:
    folder = Folder.of(tmp_path / "folder") if kind == "here" else remote
    assert folder.is_remote is (kind == "remote")
    assert folder.sizes() == {} and folder.size("a.json") is None and folder.made_from("a") is None
    folder.write("b.json", '{"größe": 1}')
    folder.write("a.safetensors", _bytes(7))
    folder.below("teacher").write("c.json", b"{}")
    assert folder.sizes() == {"a.safetensors": len(_bytes(7)), "b.json": 14}
    assert folder.below("teacher").sizes() == {"c.json": 2}
    assert folder.read("b.json").decode() == '{"größe": 1}' and folder.read("b.json", 4) == b'{"gr'
    assert folder.read("b.json", 99) == folder.read("b.json") and folder.size("b.json") == 14
    assert folder.made_from("a.safetensors") == "content7" and folder.made_from("b.json") is None
    assert _first(folder.local("a.safetensors", "content7")) == 7
    assert folder.opened("a.safetensors", "content7", _first) == 7
    folder.write("b.json", b"{}")
    assert folder.read("b.json") == b"{}"
    folder.delete("b.json")
    folder.delete("b.json")
    assert list(folder.sizes()) == ["a.safetensors"]
    with pytest.raises(UserError, match=r"b.json: there is no such file"):
        folder.read("b.json")


def test_what_a_header_says_is_the_same_read_from_a_part(remote: Folder, tmp_path: Path) -> None:
    content = _bytes(3)
    (tmp_path / "x.safetensors").write_bytes(content)
    said = own_files.said_in_head(content[: own_files.header_length(content)])
    assert said is not None and said == ("content3", len(content))
    assert own_files.made_from(tmp_path / "x.safetensors") == said.made_from
    for cut in (b"", b"abc", content[:50], bytes(8), b"\xff" * 100, b"\x02" + bytes(7) + b"[]"):
        assert own_files.said_in_head(cut) is None
    remote.write("half.safetensors", content[:-1])  # as where a service does not put a file whole
    assert remote.made_from("half.safetensors") is None
    long = own_files.tensor_bytes({f"t{n:05d}": torch.zeros(1) for n in range(2000)}, "many")
    assert own_files.header_length(long) > 1 << 16
    remote.write("long.safetensors", long)
    assert remote.made_from("long.safetensors") == "many"


def test_the_least_recently_used_copies_make_room(remote: Folder) -> None:
    assert remote.copies is not None
    for number in range(5):
        remote.write(f"{number}.safetensors", _bytes(number))

    def there() -> list[str]:
        return sorted(path.name[0] for path in remote.copies.root.glob("*/*.safetensors"))  # type: ignore[union-attr]

    for number in (0, 1, 2):
        assert _first(remote.local(f"{number}.safetensors", f"content{number}")) == number
    assert there() == ["0", "1", "2"]
    remote.local("0.safetensors", "content0")  # used again: 1 is now the oldest
    mapped = remote.opened(
        "1.safetensors", "content1", lambda path: safe_open(path, "pt").get_tensor("latents")
    )
    remote.local("3.safetensors", "content3")
    assert there() == ["0", "1", "3"]
    remote.local("4.safetensors", "content4")
    assert there() == ["1", "3", "4"]
    remote.local("2.safetensors", "content2")
    assert there() == ["2", "3", "4"]
    assert mapped.unique().tolist() == [1.0]  # what is mapped stays
    taken = sum(path.stat().st_size for path in remote.copies.root.glob("*/*"))  # locks are empty
    assert taken == 3 * len(_bytes(0)) <= remote.copies.most


def test_what_is_coming_counts_as_a_whole(remote: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or two processes would each take the room that is left."""
    assert remote.copies is not None
    remote.write("x.safetensors", _bytes(1))
    taken: list[int] = []

    class Watching(copies.Reader):
        def read(self, size: int | None = -1) -> bytes:
            assert remote.copies is not None
            taken.append(sum(bytes_ for _, bytes_, _ in remote.copies._files()))
            return super().read(size)

    monkeypatch.setattr(copies, "Reader", Watching)
    remote.local("x.safetensors", "content1")
    assert set(taken) == {len(_bytes(1))}


def test_a_copy_is_fetched_once_and_again_where_it_is_not_what_is_wanted(
    remote: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[str] = []
    real = Copies._fetch
    monkeypatch.setattr(
        Copies,
        "_fetch",
        lambda self, source, target: fetched.append(target.name) or real(self, source, target),
    )
    remote.write("x.safetensors", _bytes(1))
    path = remote.local("x.safetensors", "content1")
    assert remote.local("x.safetensors", "content1") == path and fetched == ["x.safetensors"]
    broken = bytearray(path.read_bytes())
    broken[-1] ^= 1
    path.write_bytes(broken)
    assert _first(remote.local("x.safetensors", "content1")) == 1 and len(fetched) == 2
    remote.write("x.safetensors", _bytes(2))  # encoded anew
    assert _first(remote.local("x.safetensors", "content2")) == 2 and len(fetched) == 3
    path.unlink()
    assert remote.opened("x.safetensors", "content2", _first) == 2 and len(fetched) == 4


def test_what_cannot_be_copied_is_a_sentence(remote: Folder) -> None:
    assert remote.copies is not None
    with pytest.raises(UserError, match=r"memory://.*/gone.safetensors: there is no such file"):
        remote.local("gone.safetensors", "content1")
    remote.write("large.safetensors", _bytes(1, rows=1000))
    with pytest.raises(
        UserError, match=r"large.safetensors has .* GB, more than .*raise data.local_cache_gb"
    ):
        remote.local("large.safetensors", "content1")
    broken = bytearray(_bytes(1))
    broken[-1] ^= 1
    remote.write("broken.safetensors", bytes(broken))
    remote.write("other.safetensors", _bytes(2))
    for name in ("broken", "other"):
        with pytest.raises(UserError, match=f"{name}.safetensors is not what was written there"):
            remote.local(f"{name}.safetensors", "content1")
    assert not list(
        remote.copies.root.glob("*/*safetensors*")
    )  # nothing of these is left, not half of one either
    remote.write("x.safetensors", _bytes(1))

    def always_gone(path: Path) -> float:
        path.unlink()
        return _first(path)

    with pytest.raises(UserError, match="no room for its copy in .*, since processes of this machine"):
        remote.opened("x.safetensors", "content1", always_gone)


def test_copies_lie_below_the_users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LCM_KIT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_root() == Path("/somewhere/lcm-kit/shards")
    folder = Folder.of("s3://bucket/cache/", None, 0.5)
    assert folder.copies == Copies(default_root(), 500_000_000) and folder.place == "s3://bucket/cache"
    assert Folder.of("file:///a/b") == Folder.of("/a/b")


_WORKER = """
import json, sys
from pathlib import Path
import fsspec
from fsspec.implementations.local import LocalFileSystem
from lcm_kit.io.copies import Copies
from lcm_kit.io.remote import Folder

class Shared(LocalFileSystem):
    protocol = "shared"
    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix("shared://"))

fsspec.register_implementation("shared", Shared)
from tests.test_remote import _first
fetched, most_seen, real = 0, 0, Copies._fetch

def fetch(self, source, target):
    global fetched
    fetched += 1
    return real(self, source, target)

Copies._fetch = fetch
root, place, most, order = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4])
folder = Folder("shared://" + place, Copies(root, most))
found = []
for number in order:
    found.append(folder.opened(f"{number}.safetensors", f"content{number}", _first))
    taken = 0
    for path in root.glob("*/*"):
        try:
            taken += path.stat().st_size
        except FileNotFoundError:
            pass
    most_seen = max(most_seen, taken)
print(json.dumps({"found": found, "fetched": fetched, "most": most_seen}))
"""


def test_processes_share_copies_and_their_bound(tmp_path: Path) -> None:
    """Three at a time, first with room for all, which are fetched once; then with room for two."""
    size = len(_bytes(0))
    source = Folder.of(tmp_path / "remote")
    for number in range(5):
        source.write(f"{number}.safetensors", _bytes(number))
    orders = [[0, 1, 2, 3, 4, 0], [4, 3, 2, 1, 0, 4], [2, 0, 4, 1, 3, 2]]
    for name, most, fetches in (("wide", 100 * size, range(5, 6)), ("narrow", 2 * size, range(9, 91))):
        workers = [
            subprocess.Popen(
                [sys.executable, "-c", _WORKER, tmp_path / name, source.place, str(most), json.dumps(order)],
                stdout=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            for order in orders
        ]  # fmt: skip
        said = [json.loads(worker.communicate()[0]) for worker in workers]
        assert [each["found"] for each in said] == orders, name
        assert max(each["most"] for each in said) <= most
        assert sum(each["fetched"] for each in said) in fetches, name


def test_half_written_copies_of_a_killed_process_are_removed(remote: Folder) -> None:
    assert remote.copies is not None
    remote.write("x.safetensors", _bytes(1))
    path = remote.local("x.safetensors", "content1")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    from lcm_kit.io.files import machine

    left = path.parent / f".y.safetensors.{machine()}-{dead.pid}.tmp"
    left.write_bytes(bytes(remote.copies.most))  # it takes all the room there is
    remote.write("y.safetensors", _bytes(2))
    remote.local("y.safetensors", "content2")
    assert not left.exists()


def test_a_service_that_refuses_is_a_sentence(monkeypatch: pytest.MonkeyPatch, remote: Folder) -> None:
    memory = type(fsspec.filesystem("memory"))

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("Access Denied")

    monkeypatch.setattr(memory, "pipe_file", refuse)
    with pytest.raises(
        UserError, match=r"x.json: cannot be written with the credentials that are here \(Access Denied\)"
    ):
        remote.write("x.json", b"{}")


def test_a_server_that_knows_no_parts_gives_the_first_bytes(tmp_path: Path) -> None:
    """It answers with the whole file, which fsspec 2026.9.0 hands on in silence
    (findings/fsspec_http_part_may_be_all.sh)."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    (tmp_path / "served").mkdir()
    (tmp_path / "served/a.safetensors").write_bytes(_bytes(5))
    with HTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path / "served"))) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            folder = Folder.of(f"http://127.0.0.1:{server.server_port}", str(tmp_path / "copies"))
            assert folder.read("a.safetensors", 4) == _bytes(5)[:4]
            assert folder.made_from("a.safetensors") == "content5"
            assert folder.opened("a.safetensors", "content5", _first) == 5
        finally:
            server.shutdown()
            thread.join()
