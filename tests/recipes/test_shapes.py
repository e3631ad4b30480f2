"""Recipes on pictures of several shapes, with masks: steps by hand, resumed, and by two processes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from lcm_kit import bases
from lcm_kit.adapter.folder import read_provenance
from lcm_kit.bases import inspect_base
from lcm_kit.core.schedule import Schedule
from lcm_kit.data.batches import Batches
from lcm_kit.data.cache import Cache
from lcm_kit.data.images import encode
from lcm_kit.export.run import export_run
from lcm_kit.lora.untrusted import inspect
from tests.recipes.small import TEMPLATE, configure, contents, interrupted, launch_training
from train import distill, finetune

SIZES = {
    "a": (64, 64),
    "b": (128, 32),
    "c": (200, 50),
    "d": (70, 64),
    "e": (40, 120),
    "f": (64, 64),
    "g": (32, 96),
}
MASKED = ("b", "f")


@pytest.fixture(autouse=True)
def _cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


@pytest.fixture(scope="module")
def keys(sd_base: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Seven pictures in three shapes, two of them with their left half masked out."""
    folder, generator = tmp_path_factory.mktemp("shapes"), torch.Generator().manual_seed(3)
    images = folder / "images"
    images.mkdir()
    for name, size in SIZES.items():
        pixels = torch.randint(256, (8, 8, 3), generator=generator, dtype=torch.uint8).numpy()
        Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST).save(images / f"{name}.png")
        (images / f"{name}.txt").write_text(f"picture {name}")
        if name in MASKED:
            mask = Image.new("L", size, 255)
            mask.paste(0, (0, 0, size[0] // 2, size[1]))
            mask.save(images / f"{name}.mask.png")
    data = {
        "path": str(images), "cache": str(folder / "cache"), "resolution": 64,
        "shapes": {"multiple": 16}, "masks": {"background": 0.0},
    }  # fmt: skip
    found = {**TEMPLATE, "steps": 8, "base": {"path": str(sd_base())}, "data": data}
    encode(configure(found, folder / "none"), progress=False)
    return found


def opened(config: Any) -> Cache:
    return Cache.open(config.data.cache, base=inspect_base(config.base.path), data=config.data)


def test_the_cache_has_every_picture_in_its_shape(keys: dict[str, Any], tmp_path: Path) -> None:
    cache = opened(configure(keys, tmp_path))
    shapes = {(): "adf", (128, 32): "bc", (48, 80): "", (32, 128): "eg"}
    found = {run.shape: run.rows for run in cache.runs}
    assert found == {shape: len(names) for shape, names in shapes.items() if names}
    assert cache.ids == [f"{name}.png" for name in "adf" + "eg" + "bc"]
    assert cache.latents([5]).shape == (1, 4, 8, 32) and cache.latents([3]).shape == (1, 4, 32, 8)


def test_denoising_steps_again_by_hand(keys: dict[str, Any], tmp_path: Path) -> None:
    """The loss of every step from the cache's rows, the base's UNet and the formula, while B is zero."""
    wanted = {**keys, "recipe": "train/finetune", "optimizer": {"lr": 1e-30}}
    wanted = {key: value for key, value in wanted.items() if key != "guidance"}
    config = configure(
        wanted,
        tmp_path / "run",
        loss={"min_snr_gamma": None},
        caption_dropout=0.0,
        validation={"held_out": 0},
    )
    run = finetune.main(config)
    told = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    cache, base = opened(config), inspect_base(config.base.path)
    unet, schedule = bases.load_unet(base), Schedule.from_config(base.scheduler_config)
    batches, shapes = Batches(cache, config.batch_size, config.seed), set()
    for step, loss in enumerate(told):
        batch = batches.at(step)
        drawn = finetune.step_randomness(config, schedule.steps, batch, step)
        alpha, sigma = (x[drawn.t].view(-1, 1, 1, 1) for x in (schedule.alpha, schedule.sigma))
        with torch.no_grad():
            x_t = alpha * batch.latents + sigma * drawn.noise
            error = unet(x_t, drawn.t, **batch.condition.kwargs()).sample - drawn.noise
        shapes.add(tuple(error.shape[2:]))
        for k, id in enumerate(batch.ids):
            if id[0] in MASKED:
                error[k, :, :, : error.shape[3] // 2] = 0
        assert loss == pytest.approx(float(error.square().mean()), rel=1e-5), step
    assert len(shapes) == 3 and any(id[0] in MASKED for step in range(8) for id in batches.at(step).ids)


METHODS: dict[str, dict[str, Any]] = {
    "lcm": {},
    "pcm": {"method": {"name": "pcm", "phases": 4}},
    "dmd": {"method": {"name": "dmd", "steps": [2], "fake_updates": 1}},
}


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_was_stopped_goes_on_as_the_straight_one(
    keys: dict[str, Any], method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**METHODS[method], "checkpoint": {"every": 3}}
    straight = distill.main(configure(keys, tmp_path / "straight", **settings))
    config = configure(keys, tmp_path / "stopped", **settings)
    interrupted(config, monkeypatch)
    resumed = distill.main(config)
    ours, theirs = contents(straight), contents(resumed)
    weights = [name for name in ours if name.endswith("lora.safetensors")]
    assert weights and all(ours[name] == theirs[name] for name in weights)
    made = read_provenance(straight / "adapter")
    assert (made.data.resolution, made.data.shapes) == (64, {"32x128": 2, "64x64": 3, "128x32": 2})
    export_run(straight)
    file = straight / "export/straight.safetensors"
    told = json.loads(inspect(file).metadata["ss_bucket_info"])["buckets"]
    assert [(told[k]["resolution"], told[k]["count"]) for k in "012"] == [
        ([32, 128], 2), ([64, 64], 3), ([128, 32], 2)
    ]  # fmt: skip
    assert inspect(file).metadata["ss_resolution"] == "(64, 64)"


@pytest.mark.slow  # processes that import torch anew
def test_two_processes_are_one_with_twice_the_batch(keys: dict[str, Any], tmp_path: Path) -> None:
    settings: dict[str, Any] = {"steps": 6, "optimizer": {"eps": 1e-3}}
    config = configure(keys, tmp_path / "two", batch_size=2, **settings)
    launch_training("distill", config, tmp_path)
    one = distill.main(configure(keys, tmp_path / "one", batch_size=4, **settings))
    a, b = (load_file(run / "adapter/lora.safetensors") for run in (tmp_path / "two", one))
    assert max(float((a[key] - b[key]).abs().max()) for key in a) < 1e-4
