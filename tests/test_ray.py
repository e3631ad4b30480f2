"""Encoding on a Ray cluster of two nodes on this machine: the bytes of one process, mistakes as sentences."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import lcm_kit
from lcm_kit.bases import inspect_base
from lcm_kit.config.load import dump
from lcm_kit.data import ray_engine, shards
from lcm_kit.data.ray_engine import RayEngine, _tries
from lcm_kit.data.ray_tries import MOST
from lcm_kit.data.ray_worker import Job, Worker
from lcm_kit.data.streams import source_shards
from lcm_kit.errors import UserError
from tests.recipes.small import TEMPLATE, configure, environment
from tests.sources import pairs, rows, tar_bytes, write_tars
from tests.test_parts import files

ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")

pytestmark = pytest.mark.usefixtures("one_thread")  # as each worker has
EACH, STORE = 4, 80 * 2**20  # pictures a shard; bytes of a node's object store


def add_node(cluster: Any, **more: Any) -> Any:
    """A node of one CPU, as far from the others as one machine allows: processes of its own."""
    return cluster.add_node(num_cpus=1, num_gpus=0, object_store_memory=STORE, **more)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes."""
    from ray.cluster_utils import Cluster

    made = Cluster()
    with pytest.MonkeyPatch.context() as patch:
        for key, value in {**environment(1), "RAY_USAGE_STATS_ENABLED": "0"}.items():
            patch.setenv(key, value)
        try:
            for _ in range(2):
                add_node(made, include_dashboard=False)
            yield made
        finally:
            ray.shutdown()
            made.shutdown()


@pytest.fixture
def write(tmp_path: Path, sd_base: Callable[..., Path]) -> Callable[..., Path]:
    """`write(name, data)`: the file of a config for three tar files, whose cache is the folder `name`."""
    write_tars(tmp_path / "set", [rows(range(k * EACH, (k + 1) * EACH), 64) for k in range(3)])

    def build(name: str, data: dict[str, Any] | None = None) -> Path:
        where = {
            "path": str(tmp_path / "set/data-{000000..000002}.tar"), "cache": str(tmp_path / name),
            "resolution": 64, "batch_size": 2, "shard_size": 3, **(data or {}),
        }  # fmt: skip
        keys = {**TEMPLATE, "base": {"path": str(sd_base())}, "data": where}
        path = tmp_path / f"{name}.yaml"
        path.write_text(dump(configure(keys, tmp_path / "run")))
        return path

    return build


def command(*words: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "lcm_kit", *map(str, words)]
    return subprocess.run(line, env=environment(1), capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_two_nodes_write_the_bytes_of_one_process_and_go_on_at_the_shard(
    cluster: Any,
    write: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)  # the workers are elsewhere
    bad = [("a.png", b"no picture"), ("a.txt", b"text"), *pairs(rows(range(EACH, 2 * EACH), 64))]
    (tmp_path / "set/data-000001.tar").write_bytes(tar_bytes(bad))
    lcm_kit.encode(write("alone", {"cache": "alone", "skip_bad": True}))
    (done,) = lcm_kit.encode(
        write("ray", {"cache": "ray", "skip_bad": True}), engine="ray", address=cluster.address, verbose=True
    )
    assert (done.rows, done.encoded) == (3 * EACH, 3 * EACH)
    assert [id for id, _ in done.skipped] == ["data-000001.tar/a"]
    whole = files(tmp_path / "alone")
    assert len(whole) > 3 * 4 and files(tmp_path / "ray") == whole  # and nothing of the driver's stays there
    told = capsys.readouterr()
    assert "Ray workers: 2; shards that each node made: 2, 1" in told.out.splitlines()
    assert not ray.is_initialized()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "ray").rglob("*") if path.is_file()}

    second = sorted((tmp_path / "ray").glob("part-*"))[1]
    shutil.rmtree(second)
    again = command("encode", tmp_path / "ray.yaml", "--engine", "ray", "--address", cluster.address)
    assert again.returncode == 0, again.stderr
    assert "Ray workers: 1; shards that each node made: 1" in again.stdout.splitlines()
    assert f"{EACH} of {3 * EACH} images encoded in " in again.stdout
    assert f"; the other {2 * EACH} were there already" in again.stdout
    assert not [line for line in again.stderr.splitlines() if not line.startswith("encoding: ")]
    assert files(tmp_path / "ray") == whole
    kept = {path for path in before if second not in path.parents and path.name != "parts.json"}
    assert all(path.stat().st_mtime_ns == before[path] for path in kept)
    (third,) = lcm_kit.encode("ray.yaml", engine="ray", address="127.0.0.1:1")  # nobody has to be asked
    assert (third.rows, third.encoded) == (3 * EACH, 0)


@pytest.mark.slow
def test_a_mistake_that_a_worker_finds_is_the_sentence_of_one_process(
    cluster: Any, write: Callable[..., Path], tmp_path: Path
) -> None:
    bad = [("a.png", b"no picture"), ("a.txt", b"text"), *pairs(rows(range(EACH), 64))]
    (tmp_path / "set/data-000001.tar").write_bytes(tar_bytes(bad))
    with pytest.raises(UserError, match="^1 record of data-000001.tar") as alone:
        lcm_kit.encode(write("alone"))
    found = command("encode", write("ray"), "--engine", "ray", "--address", cluster.address, "--workers", 1)
    assert found.returncode == 2
    said = [line for line in found.stderr.splitlines() if not line.startswith("encoding: ")]
    assert said == f"error: {alone.value}".splitlines() and not list(tmp_path.glob("ray/.*"))


def test_a_cache_that_workers_do_not_see_is_not_written_elsewhere(
    cluster: Any, write: Callable[..., Path]
) -> None:
    """`memory://` is another place in every process, as a folder that is not shared is on every node."""
    config = write("none", {"cache": "memory://bucket/cache"})
    with pytest.raises(
        UserError, match=r"^Ray node \S+: data.cache memory://bucket/cache is not the driver's"
    ):
        lcm_kit.encode(config, engine="ray", address=cluster.address, workers=1)


def job(config: Any, mark: str = "mark", **changes: Any) -> Job:
    base = inspect_base(config.base.path)
    settings = {**shards.settings(base, config.data), **changes}
    return Job(dump(config), "/none", mark, settings)


def test_a_worker_refuses_what_the_driver_does_not_mean(write: Callable[..., Path], tmp_path: Path) -> None:
    config = lcm_kit.load_config(write("cache"))
    (source, *_) = source_shards(config.data)
    with pytest.raises(UserError, match=r"^Ray node \S+: data.cache \S+ is not the driver's there"):
        Worker(job(config))._make(source.name, "")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/mark").touch()
    with pytest.raises(
        UserError, match="it would make other parts than the driver looks for: the VAE of the base"
    ):
        Worker(job(config, vae="another"))._make(source.name, "")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["mark"]
    worker = Worker(job(config))
    with pytest.raises(UserError, match=r"^Ray node \S+: data-9.tar of data.path is not there"):
        worker._make("data-9.tar", "")
    with pytest.raises(UserError, match="data-000000.tar of data.path is another file there"):
        worker._make(source.name, f"{source.identity()}0")
    assert not list((tmp_path / "cache").glob("part-*"))
    worker._make(source.name, source.identity())
    assert len(list((tmp_path / "cache").glob("part-*/part.json"))) == 1
    gone = lcm_kit.load_config(
        write("gone", {"path": str(tmp_path / "none.tar"), "cache": str(tmp_path / "cache")})
    )
    with pytest.raises(UserError, match=r"^Ray node \S+: .*none.tar"):
        Worker(job(gone))._make("none.tar", "")


def test_a_node_without_the_kit_is_named(
    cluster: Any, write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bare/lcm_kit").mkdir(parents=True)
    (tmp_path / "bare/lcm_kit/__init__.py").write_text("raise ModuleNotFoundError('lcm_kit')")
    monkeypatch.chdir(tmp_path)  # Ray lets workers import what lies where the driver was started
    words = r"^Ray node \S+ has {}, and this is {}; install the same version"
    bare = add_node(cluster, env_vars={"PYTHONPATH": str(tmp_path / "bare")})
    try:
        with pytest.raises(UserError, match=words.format("no lcm-kit", lcm_kit.__version__)):
            lcm_kit.encode(write("x"), engine="ray", address=cluster.address)
    finally:
        cluster.remove_node(bare)
    monkeypatch.setattr(ray_engine, "__version__", "9.9")
    with pytest.raises(UserError, match=words.format(f"lcm-kit {lcm_kit.__version__}", "9.9")):
        lcm_kit.encode(write("x"), engine="ray", address=cluster.address)


def test_a_shard_that_kills_its_workers_is_given_up(
    cluster: Any, write: Callable[..., Path], tmp_path: Path
) -> None:
    config = lcm_kit.load_config(write("cache"))
    ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")
    try:
        worker = Worker(replace(job(config), tries=_tries(ray)))
        for _ in range(MOST):
            with pytest.raises(
                UserError, match="data.cache .* is not the driver's"
            ):  # as far as it gets here
                worker._make("data-000000.tar", "")
        with pytest.raises(UserError, match=f"the worker that encoded data-000000.tar died, {MOST} times"):
            worker._make("data-000000.tar", "")
        with pytest.raises(UserError, match="data.cache .* is not the driver's"):
            worker._make("data-000001.tar", "")
    finally:
        ray.shutdown()


@pytest.mark.slow
def test_a_node_that_dies_costs_its_shard_alone(write: Callable[..., Path], tmp_path: Path) -> None:
    from ray.cluster_utils import Cluster

    shards = [rows(range(k * 100, k * 100 + 100), 64) for k in range(8)]
    write_tars(tmp_path / "many", shards)
    data = {"path": str(tmp_path / "many/data-*.tar")}
    made = Cluster()
    try:
        nodes = [add_node(made, include_dashboard=False) for _ in range(2)]
        line = [sys.executable, "-m", "lcm_kit", "encode", str(write("ray", data)), "--engine", "ray"]
        running = subprocess.Popen([*line, "--address", made.address], env=environment(1))
        parts = tmp_path / "ray"
        while len(list(parts.glob("part-*/part.json"))) < 2 and running.poll() is None:
            time.sleep(0.02)
        made.remove_node(nodes[1], allow_graceful=False)
        assert len(list(parts.glob("part-*/part.json"))) < len(shards)  # it had something to lose
        assert running.wait(300) == 0
    finally:
        made.shutdown()
    lcm_kit.encode(write("alone", data))
    assert files(parts) == files(tmp_path / "alone")


def test_what_ray_has_no_part_in_is_refused(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        UserError,
        match=r"data.path '\S+folder' with data.source images has no shards for the workers of another",
    ):
        lcm_kit.encode(write("x", {"path": str(tmp_path / "folder")}), engine="ray")
    for name, value in {"address": "auto", "workers": 2, "gpus": 0.5}.items():
        with pytest.raises(UserError, match=f"{name} '?{value}'? is for engine ray"):
            lcm_kit.encode(write("x"), **{name: value})  # type: ignore[arg-type]
    with pytest.raises(UserError, match="engine 'spark' is unknown; give local or ray"):
        lcm_kit.encode(write("x"), engine="spark")  # type: ignore[arg-type]
    for given, words in (({"workers": 0}, "workers 0 is out"), ({"gpus": float("nan")}, "gpus nan is out")):
        with pytest.raises(UserError, match=words):
            RayEngine(**given)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="'ray://head:10001' is for Ray's client"):
        lcm_kit.encode(write("x"), engine="ray", address="ray://head:10001")
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        with pytest.raises(UserError, match="one process of several .WORLD_SIZE is 2."):
            RayEngine()
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(UserError, match=re.escape("pip install 'lcm-kit[ray]'")):
            RayEngine()


def test_a_cluster_that_is_not_there_is_named(
    write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray itself goes on trying for more than five minutes."""
    words = r"^Ray cluster 127.0.0.1:1 cannot be used \(.*refused.*--address, RAY_ADDRESS"
    with pytest.raises(UserError, match=words):
        lcm_kit.encode(write("x"), engine="ray", address="127.0.0.1:1")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(UserError, match=words):
        lcm_kit.encode(write("x"), engine="ray")
