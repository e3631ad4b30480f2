"""Whether encoding and training of a stream grow with the number of pictures: time a picture, memory.

    OMP_NUM_THREADS=1 python -m studies.growth [COUNT ...]

Tar shards of 250 drawn pictures of 16 x 16 and 32 x 8 pixels with captions, made in `runs/growth`; of each
count an encode and then a training of 200 steps on tiny-sd, each in a process of its own. Of each: seconds a
picture and milliseconds a step without what comes once (loading), processor seconds of both, and the most
memory that is the process's own (RssAnon; pages of mapped files are the operating system's, which drops them
at need) and in all (VmHWM). The last line is the ratio of the last count to the first: it should be at most
1.2. The figures stand in docs/benchmarks.md.
"""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

RUNS = Path("runs/growth")
SHARD, SIDE, STEPS = 250, 16, 200
KEYS = ("encode_ms", "encode_cpu_ms", "encode_own_mib", "step_ms", "step_cpu_ms", "train_own_mib")


def made(count: int) -> str:
    """A pattern of tar shards with `count` pictures; the same for every count as far as it goes."""
    folder = RUNS / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    shards = -(-count // SHARD)
    for number in range(shards):
        path = folder / f"{number:06d}.tar"
        if not path.exists():
            _write(path, number)
    return str(folder / f"{{000000..{shards - 1:06d}}}.tar")


def _write(path: Path, number: int) -> None:
    random = np.random.default_rng(number)
    with tarfile.open(path.with_suffix(".part"), "w") as tar:
        for k in range(SHARD):
            size = (SIDE, SIDE) if k % 2 else (2 * SIDE, SIDE // 2)
            pixels = random.integers(0, 256, (size[1] // 4, size[0] // 4, 3), dtype=np.uint8)
            picture = io.BytesIO()
            Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST).save(picture, "PNG")
            for ending, content in (("png", picture.getvalue()), ("txt", f"a red cup number {k}".encode())):
                info = tarfile.TarInfo(f"{number:06d}{k:04d}.{ending}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    path.with_suffix(".part").rename(path)


class Memory:
    """The most that the process has of its own, looked at four times a second."""

    def __init__(self) -> None:  # noqa: D107
        self.own, self._over = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._over.wait(0.25):
            self.own = max(self.own, kib("RssAnon"))

    def end(self) -> int:
        """MiB."""
        self._over.set()
        self._thread.join()
        return max(self.own, kib("RssAnon")) >> 10


def kib(key: str) -> int:
    """A figure of this process from /proc."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{key}:")))


def _config(count: int) -> Any:
    from lcm_kit.config.load import load

    where = RUNS / str(count)
    words = [
        f"data.path={made(count)}", f"data.cache={where / 'cache'}", f"data.resolution={SIDE}",
        "data.regularization=null", "data.shapes.multiple=8", "data.batch_size=16", "validation.prompts=null",
        "validation.control=null", "validation.held_out=0", f"steps={STEPS}", "batch_size=8",
        "adapter.rank=4", f"output={where / 'run'}", "checkpoint.every=1000000", "logging.every=50",
        "optimizer.warmup_steps=0",
    ]  # fmt: skip
    return load(Path("configs/distill/tiny_quick.yaml"), words)


def encode(count: int) -> dict[str, float]:
    """Encode `count` pictures, all anew. The first shard loads what is loaded once, and is not timed."""
    from lcm_kit.data import sources
    from lcm_kit.data.parts import PartMaker

    config, marks = _config(count), []
    shutil.rmtree(config.data.cache, ignore_errors=True)
    real = PartMaker.make

    def timed(self: Any, source: Any) -> Any:
        done = real(self, source)
        marks.append((time.perf_counter(), time.process_time()))
        return done

    PartMaker.make = timed  # type: ignore[method-assign]
    memory, begun = Memory(), (time.perf_counter(), time.process_time())
    sources.encode(config, progress=False)
    first, last, pictures = begun, marks[-1], count
    if len(marks) > 1:
        first, pictures = marks[0], count - SHARD
    wall, cpu = (1000 * (b - a) / pictures for a, b in zip(first, last, strict=True))
    return {
        "encode_ms": wall,
        "encode_cpu_ms": cpu,
        "encode_own_mib": memory.end(),
        "encode_all_mib": kib("VmHWM") >> 10,
    }


def train(count: int) -> dict[str, float]:
    """Train on them; the first quarter of the steps is not timed."""
    from lcm_kit.training import ahead
    from train import distill

    config, marks = _config(count), []
    shutil.rmtree(config.output, ignore_errors=True)
    real = ahead.Ahead.at

    def timed(self: Any, step: int) -> Any:
        marks.append((time.perf_counter(), time.process_time()))
        return real(self, step)

    ahead.Ahead.at = timed  # type: ignore[method-assign]
    memory = Memory()
    distill.main(config)
    first, last, steps = marks[STEPS // 4], marks[-1], STEPS - 1 - STEPS // 4
    wall, cpu = (1000 * (b - a) / steps for a, b in zip(first, last, strict=True))
    return {
        "step_ms": wall,
        "step_cpu_ms": cpu,
        "train_own_mib": memory.end(),
        "train_all_mib": kib("VmHWM") >> 10,
    }


def main(counts: list[int]) -> None:
    """Print a row for each count, and the ratio of the last to the first."""
    rows = []
    print("| pictures | " + " | ".join(KEYS) + " |", flush=True)
    for count in counts:
        made(count)
        row: dict[str, float] = {}
        for what in ("encode", "train"):
            done = subprocess.run(
                [sys.executable, "-m", "studies.growth", what, str(count)],
                capture_output=True,
                text=True,
                check=True,
            )
            row |= json.loads(done.stdout.splitlines()[-1])
        rows.append(row)
        print(f"| {count} | " + " | ".join(f"{row[key]:.2f}" for key in KEYS) + " |", flush=True)
    print("| ratio | " + " | ".join(f"{rows[-1][key] / rows[0][key]:.2f}" for key in KEYS) + " |", flush=True)
    (RUNS / "growth.json").write_text(json.dumps(dict(zip(map(str, counts), rows, strict=True)), indent=1))


if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1] in ("encode", "train"):
        print(json.dumps({"encode": encode, "train": train}[sys.argv[1]](int(sys.argv[2]))))
    else:
        main([int(count) for count in sys.argv[1:]] or [1000, 10_000, 100_000])
