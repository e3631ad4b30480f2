"""Rows of a cache come from mapped shards in one gather each, and are those that were written, in order."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lcm_kit.bases.condition import Condition
from lcm_kit.data import cache as module
from lcm_kit.data import shards
from lcm_kit.data.cache import Cache
from lcm_kit.data.shards import Entry
from lcm_kit.data.sources import MixedCache
from lcm_kit.data.split import Rows
from lcm_kit.io.remote import Folder

SIZES = (4, 1, 6, 2)  # rows of each shard
NAMES = ("latents", "embeds", "pooled", "time_ids")


class Gathers(TorchDispatchMode):
    """How many operators took rows out of a tensor."""

    count = 0

    def __torch_dispatch__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += f in (torch.ops.aten.index_select.default, torch.ops.aten.index.Tensor)
        return f(*args, **(kwargs or {}))


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The shards that were held against their hashes, which these here have not."""
    seen: list[str] = []
    monkeypatch.setattr(shards, "require_intact", lambda path, content: seen.append(path.name))
    return seen


def build(folder: Path, seed: int, sizes: tuple[int, ...] = SIZES) -> tuple[Cache, dict[str, Tensor]]:
    """A cache of random tensors in shards of several sizes, and all of its rows, read in one go."""
    folder.mkdir()
    g, told = torch.Generator().manual_seed(seed), []
    shapes = {"latents": (4, 3, 3), "embeds": (5, 7), "pooled": (6,), "time_ids": (6,)}
    for k, n in enumerate(sizes):
        rows = {name: torch.randn(n, *shape, generator=g) for name, shape in shapes.items()}
        save_file(rows, folder / f"shard-{k:05d}.safetensors")
        told.append({"file": f"shard-{k:05d}.safetensors", "content": f"{folder} {k}", "rows": n})
    files = [load_file(folder / shard["file"]) for shard in told]
    ids = [f"{folder.name}/{i}" for i in range(sum(sizes))]
    whole = {name: torch.cat([file[name] for file in files]) for name in NAMES}
    rows = [Entry(id, id, id, id) for id in ids]
    return Cache(Folder.of(folder), rows, told, "", None), whole  # type: ignore[arg-type]


def assert_rows(source: Any, whole: dict[str, Tensor], index: list[int]) -> None:
    """What `source` gives at `index` is what a loop over single rows of the files gives."""
    condition = source.condition(index)
    found = {"latents": source.latents(index), **{name: getattr(condition, name) for name in NAMES[1:]}}
    for name, rows in found.items():
        assert torch.equal(rows, torch.stack([whole[name][i] for i in index])), name
        rows.add_(1.0)  # a batch is its own: what is mapped stays as it is
    again = source.latents(index)
    assert torch.equal(again, torch.stack([whole["latents"][i] for i in index]))


@pytest.mark.parametrize("seed", range(6))
def test_unordered_and_repeated_rows_of_several_shards(
    tmp_path: Path, looked_at: list[str], seed: int
) -> None:
    source, whole = build(tmp_path / "cache", seed)
    rng, total = random.Random(seed), sum(SIZES)
    for n in (1, 2, 7, 40):
        assert_rows(source, whole, [rng.randrange(total) for _ in range(n)])
    assert_rows(source, whole, list(range(total))[::-1])
    assert_rows(source, whole, [12, 0, 0, 12, 4, 5, 3])  # first and last of a shard, each at a border
    assert torch.equal(source.latents(5), whole["latents"][5:6])
    assert sorted(looked_at) == [shard["file"] for shard in source._shards]  # each once, however often used


def test_a_shard_is_gathered_from_once_for_a_tensor(tmp_path: Path, looked_at: list[str]) -> None:
    source, _ = build(tmp_path / "cache", 0)
    index = [12, 0, 5, 1, 6, 0, 12, 7]  # of the first, third and fourth
    with Gathers() as gathers:
        source.latents(index)
    assert gathers.count == 3
    with Gathers() as gathers:
        source.latents([5, 6, 7, 8, 5])
    assert gathers.count == 1


def test_shards_are_mapped_and_not_read(tmp_path: Path, looked_at: list[str]) -> None:
    """The tensors lie where the operating system says that it has put the file."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("only Linux lists what is mapped")
    source, _ = build(tmp_path / "cache", 0)
    source.latents([0, 7])
    for k in (0, 2):
        file = tmp_path / "cache" / f"shard-{k:05d}.safetensors"
        spans = [line.split()[0] for line in maps.read_text().splitlines() if line.endswith(str(file))]
        areas = [tuple(int(end, 16) for end in span.split("-")) for span in spans]
        for tensor in module.mapped(Folder.of(file.parent), file.name, f"{file.parent} {k}").values():
            assert any(low <= tensor.data_ptr() < high for low, high in areas)


def test_rows_of_a_mix_and_of_a_part(tmp_path: Path, looked_at: list[str]) -> None:
    images, of_images = build(tmp_path / "images", 1)
    samples, of_samples = build(tmp_path / "samples", 2, (3, 3))
    part = Rows(images, [11, 2, 5, 6])
    kept = {name: rows[list(part.rows)] for name, rows in of_images.items()}
    mixed = MixedCache(part, samples, 0.5)
    whole = {name: torch.cat([kept[name], of_samples[name]]) for name in NAMES}
    for index in ([9, 0, 4, 4, 3, 0], [1, 3], [8, 5, 8], [7]):
        assert_rows(mixed, whole, index)
    with Gathers() as gathers:
        mixed.latents([9, 0, 4, 4, 3, 0, 9, 2])
    assert gathers.count <= 2 + 2 + 1  # both sources' shards, and the order
    assert isinstance(mixed.condition([0, 9]), Condition)
