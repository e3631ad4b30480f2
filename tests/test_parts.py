"""Caches of streams: the same bytes from one process, two and a resumed run; rows as those of a folder."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from lcm_kit.bases import inspect_base
from lcm_kit.config.load import dump
from lcm_kit.data import parts, sources, stream_images, vae_precision
from lcm_kit.data.batches import Batches
from lcm_kit.data.cache import Cache
from lcm_kit.data.order import Run
from lcm_kit.data.parted import AllBut, PartedCache
from lcm_kit.data.split import split
from lcm_kit.errors import UserError
from lcm_kit.share import Share
from tests.agents import Accelerated, Agents, agents
from tests.recipes.small import TEMPLATE, configure, contents, interrupted
from train import distill

SIZES = [(64, 64), (128, 32), (70, 64), (40, 120)]
SHARDS, EACH = 3, 6


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tar files of six pictures of several shapes, one of them masked; and the same in `folder`."""
    root, g = tmp_path_factory.mktemp("source"), torch.Generator().manual_seed(1)
    (root / "folder").mkdir()
    for shard in range(SHARDS):
        with tarfile.open(root / f"set-{shard:03d}.tar", "w") as tar:
            for k in range(EACH):
                name, size = f"{shard}{k}", SIZES[(shard + k) % len(SIZES)]
                pixels = torch.randint(256, (8, 8, 3), generator=g, dtype=torch.uint8).numpy()
                files = {"png": png(Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST))}
                files["txt"] = f"picture {name}".encode()
                if k == 1:
                    mask = Image.new("L", size, 255)
                    mask.paste(0, (0, 0, size[0] // 2, size[1]))
                    files["mask.png"] = png(mask)
                for ending, content in files.items():
                    (root / "folder" / f"{name}.{ending}").write_bytes(content)
                    info = tarfile.TarInfo(f"{name}.{ending}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return root


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def config(source: Path, tmp_path: Path, sd_base: Callable[..., Path]) -> Callable[..., Any]:
    """`config(**data)`: of the tar files, with a small base, batches of 2 and files of 4 rows."""

    def build(output: str = "run", data: dict[str, Any] | None = None, **changes: Any) -> Any:
        where = {
            "path": str(source / "set-{000..002}.tar"), "cache": str(tmp_path / "cache"), "resolution": 64,
            "shapes": {"multiple": 16}, "batch_size": 2, "shard_size": 4, **(data or {}),
        }  # fmt: skip
        keys = {**TEMPLATE, "base": {"path": str(sd_base())}, "data": where}
        return configure(keys, tmp_path / output, **changes)

    return build


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "parts.json" and not path.name.endswith(".lock")
    }


def opened(config: Any) -> PartedCache:
    found = sources.open_images(config.data, inspect_base(config.base.path))
    assert isinstance(found, PartedCache)
    return found


def test_one_process_two_and_a_resumed_run_write_the_same_bytes(
    config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = config(data={"cache": str(tmp_path / "one")})
    report = sources.encode(one, progress=False)[0]
    assert (report.rows, report.encoded, report.skipped) == (SHARDS * EACH, SHARDS * EACH, [])

    two = config(data={"cache": str(tmp_path / "two")})
    sources_, settings = stream_images.source_shards(two.data), Share(1, 2)
    stream_images.make_parts(two, "float32", settings.of(sources_), lambda: None)  # the second of two
    assert len(list((tmp_path / "two").glob("part-*"))) == 1
    stream_images.make_parts(two, "float32", Share(0, 2).of(sources_), lambda: None)
    stream_images.encode(two, progress=False)

    resumed = config(data={"cache": str(tmp_path / "resumed")})
    real, calls = parts.PartMaker.make, []

    def stop(self: Any, source: Any) -> Any:
        calls.append(source.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, source)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(parts.PartMaker, "make", stop)
        sources.encode(resumed, progress=False)
    with pytest.raises(UserError, match="no finished cache in .*resumed"):
        opened(resumed)
    again = sources.encode(resumed, progress=False)[0]
    assert again.encoded == (SHARDS - 1) * EACH and again.rows == SHARDS * EACH
    whole = files(tmp_path / "one")
    assert len(whole) > 3 * SHARDS and files(tmp_path / "two") == whole == files(tmp_path / "resumed")


ENCODE = """
import os, sys
from pathlib import Path
import torch
from lcm_kit.config.load import load
from lcm_kit.data import parts, sources
from lcm_kit.training import processes

share = processes.share()
assert torch.distributed.get_world_size() == share.world == 2 and os.environ["GROUP_WORLD_SIZE"] == "2"
make, made = parts.PartMaker.make, []
def look(self, shard):
    made.append(shard.name)
    return make(self, shard)
parts.PartMaker.make = look
sources.encode(load(Path(sys.argv[1])), progress=False, share=share)
Path(sys.argv[2], f"made-{share.rank}").write_text(" ".join(made))
"""


@pytest.mark.parametrize("kind", [Agents, pytest.param(Accelerated, marks=pytest.mark.slow)])
def test_two_machines_encode_the_bytes_of_one(
    config: Any, tmp_path: Path, one_thread: None, kind: type[Agents]
) -> None:
    there = tmp_path / "two"
    two = config(data={"cache": str(there)})
    (tmp_path / "encode.py").write_text(ENCODE)
    (tmp_path / "encode.yaml").write_text(dump(two))
    program = [tmp_path / "encode.py", tmp_path / "encode.yaml", tmp_path]
    with agents(tmp_path, program, kind) as both:
        both.run()
    made = [(tmp_path / f"made-{rank}").read_text().split() for rank in (0, 1)]
    assert made == [["set-000.tar", "set-002.tar"], ["set-001.tar"]] and len(sum(made, [])) == SHARDS
    sources.encode(config(data={"cache": str(tmp_path / "one")}), progress=False)
    assert files(there) == files(tmp_path / "one") and (there / "parts.json").is_file()
    assert list(opened(two).ids) == list(opened(config(data={"cache": str(tmp_path / "one")})).ids)


def test_the_first_picture_alone_says_what_all_parts_are_encoded_in(
    config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: where float32 is settled nothing is written that would say so to who asks again."""
    answers = [torch.float32, torch.float16]
    monkeypatch.setattr(vae_precision, "half_dtypes", lambda device, overflows: (torch.float16,))
    monkeypatch.setattr(vae_precision.ProvenVae, "prove", lambda self, pixels: answers.pop(0))
    assert sources.encode(config(), progress=False)[0].encoded == SHARDS * EACH
    assert answers == [torch.float16] and not (tmp_path / "cache/vae.json").exists()
    assert len(opened(config())) == SHARDS * EACH


def test_a_second_run_does_nothing_and_a_changed_shard_is_made_anew(
    config: Any, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    copy = Path(shutil.copytree(source, tmp_path / "copy"))
    mine = config(data={"path": str(copy / "set-{000..002}.tar")})
    sources.encode(mine, progress=False)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    assert sources.encode(mine, progress=False)[0].encoded == 0
    assert before == {path: path.stat().st_mtime_ns for path in before}
    shutil.copy(copy / "set-000.tar", copy / "set-001.tar")
    assert sources.encode(mine, progress=False)[0].encoded == EACH
    assert [id.partition("/")[2] for id in opened(mine).ids].count("00") == 2


def test_rows_are_those_of_the_same_pictures_in_a_folder(config: Any, source: Path, tmp_path: Path) -> None:
    sources.encode(config(), progress=False)
    plain = config(data={"path": str(source / "folder"), "cache": str(tmp_path / "plain")})
    sources.encode(plain, progress=False)
    cache, folder = opened(config()), sources.open_images(plain.data, inspect_base(plain.base.path))
    assert isinstance(folder, Cache) and len(cache) == len(folder) == SHARDS * EACH
    place = {id.removesuffix(".png"): row for row, id in enumerate(folder.ids)}
    for row, id in enumerate(cache.ids):
        same = place[id.rpartition("/")[2]]
        torch.testing.assert_close(cache.latents(row), folder.latents(same), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(cache.condition(row).embeds, folder.condition(same).embeds)
        ours, theirs = cache.weights(row), folder.weights(same)
        assert (ours is None) == (theirs is None) == (id[-1] != "1")
        assert ours is None or torch.equal(ours, theirs)
    assert sorted(cache.captions) == sorted(folder.captions) and cache.caption(3) == cache.captions[3]
    # rows of several parts at once, in the order that was asked for
    index = [row for row in range(len(cache)) if cache.latents(row).shape[2:] == (16, 16)][::-1]
    each = torch.cat([cache.latents(row) for row in index])
    assert len(index) > 6 and torch.equal(cache.latents(index), each)
    assert torch.equal(cache.condition(index).embeds, torch.cat([cache.condition(r).embeds for r in index]))
    torch.testing.assert_close(cache.empty(2).embeds, folder.empty(2).embeds)


def test_training_stops_and_goes_on_in_the_middle_of_an_epoch(
    config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    sources.encode(config(), progress=False)
    settings = {
        "steps": 7,
        "validation": {"held_out": 0.2, "every": 100, "prompts": None},
        "checkpoint": {"every": 3},
    }
    straight = distill.main(config("straight", **settings))
    stopped = config("stopped", **settings)
    interrupted(stopped, monkeypatch)
    distill.main(stopped)
    ours, theirs = contents(straight), contents(tmp_path / "stopped")
    weights = [name for name in ours if name.endswith("lora.safetensors")]
    assert weights and all(ours[name] == theirs[name] for name in weights)


def test_an_address_holds_the_same_bytes_and_is_read_through_a_bounded_copy(
    config: Any, tmp_path: Path
) -> None:
    import fsspec

    sources.encode(config(), progress=False)
    data = {"cache": "memory://bucket/cache", "local_cache": str(tmp_path / "copies")}
    there = config(data=data)
    sources.encode(there, progress=False)
    memory = fsspec.filesystem("memory")
    found = {path.removeprefix("/bucket/cache/"): memory.cat(path) for path in memory.find("/bucket/cache")}
    found.pop("parts.json")
    assert found == files(tmp_path / "cache")
    here, cache = opened(config()), opened(there)
    batches = [Batches(each, 2, 0) for each in (here, cache)]
    for step in range(12):
        a, b = (each.at(step) for each in batches)
        assert list(a.ids) == list(b.ids) and torch.equal(a.latents, b.latents)
    assert any((tmp_path / "copies").rglob("*.safetensors"))
    assert sources.encode(there, progress=False)[0].encoded == 0


def test_an_address_for_a_folder_of_images_is_refused(config: Any, source: Path) -> None:
    plain = config(data={"path": str(source / "folder"), "cache": "memory://bucket/other"})
    with pytest.raises(
        UserError, match="data.cache 'memory://bucket/other' is an address, which is for streams"
    ):
        sources.encode(plain, progress=False)


def test_bad_records_are_named_with_their_shard_or_left_out(
    config: Any, source: Path, tmp_path: Path
) -> None:
    with tarfile.open(tmp_path / "bad.tar", "w") as tar:
        for name, content in {
            "a.png": b"no picture",
            "a.txt": b"text",
            "b.txt": b"alone",
            "c.png": png(Image.new("RGB", (64, 64))),
            "c.txt": b"fine",
        }.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    mine = config(data={"path": str(tmp_path / "bad.tar")})
    with pytest.raises(UserError) as caught:
        sources.encode(mine, progress=False)
    assert "2 records of bad.tar of" in str(caught.value) and "bad.tar/a: unreadable image" in str(
        caught.value
    )
    report = sources.encode(
        config(data={"path": str(tmp_path / "bad.tar"), "skip_bad": True}), progress=False
    )[0]
    assert report.rows == 1 and [id for id, _ in report.skipped] == ["bad.tar/b", "bad.tar/a"]


def test_what_needs_all_pictures_is_refused(config: Any) -> None:
    with pytest.raises(UserError, match="data.regularization is not for a stream"):
        sources.encode(config(data={"regularization": "asset:general"}), progress=False)


@pytest.mark.parametrize("without", [(), (0,), (3, 4, 9), (9,), tuple(range(9))])
def test_all_but_some(without: tuple[int, ...]) -> None:
    rows = AllBut(10, without)
    wanted = [row for row in range(10) if row not in without]
    assert list(rows) == wanted == rows[:] and len(rows) == len(wanted)
    with pytest.raises(IndexError):
        rows[len(wanted)]


def test_pictures_are_held_out_of_the_first_part(config: Any) -> None:
    sources.encode(config(), progress=False)
    cache = opened(config())
    trained, held = split(cache, 0.34, seed=3)
    assert len(held) == 2 and set(held.rows) < set(cache.first) and len(trained) == SHARDS * EACH - 2
    assert {*trained.rows} | {*held.rows} == set(range(len(cache)))
    assert list(trained.ids) == [cache.ids[row] for row in trained.rows]
    shapes = [run.shape for run in trained.runs for _ in range(run.rows)]
    of_cache = [run.shape for run in cache.runs for _ in range(run.rows)]
    assert shapes == [of_cache[row] for row in trained.rows]
    assert sum(Run(*run).rows for run in trained.runs) == len(trained)
    kept = [Batches(trained, 2, 0).at(step).ids for step in range(9)]
    assert not {id for ids in kept for id in ids} & set(held.ids)


def test_a_damaged_part_is_made_anew_and_a_damaged_shard_refused(config: Any, tmp_path: Path) -> None:
    sources.encode(config(), progress=False)
    whole = files(tmp_path / "cache")
    first = sorted((tmp_path / "cache").glob("part-*"))[0]
    (first / "part.json").write_text("{}")
    assert sources.encode(config(), progress=False)[0].encoded == EACH
    assert files(tmp_path / "cache") == whole
    assert load_file(first / "shard-00000.safetensors")["latents"].ndim == 4
