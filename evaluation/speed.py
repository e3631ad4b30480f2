"""Speed and memory of a training step, ours beside a straight-line one, on random weights of a real base.

    lcm-kit bench evaluation/speed
    lcm-kit bench evaluation/speed_sd15          on a GPU

Ours is the step of train/distill: one UNet that is teacher and student, latents and embeddings from a cache,
one batch for both teacher passes, the passes without gradient first. The baseline works as public LCM-LoRA
scripts do: a UNet each for teacher and student, conditional and unconditional passes one after the other,
the student's pass first, the VAE and the text encoders in every step, nothing compiled.

Why it is fair: both have the same weights, precision, batch, LoRA, optimizer, clipping and mathematics (the
tests hold that loss and gradient are the same), and they run in turns, step by step, in one process. What
else differs favours the baseline: its pictures and token ids lie in memory, so that it reads, decodes and
tokenizes nothing; its empty condition is encoded once; its UNets are held in `precision`, where such scripts
hold them in float32. Copy this file and change it; docs/benchmarks.md says what is in its results.json.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lcm_kit
from lcm_kit.adapter.adapted_unet import AdaptedUNet
from lcm_kit.adapter.roles import Given, Objective, Roles
from lcm_kit.bases import encode_images
from lcm_kit.bases.compiling import compile_blocks
from lcm_kit.bases.condition import Condition
from lcm_kit.bases.memory import make_optimizer, place
from lcm_kit.bench.counted import counted
from lcm_kit.bench.measure import (
    clock,
    flops,
    matmul_limit,
    peak_here,
    peak_in_subprocess,
    seconds_by_part,
    show,
)
from lcm_kit.bench.models import Base, cached
from lcm_kit.bench.side import Drawn, Part, Side, run, scaler, throughout
from lcm_kit.config.evaluation import Speed
from lcm_kit.config.load import dump, load
from lcm_kit.config.resolution import height_width
from lcm_kit.config.schema import Adapter, Guidance, Optimizer
from lcm_kit.core.guidance import guide, sample_guidance
from lcm_kit.core.losses import huber
from lcm_kit.core.methods import LCM, Times
from lcm_kit.core.prediction import predictor
from lcm_kit.core.schedule import SD_BETAS, Schedule, add_noise
from lcm_kit.core.solvers import SOLVERS
from lcm_kit.data.batches import draw
from lcm_kit.io import own_files
from lcm_kit.io.files import atomic_write
from lcm_kit.io.locks import alone

METHOD, SOLVER, GRID, GUIDANCE, HUBER_C = LCM(), SOLVERS["ddim"], 50, Guidance(), 0.001
KIND = "v_prediction"  # any would do: its arithmetic is nothing beside a UNet's


def ours(config: Speed, device: torch.device) -> Side:
    """The step of train/distill."""
    base = Base(config, device)
    adapted, dtype = AdaptedUNet(place(base.unet(), config, device)), base.dtype
    lora = adapted.add_lora(Adapter(config.rank, config.rank), seed=config.seed)
    adapted.make_fast()
    compile_blocks(adapted.unet, config)
    tables = Schedule.from_config(SD_BETAS)
    schedule = tables.to(device)
    latents, embeddings = cached(config)
    objective = Objective(METHOD, SOLVER, lambda a, b: huber(a, b, HUBER_C))
    empty = embeddings[0].to(device, dtype)

    def inputs(at: int) -> tuple[Tensor, Condition, Drawn]:
        of = partial(draw, config.seed, at, range(config.batch_size))
        noise = of("noise", lambda g: torch.randn(latents.shape[1:], generator=g))
        times = of("times", lambda g: torch.cat(METHOD.times(tables, GRID, 1, g)))
        scale = of("guidance", lambda g: sample_guidance(1, GUIDANCE.min, GUIDANCE.max, g)).flatten()
        drawn = Drawn(noise.to(device), Times(*times.unbind(1)).to(device), scale)
        return latents.to(device), embeddings.to(device, dtype), drawn

    def loss(x0: Tensor, condition: Condition, drawn: Drawn, part: Part = throughout) -> Tensor:
        def named(name: str) -> AbstractContextManager[None]:
            return part("student forward" if name == "student" else name)

        roles = Roles(adapted, adapted.unet, (), empty, schedule, KIND, objective, dtype, part=named)
        return roles.losses(Given(x0, drawn.noise, drawn.times, drawn.guidance, condition)).mean()

    optimizer = make_optimizer(lora, Optimizer(), device)
    return Side(inputs, loss, lora, optimizer, scaler(device, dtype), adapted.unet.parameters)


def baseline(config: Speed, device: torch.device) -> Side:
    """A straight line, as public scripts train."""
    base = Base(config, device)
    teacher_unet, unet, vae, *texts = (
        model.to(device) for model in (base.unet(), base.unet(), base.vae(), *base.texts())
    )
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    lora = AdaptedUNet(unet).add_lora(Adapter(config.rank, config.rank), seed=config.seed)
    schedule = Schedule.from_config(SD_BETAS).to(device)
    predict = partial(predictor, schedule=schedule, kind=KIND)
    latents, condition = cached(config)
    (n, tokens), size = condition.embeds.shape[:2], height_width(config.resolution)
    pixels, ids = torch.rand(n, 3, *size) * 2 - 1, torch.randint(500, (n, tokens))
    empty = base.encode(texts, ids[:1].to(device).expand(n, tokens))

    def inputs(at: int) -> tuple[Tensor, Tensor, Drawn]:
        g = torch.Generator().manual_seed(at)
        times = Times(*(time.to(device) for time in METHOD.times(schedule, GRID, n, g)))
        scale = GUIDANCE.min + (GUIDANCE.max - GUIDANCE.min) * torch.rand(n, device=device)
        drawn = Drawn(torch.randn(latents.shape, device=device), times, scale)
        return pixels.to(device, base.dtype), ids.to(device), drawn

    def loss(pixels: Tensor, ids: Tensor, drawn: Drawn, part: Part = throughout) -> Tensor:
        condition = base.encode(texts, ids)
        t, s, end = drawn.times
        x_t = add_noise(schedule, encode_images(vae, pixels), drawn.noise, t)
        student = predict(lambda x, t: run(unet, x, t, condition))
        landed = METHOD.endpoint(schedule, x_t, *student(x_t, t), t, end)
        with torch.no_grad():
            cond, uncond = run(teacher_unet, x_t, t, condition), run(teacher_unet, x_t, t, empty)
            guided = guide(uncond, cond, drawn.guidance)
            x_s = SOLVER(predict(lambda x, t: guided), schedule, x_t, t, s)
            aim = METHOD.endpoint(schedule, x_s, *student(x_s, s), s, end)
        return huber(landed, aim, HUBER_C).mean()

    o = Optimizer()
    optimizer = torch.optim.AdamW(lora, lr=o.lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay)
    held = [p for model in (teacher_unet, unet, vae, *texts) for p in model.parameters()]
    return Side(inputs, loss, lora, optimizer, scaler(device, base.dtype), lambda: held)


SIDES = {"ours": ours, "baseline": baseline}


@alone("evaluation/speed", lambda config: config.output)
def main(config: Speed) -> Path:
    """Measure both sides; returns the path of `results.json`."""
    # -- Memory first: each side alone, while this process holds nothing -------------------------------------
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype, output = Base(config, device).dtype, Path(config.output)
    atomic_write(output / "config.yaml", dump(config))
    peaks = {name: peak_in_subprocess(__file__, name, output / "config.yaml") for name in SIDES}

    # -- Time: step by step in turns, so that whatever else the machine does hits both -----------------------
    sides = {name: build(config, device) for name, build in SIDES.items()}
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    for at in range(config.warmup + config.steps):
        for name, side in sides.items():
            start = clock(device)
            side.step(at)
            seconds[name].append(clock(device) - start)
    parts = seconds_by_part(sides["ours"], config.steps, device)
    limit = matmul_limit(device, dtype)

    # -- Figures ---------------------------------------------------------------------------------------------
    results: dict[str, Any] = {}
    for name in SIDES:
        timed, arithmetic = seconds[name][config.warmup :], flops(SIDES[name], config)
        median = statistics.median(timed)
        results[name] = {
            "samples_per_second": config.batch_size / median, "seconds": timed, **peaks[name],
            "flops_per_step": arithmetic, "share_of_limit": arithmetic / median / limit,
            **counted(SIDES[name], config),
        }  # fmt: skip
    mine, other = results["ours"], results["baseline"]
    compared = [key for key in mine if key not in ("seconds", "share_of_limit", "library_bytes")]
    results["ratio"] = {key: mine[key] / other[key] if other[key] else None for key in compared}
    results |= {"parts": parts, "limit_flops_per_second": limit, "dtype": str(dtype).removeprefix("torch.")}
    machine = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor()
    results["machine"] = {"device": machine or "cpu", "threads": torch.get_num_threads()}
    results["versions"] = {"lcm_kit": lcm_kit.__version__, "torch": torch.__version__}
    results["config"] = asdict(config)

    # -- Write -----------------------------------------------------------------------------------------------
    own_files.write_json(output / "results.json", results)
    show(results, SIDES)
    return output / "results.json"


if __name__ == "__main__":  # as `peak_in_subprocess` runs this file
    wanted = load(Path(sys.argv[2]))
    assert isinstance(wanted, Speed)
    sys.stdout.write(json.dumps(peak_here(SIDES[sys.argv[1]], wanted)) + "\n")
