"""What is measured of a side: seconds, FLOPs, and peak memory in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

import lcm_kit
from lcm_kit import console
from lcm_kit.bench.side import Build, Side
from lcm_kit.config.evaluation import Speed
from lcm_kit.config.schema import Memory
from lcm_kit.errors import UserError

# -- Time and FLOPs ------------------------------------------------------------------------------------------


def clock(device: torch.device) -> float:
    """Seconds, after all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds_by_part(side: Side, steps: int, device: torch.device) -> dict[str, float]:
    """Mean seconds of each part of a step, in the order in which they run; "rest" is between them."""
    spent: dict[str, float] = {}

    @contextmanager
    def part(name: str) -> Iterator[None]:
        start = clock(device)
        yield
        spent[name] = spent.get(name, 0.0) + clock(device) - start

    start = clock(device)
    for at in range(steps):
        side.step(at, part)
    spent["rest"] = clock(device) - start - sum(spent.values())
    return {name: seconds / steps for name, seconds in spent.items()}


def flops(build: Build, config: Speed) -> int:
    """Of a step, on torch's meta device: nothing is computed, and what checkpointing repeats is left out."""
    plain = replace(config, precision="float32", memory=Memory(), gradient_checkpointing=False)
    side = build(plain, torch.device("meta"))
    with FlopCounterMode(display=False) as counter:
        side.step(0)
    return int(counter.get_total_flops())


def matmul_limit(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs a second of a large matrix product, the best of several: what this machine can do."""
    n, seconds = 8192 if device.type == "cuda" else 2048, []
    a = torch.randn(n, n, device=device).to(dtype)
    for _ in range(6):
        start = clock(device)
        torch.mm(a, a)
        seconds.append(clock(device) - start)
    return 2 * n**3 / min(seconds)


# -- Memory --------------------------------------------------------------------------------------------------


def resident(key: str) -> int | None:
    """Bytes that /proc calls VmRSS (held now) or VmHWM (held at most); None where there is no /proc."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), None)


def peak_here(build: Build, config: Speed) -> dict[str, int | None]:
    """Peak bytes of one side, alone in this process: CUDA's, or resident memory beyond the libraries'."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    small = replace(config, structure="tiny", width=1.0, resolution=64, batch_size=1, rank=1)
    build(small, device).step(0)  # loads the libraries, and what they keep after a first step
    before, side = resident("VmRSS"), build(config, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for at in range(2):  # the first step makes the optimizer's moments, the second works beside them
        side.step(at)
    if device.type == "cuda":
        return {"peak_bytes": torch.cuda.max_memory_allocated(), "library_bytes": None}
    most = resident("VmHWM")
    return {"peak_bytes": most and before and most - before, "library_bytes": before}


def peak_in_subprocess(recipe: str, name: str, file: Path) -> dict[str, int | None]:
    """`peak_here` of a side of the config in `file`, by a process of its own that runs the file `recipe`.

    Run as a script with `name` and `file`, the recipe prints what `peak_here` finds, as JSON, in its last
    line: so a copy of it measures its own sides. Raises `UserError` if that process dies.
    """
    freed = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # glibc then gives back what is freed
    path = {"PYTHONPATH": str(Path(lcm_kit.__file__).parents[1])}
    command = [sys.executable, recipe, name, str(file)]
    done = subprocess.run(command, env={**os.environ, **freed, **path}, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(
            f"{name}: the process that measures its memory ended with {done.returncode}; if it ran out of "
            "memory, lower batch_size or resolution"
        )
    found: dict[str, int | None] = json.loads(done.stdout.splitlines()[-1])
    return found


# -- What is shown of it -------------------------------------------------------------------------------------


def show(results: dict[str, Any], sides: Iterable[str]) -> None:
    """Print the sides and their ratio, and the parts of our step, from what results.json holds."""
    names = list(sides)
    table = console.Table("", *names, "ratio", box=console.SIMPLE, pad_edge=False)
    for label, key, unit in (
        ("samples/s", "samples_per_second", 1), ("peak memory, GiB", "peak_bytes", 2**30),
        ("TFLOPs a step", "flops_per_step", 1e12), ("share of the FLOP limit", "share_of_limit", 1),
        ("kernels a step", "kernels_per_step", 1),
        ("kept for the backward (narrow), MiB", "kept_bytes_narrow", 2**20),
    ):  # fmt: skip
        figures = [results[name][key] for name in names]
        shown = ["" if figure is None else f"{figure / unit:.3f}" for figure in figures]
        ratio = results["ratio"].get(key)
        table.add_row(label, *shown, "" if ratio is None else f"{ratio:.3f}")
    for part, seconds in results["parts"].items():
        table.add_row(f"{part}, s", f"{seconds:.4f}", "", "")
    console.show(table)
