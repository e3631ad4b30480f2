"""Two processes draw different noise, and together do what one process does with twice the batch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lcm_kit.config.load import dump
from tests.recipes.small import configure, environment
from train import distill

SETTINGS: dict[str, Any] = {"steps": 3, "optimizer": {"eps": 1e-3}}  # eps: as in test_distill's accumulation

# What each rank runs: the recipe, with an eye on what it draws.
RANK = """
import sys
from pathlib import Path
import torch
from lcm_kit.config.load import load
from train import distill

seen, draws = [], distill.draws
def look(*arguments):
    assert torch.distributed.get_world_size() == 2
    seen.append(draws(*arguments))
    return seen[-1]
distill.draws = look
config = load(Path(sys.argv[1]))
distill.main(config)
import os
torch.save([(d.noise, d.times.t, d.guidance) for d in seen], config.output + "/rank-" + os.environ["RANK"])
"""


def test_two_ranks_equal_one_process_with_twice_the_batch(
    distill_keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(distill_keys, tmp_path / "two", batch_size=1, accumulation=2, **SETTINGS)
    (tmp_path / "config.yaml").write_text(dump(config))
    (tmp_path / "rank.py").write_text(RANK)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    arguments = [str(tmp_path / "rank.py"), str(tmp_path / "config.yaml")]
    done = subprocess.run(
        command + arguments, env=environment(1), capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    one = distill.main(configure(distill_keys, tmp_path / "one", batch_size=4, **SETTINGS))

    first, second = (torch.load(tmp_path / f"two/rank-{rank}") for rank in (0, 1))
    assert len(first) == len(second) == 3
    samples = [x for draws in (first, second) for noise, _, _ in draws for x in noise]
    assert min(float((a - b).abs().mean()) for i, a in enumerate(samples) for b in samples[:i]) > 0.5
    assert all(not torch.equal(a[2], b[2]) for a, b in zip(first, second, strict=True))

    a, b = (load_file(run / "adapter/lora.safetensors") for run in (tmp_path / "two", one))
    initial = distill.main(configure(distill_keys, tmp_path / "half", batch_size=2, **SETTINGS))
    half = load_file(initial / "adapter/lora.safetensors")
    assert max(float((a[key] - b[key]).abs().max()) for key in b) < 1e-4
    assert max(float((half[key] - b[key]).abs().max()) for key in b) > 1e-2
    losses = [
        [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (tmp_path / "two", one)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
