"""A distillation small enough for a test: eight pictures, their cache on a random base, and a config."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from pydantic import TypeAdapter

from lcm_kit.config.load import RECIPES, dump
from lcm_kit.data.images import encode
from lcm_kit.share import Share
from lcm_kit.training import held_out, validation
from train import distill

TEMPLATE: dict[str, Any] = {
    "recipe": "train/distill",
    "steps": 4,
    "batch_size": 2,
    "adapter": {"rank": 4, "alpha": 8.0},
    "optimizer": {"lr": 1e-2},
    "guidance": {"min": 2.0, "max": 6.0},
    "validation": {"prompts": None},
    "checkpoint": {"every": 100},
    "logging": {"every": 1, "trackers": []},
}


def prepare(folder: Path, base: Path) -> dict[str, Any]:
    """Write eight captioned PNGs under `folder`, encode them, and return a config's keys for training."""
    images, generator = folder / "images", torch.Generator().manual_seed(7)
    images.mkdir(parents=True)
    for i in range(8):
        pixels = torch.randint(256, (8, 8, 3), generator=generator, dtype=torch.uint8).numpy()
        Image.fromarray(pixels).resize((64, 64), Image.Resampling.NEAREST).save(images / f"{i}.png")
        (images / f"{i}.txt").write_text(f"picture {'abcdefgh'[i]}")
    data = {"path": str(images), "cache": str(folder / "cache"), "resolution": 64}
    keys = {**TEMPLATE, "base": {"path": str(base)}, "data": data}
    encode(configure(keys, folder / "none"), progress=False)
    return keys


def configure(keys: dict[str, Any], output: Path, **changes: Any) -> Any:
    """The config of `keys`, of the recipe that they name, with `changes` laid over it, block by block.

    It writes to `output`.
    """
    merged = {**keys, "output": str(output)}
    for key, value in changes.items():
        merged[key] = {**merged.get(key, {}), **value} if isinstance(value, dict) else value
    return TypeAdapter(RECIPES[merged["recipe"]]).validate_python(merged)


def environment(threads: int) -> dict[str, str]:
    """For a subprocess: offline, on the CPU, importing this checkout.

    Sums depend on the number of threads in their last bits: give this process's own where bits are compared.
    """
    root = str(Path(__file__).parents[2])
    fixed = {"HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": root}
    return {**os.environ, **fixed, "OMP_NUM_THREADS": str(threads)}


def launch(script: str, folder: Path, *arguments: object) -> None:
    """Run a program, written into `folder`, in two processes of one thread that know of each other."""
    (folder / "rank.py").write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    command += [str(folder / "rank.py"), *map(str, arguments)]
    done = subprocess.run(command, env=environment(1), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]


def launch_training(recipe: str, config: Any, folder: Path) -> None:
    """`launch` a recipe of `train/` with `config`, which is written into `folder`."""
    (folder / "config.yaml").write_text(dump(config))
    script = "import sys\nfrom pathlib import Path\nfrom lcm_kit.config.load import load\n"
    script += f"from train import {recipe}\n{recipe}.main(load(Path(sys.argv[1])))\n"
    launch(script, folder, folder / "config.yaml")


def draw_little(patch: pytest.MonkeyPatch) -> None:
    """What is drawn and measured on the way is as many files, and hardly any arithmetic."""
    patch.setenv("ACCELERATE_USE_CPU", "true")
    patch.setattr(held_out, "TIMES", 1)
    for kind in (validation.Fixed, validation.StyleValidation):
        patch.setattr(kind, "teacher_steps", 1)
    for name, value in (("TEACHER_STEPS", 1), ("STYLE_STEPS", 1), ("STUDENT_COLUMNS", 1)):
        patch.setattr(validation, name, value)


def interrupted(config: Any, monkeypatch: pytest.MonkeyPatch, at: int = 5) -> None:
    """Distil until amid step `at` (from 0), when the process ends."""
    step_randomness = distill.step_randomness

    def stop(*given: Any) -> Any:
        if given[-1] == at:
            raise KeyboardInterrupt
        return step_randomness(*given)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(distill, "step_randomness", stop)
        distill.main(config)


def contents(run: Path) -> dict[str, bytes]:
    """Every file of the states, moments and scaler among them, and of the adapter."""
    found = [*run.glob("state/*/*"), *run.glob("adapter/*")]
    return {file.relative_to(run).as_posix(): file.read_bytes() for file in found}


def assert_shards_are_shared(encode: Callable[[Share], object], folder: Path, into: Path) -> None:
    """Of two processes each makes every other shard of `folder`, the first the rest too; all are alike."""
    kept: dict[str, list[str]] = {}
    for name, share in {"all": Share(), "second": Share(1, 2), "first": Share(0, 2)}.items():
        encode(share)
        folder.rename(into / name)
        kept[name] = sorted(path.name for path in (into / name).iterdir())
    assert kept["second"] == ["shard-00000.safetensors", "shard-00002.safetensors"]
    assert kept["first"] == sorted({*kept["all"]} - {*kept["second"]})
    for name in ("first", "second"):
        for file in (into / name).glob("*.safetensors"):
            assert file.read_bytes() == (into / "all" / file.name).read_bytes()
