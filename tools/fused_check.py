"""What fused adapters save: seconds a picture with a LoRA in the weights and beside them, in turns.

    python tools/fused_check.py [--base BASE] [--adapter FILE] [--steps 4] [--batch 8] [--rounds 9]

Both sides draw the same pictures with the same pipeline in one process, so that whatever else the machine
does hits both. Prints the medians, their ratio, the same by processor time, what fusing and taking out take,
and how far the latents of both are from each other.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

from lcm_kit import sample
from lcm_kit.drawing.fused import Fused, fuse


def timed(pipe: Any, batch: int, steps: int) -> tuple[float, float, torch.Tensor]:
    """Seconds and processor seconds a picture, and the latents."""
    started, used = time.perf_counter(), time.process_time()
    latents = sample.latents(pipe, ["a red cat on a blue field"] * batch, sampler="lcm", steps=steps)
    sample.decode(pipe, latents)
    return (time.perf_counter() - started) / batch, (time.process_time() - used) / batch, latents


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--base", default="asset:tiny-sd")
    parser.add_argument("--adapter", default="asset:tiny-lcm-lora")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    asked = parser.parse_args()

    pipe = sample.pipeline(asked.base, **sample.placement())
    sample.load_adapter(pipe, asked.adapter)
    sides: dict[str, list[tuple[float, float, torch.Tensor]]] = {"beside": [], "fused": []}
    taken: list[tuple[float, float]] = []
    done = Fused()
    for _ in range(asked.rounds + 1):
        sides["beside"].append(timed(pipe, asked.batch, asked.steps))
        started = time.perf_counter()
        done = fuse(pipe)
        fusing = time.perf_counter() - started
        sides["fused"].append(timed(pipe, asked.batch, asked.steps))
        started = time.perf_counter()
        done.undo()
        taken.append((fusing, time.perf_counter() - started))

    median = {
        name: [statistics.median(each[k] for each in rounds[1:]) for k in (0, 1)]
        for name, rounds in sides.items()
    }
    for name, (seconds, processor) in median.items():
        print(f"{name}: {seconds:.4f} s a picture, {processor:.4f} s of the processor")
    (plain, plain_used), (fused, fused_used) = median["beside"], median["fused"]
    print(f"ratio: {plain / fused:.2f} by the clock, {plain_used / fused_used:.2f} by processor time")
    into, out = (statistics.median(each[k] for each in taken) for k in (0, 1))
    print(f"fusing takes {into:.3f} s, taking out {out:.3f} s; {done.left} layers stay with peft")
    a, b = sides["beside"][0][2], sides["fused"][0][2]
    print(f"latents differ by {float((a - b).norm() / a.norm()):.1e}, relative")


if __name__ == "__main__":
    main()
