"""Two processes draw different noise, and together do what one process does with twice the batch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lcm_kit.config.load import dump
from tests.recipes.small import configure, launch
from train import distill

SETTINGS: dict[str, Any] = {"steps": 3, "optimizer": {"eps": 1e-3}}  # eps: as in test_distill's accumulation

# What each rank runs: the recipe, with an eye on what it draws.
RANK = """
import sys
from pathlib import Path
import torch
from lcm_kit.config.load import load
from train import distill

seen, draws = [], distill.step_randomness
def look(*arguments):
    assert torch.distributed.get_world_size() == 2
    seen.append(draws(*arguments))
    return seen[-1]
distill.step_randomness = look
config = load(Path(sys.argv[1]))
distill.main(config)
import os
torch.save([(d.noise, d.times.t, d.guidance) for d in seen], config.output + "/rank-" + os.environ["RANK"])
"""


# FSDP2 through accelerate becomes DDP on a CPU, so its `prepare` is replaced by what it does on a GPU:
# `fully_shard` of the blocks and of the whole, and the optimizer on the sharded parameters.
SHARDED = """
import sys
from pathlib import Path
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from lcm_kit.training import runtime, stepping
from lcm_kit.config.load import load
from train import distill

def prepare(accelerator, adapted, optimizer):
    unet = adapted.unet
    assert torch.distributed.get_world_size() == accelerator.num_processes == 2
    names = {p: name for name, p in unet.named_parameters()}
    groups = [[names[p] for p in group["params"]] for group in optimizer.param_groups]
    mesh = init_device_mesh("cpu", (2,))
    for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks, unet):
        fully_shard(block, mesh=mesh)
    now = dict(unet.named_parameters())
    for group, members in zip(optimizer.param_groups, groups, strict=True):
        group["params"] = [now[name] for name in members]
    assert all(isinstance(p, DTensor) for p in now.values())
    assert sum(p.to_local().numel() for p in now.values()) < 0.6 * sum(p.numel() for p in now.values())
    return unet, accelerator.prepare_optimizer(optimizer)

runtime.prepare = prepare
runtime.sharded = stepping.sharded = lambda accelerator: True
distill.main(load(Path(sys.argv[1])))
"""


def difference(a: Path, b: Path) -> float:
    x, y = (load_file(run / "adapter/lora.safetensors") for run in (a, b))
    assert x.keys() == y.keys()
    return max(float((x[key] - y[key]).abs().max()) for key in y)


def sharded_and_whole(
    keys: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any
) -> tuple[Any, Path]:
    """The config of a run by two processes, each with half of every weight; and the run of one with all."""
    config = configure(keys, folder / "two", batch_size=2, **settings)
    (folder / "config.yaml").write_text(dump(config))
    launch(SHARDED, folder, folder / "config.yaml")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    return config, distill.main(configure(keys, folder / "one", batch_size=4, **settings))


@pytest.mark.slow  # two processes, three times
def test_sharded_weights_equal_whole_ones_and_resume_as_either(
    distill_keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes that hold half of every weight each; then one goes on from their state with all."""
    settings = {**SETTINGS, "checkpoint": {"every": 2, "keep": 9}}
    config, one = sharded_and_whole(distill_keys, tmp_path, monkeypatch, **settings)
    assert difference(tmp_path / "two", one) < 1e-4
    shutil.rmtree(tmp_path / "two/state/step-000003")
    shutil.rmtree(tmp_path / "two/adapter")
    assert difference(distill.main(config), one) < 1e-4  # 2 -> 1 processes
    resumed = json.loads((tmp_path / "two/state/step-000003/manifest.json").read_text())
    assert resumed["batch"] == 4  # what one step sees is that of the start


@pytest.mark.slow
def test_sharded_processes_ask_both_teachers_though_one_has_rows_of_one(
    mixed: tuple[dict[str, Any], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where they would not call the model equally often they would wait for ever."""
    _, one = sharded_and_whole(mixed[0], tmp_path, monkeypatch, **SETTINGS)
    assert difference(tmp_path / "two", one) < 1e-4


@pytest.mark.slow  # processes that import torch anew
def test_two_ranks_match_distributions_as_one_process_does(
    distill_keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are at the same place of the same trajectory, each with samples of its own."""
    keys = {**SETTINGS, "method": {"name": "dmd", "fake_updates": 2}, "ema": 0.0}
    config = configure(distill_keys, tmp_path / "two", batch_size=2, **keys)
    (tmp_path / "config.yaml").write_text(dump(config))
    launch(RANK, tmp_path, tmp_path / "config.yaml")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    one = distill.main(configure(distill_keys, tmp_path / "one", batch_size=4, **keys))
    assert difference(tmp_path / "two", one) < 1e-4


@pytest.mark.slow  # processes that import torch anew
def test_two_ranks_equal_one_process_with_twice_the_batch(
    distill_keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(distill_keys, tmp_path / "two", batch_size=1, accumulation=2, **SETTINGS)
    (tmp_path / "config.yaml").write_text(dump(config))
    launch(RANK, tmp_path, tmp_path / "config.yaml")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    one = distill.main(configure(distill_keys, tmp_path / "one", batch_size=4, **SETTINGS))

    first, second = (torch.load(tmp_path / f"two/rank-{rank}") for rank in (0, 1))
    assert len(first) == len(second) == 3
    samples = [x for draws in (first, second) for noise, _, _ in draws for x in noise]
    assert min(float((a - b).abs().mean()) for i, a in enumerate(samples) for b in samples[:i]) > 0.5
    assert all(not torch.equal(a[2], b[2]) for a, b in zip(first, second, strict=True))

    half = distill.main(configure(distill_keys, tmp_path / "half", batch_size=2, **SETTINGS))
    assert difference(tmp_path / "two", one) < 1e-4
    assert difference(half, one) > 1e-2
    losses = [
        [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (tmp_path / "two", one)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
