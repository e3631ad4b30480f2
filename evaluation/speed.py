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
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import lcm_kit
from lcm_kit import assets
from lcm_kit.adapter import add_lora, teacher
from lcm_kit.config.load import dump, load
from lcm_kit.config.schema import Adapter, Guidance, Memory, Optimizer, Speed
from lcm_kit.data.batches import draw
from lcm_kit.errors import UserError
from lcm_kit.export.structure import known
from lcm_kit.families import encode_images
from lcm_kit.families.condition import Condition
from lcm_kit.files import atomic_write
from lcm_kit.guidance import guide, sample_guidance
from lcm_kit.losses import huber
from lcm_kit.memory import compiled, make_optimizer, place
from lcm_kit.methods import METHODS, Times
from lcm_kit.prediction import predictor
from lcm_kit.schedule import Schedule, add_noise
from lcm_kit.solvers import SOLVERS
from lcm_kit.step import consistency_loss

Part = Callable[[str], AbstractContextManager[None]]
METHOD, SOLVER, GRID, GUIDANCE, HUBER_C = METHODS["lcm"](), SOLVERS["ddim"], 50, Guidance(), 0.001
KIND = "v_prediction"  # any would do: its arithmetic is nothing beside a UNet's
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}  # of SD and SDXL


# -- Models of random weights, of the published sizes --------------------------------------------------------

UNET = {"norm_num_groups": 32, "block_out_channels": (320, 640, 1280, 1280)}
VAE = {
    "block_out_channels": (128, 256, 512, 512), "norm_num_groups": 32, "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip
CLIP_KEYS = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
CLIP_L, CLIP_H, CLIP_G = (12, 768, 3072, 12), (23, 1024, 4096, 16), (32, 1280, 5120, 20)
TEXT = {"sd1": (CLIP_L,), "sd2": (CLIP_H,), "sdxl": (CLIP_L, CLIP_G)}
SCALED = {*CLIP_KEYS[1:], *UNET, "cross_attention_dim", "attention_head_dim"}  # the last is a number of heads


def settings(config: Speed) -> tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]:
    """The configurations of UNet, VAE and text encoders: those of `structure` at `width`."""
    if config.structure == "tiny":
        files = (assets.path("tiny-sd") / part / "config.json" for part in ("unet", "vae", "text_encoder"))
        unet, vae, text = (json.loads(file.read_text(encoding="utf-8")) for file in files)
        return unet, vae, [text]

    def share(value: Any) -> Any:
        return tuple(map(share, value)) if isinstance(value, tuple) else max(1, round(value * config.width))

    def scaled(of: dict[str, Any]) -> dict[str, Any]:
        return {key: share(value) if key in SCALED else value for key, value in of.items()}

    texts = [scaled(dict(zip(CLIP_KEYS, row, strict=True))) for row in TEXT[config.structure]]
    unet = scaled({**UNET, **known(config.structure).unet_config})
    if config.structure == "sdxl":  # it is told the pooled text and six sizes
        unet["projection_class_embeddings_input_dim"] = texts[1]["hidden_size"] + 6 * 256
    return unet, scaled(VAE), texts


def sizes(config: Speed) -> Tensor:
    """SDXL's time_ids [B, 6] of pictures that were not cropped."""
    r = config.resolution
    return torch.tensor([[r, r, 0, 0, r, r]], dtype=torch.float32).repeat(config.batch_size, 1)


@dataclass(frozen=True)
class Base:
    """Builds the models of one side, frozen, each from the same seed wherever it is built."""

    config: Speed
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the frozen models. Raises `UserError` for float16 on a CPU."""
        if self.config.precision == "float16" and self.device.type == "cpu":
            raise UserError("precision float16 does not train on a CPU; use auto, float32 or bfloat16")
        auto = torch.float16 if self.device.type == "cuda" else torch.float32
        return auto if self.config.precision == "auto" else getattr(torch, self.config.precision)

    def build(self, make: Callable[[Any], Any], of: Any) -> Any:
        """The model that `make` makes of its configuration, on the CPU: the same weights on every device."""
        torch.manual_seed(self.config.seed)
        with torch.device("meta" if self.device.type == "meta" else "cpu"):
            model = make(of)
        nn.Module.to(model, self.dtype)  # diffusers' own warns of layers in float32: there are none
        return model.eval().requires_grad_(False)

    def unet(self) -> Any:
        """The UNet."""
        from diffusers import UNet2DConditionModel

        return self.build(UNet2DConditionModel.from_config, settings(self.config)[0])

    def vae(self) -> Any:
        """The VAE."""
        from diffusers import AutoencoderKL

        return self.build(AutoencoderKL.from_config, settings(self.config)[1])

    def texts(self) -> list[Any]:
        """The text encoders."""
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

        kinds = (CLIPTextModel, CLIPTextModelWithProjection)
        return [
            self.build(kind, CLIPTextConfig(**{**of, "projection_dim": of["hidden_size"]}))
            for kind, of in zip(kinds, settings(self.config)[2], strict=False)
        ]

    @torch.no_grad()
    def encode(self, texts: list[Any], ids: Tensor) -> Condition:
        """The condition of token ids [B, L]."""
        if len(texts) == 1:
            return Condition(texts[0](ids)[0])
        outputs = [model(ids, output_hidden_states=True) for model in texts]
        embeds = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        return Condition(embeds, outputs[1].text_embeds, sizes(self.config).to(ids.device, self.dtype))


# -- The two sides -------------------------------------------------------------------------------------------


class Drawn(NamedTuple):
    """A step's randomness."""

    noise: Tensor  # [B, C, h, w]
    times: Times  # [B] each
    guidance: Tensor  # [B] guidance_scale


class Side(NamedTuple):
    """One of the two ways to train."""

    inputs: Callable[[int], tuple[Tensor, Any, Drawn]]  # step -> what the loss takes, on the device
    loss: Callable[[Tensor, Any, Drawn, Part], Tensor]
    lora: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # of float16's gradients

    def step(self, at: int, part: Part = lambda name: nullcontext()) -> Tensor:
        """One optimizer step, its parts each inside `part(name)`; returns the loss."""
        with part("data"):
            inputs = self.inputs(at)
        loss = self.loss(*inputs, part)
        with part("backward"):
            self.scaler.scale(loss).backward()
        with part("optimizer"):
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.lora, 1.0)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad()
        return loss.detach()


def run(unet: Any, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
    """The UNet's raw output, under autocast as accelerate does it where the frozen weights are half."""
    dtype = condition.embeds.dtype
    with nullcontext() if dtype == torch.float32 else torch.autocast(x.device.type, dtype):
        output: Tensor = unet(x.to(dtype), t, **condition.kwargs()).sample
    return output


def cached(config: Speed) -> tuple[Tensor, Condition]:
    """One batch of random latents and conditions in the CPU's memory, as a cache gives them."""
    (unet, vae, texts), n = settings(config), config.batch_size
    side = config.resolution // 2 ** (len(vae["block_out_channels"]) - 1)
    tokens = texts[0].get("max_position_embeddings", 77)
    condition = Condition(torch.randn(n, tokens, unet["cross_attention_dim"]))
    if config.structure == "sdxl":
        condition = replace(condition, pooled=torch.randn(n, texts[1]["hidden_size"]), time_ids=sizes(config))
    return torch.randn(n, 4, side, side), condition


def ours(config: Speed, device: torch.device) -> Side:
    """The step of train/distill."""
    base = Base(config, device)
    unet, dtype = place(base.unet(), config, device), base.dtype
    lora = add_lora(unet, Adapter(config.rank, config.rank), seed=config.seed)
    call = compiled(unet, config)
    tables = Schedule.from_config(BETAS)
    schedule = tables.to(device)
    predict = partial(predictor, schedule=schedule, kind=KIND)
    latents, embeddings = cached(config)
    empty = embeddings[0].expand(config.batch_size).to(device, dtype)

    def inputs(at: int) -> tuple[Tensor, Condition, Drawn]:
        of = partial(draw, config.seed, at, range(config.batch_size))
        noise = of("noise", lambda g: torch.randn(latents.shape[1:], generator=g))
        times = of("times", lambda g: torch.cat(METHOD.times(tables, GRID, 1, g)))
        scale = of("guidance", lambda g: sample_guidance(1, GUIDANCE.min, GUIDANCE.max, g)).flatten()
        drawn = Drawn(noise.to(device), Times(*times.unbind(1)).to(device), scale)
        return latents.to(device), embeddings.to(device, dtype), drawn

    def loss(x0: Tensor, condition: Condition, drawn: Drawn, part: Part) -> Tensor:
        def as_teacher(x: Tensor, t: Tensor) -> Tensor:
            both = Condition.cat([empty.sized_as(condition), condition])
            with part("teacher"), teacher(unet):
                uncond, cond = run(call, x.repeat(2, 1, 1, 1), t.repeat(2), both).chunk(2)
            return guide(uncond, cond, drawn.guidance)

        def as_student(name: str, x: Tensor, t: Tensor) -> Tensor:
            with part(name):
                return run(call, x, t, condition)

        return consistency_loss(
            method=METHOD, solver=SOLVER, loss=lambda a, b: huber(a, b, HUBER_C), schedule=schedule,
            teacher=predict(as_teacher), target=predict(partial(as_student, "target")),
            student=predict(partial(as_student, "student forward")),
            x0=x0, noise=drawn.noise, times=drawn.times,
        ).mean()  # fmt: skip

    return Side(inputs, loss, lora, make_optimizer(lora, Optimizer(), device), scaler(device, dtype))


def baseline(config: Speed, device: torch.device) -> Side:
    """A straight line, as public scripts train."""
    base = Base(config, device)
    teacher_unet, unet, vae, *texts = (
        model.to(device) for model in (base.unet(), base.unet(), base.vae(), *base.texts())
    )
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    lora = add_lora(unet, Adapter(config.rank, config.rank), seed=config.seed)
    schedule = Schedule.from_config(BETAS).to(device)
    predict = partial(predictor, schedule=schedule, kind=KIND)
    latents, condition = cached(config)
    (n, tokens), width = condition.embeds.shape[:2], config.resolution
    pixels, ids = torch.rand(n, 3, width, width) * 2 - 1, torch.randint(500, (n, tokens))
    empty = base.encode(texts, ids[:1].to(device).expand(n, tokens))

    def inputs(at: int) -> tuple[Tensor, Tensor, Drawn]:
        g = torch.Generator().manual_seed(at)
        times = Times(*(time.to(device) for time in METHOD.times(schedule, GRID, n, g)))
        scale = GUIDANCE.min + (GUIDANCE.max - GUIDANCE.min) * torch.rand(n, device=device)
        drawn = Drawn(torch.randn(latents.shape, device=device), times, scale)
        return pixels.to(device, base.dtype), ids.to(device), drawn

    def loss(pixels: Tensor, ids: Tensor, drawn: Drawn, part: Part) -> Tensor:
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
    return Side(inputs, loss, lora, optimizer, scaler(device, base.dtype))


def scaler(device: torch.device, dtype: torch.dtype) -> torch.amp.GradScaler:
    """What keeps float16's gradients from vanishing; it does nothing in other precisions."""
    return torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)


SIDES = {"ours": ours, "baseline": baseline}


# -- Measures ------------------------------------------------------------------------------------------------


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


def flops(name: str, config: Speed) -> int:
    """Of a step, on torch's meta device: nothing is computed, and what checkpointing repeats is left out."""
    plain = replace(config, precision="float32", memory=Memory(), gradient_checkpointing=False)
    side = SIDES[name](plain, torch.device("meta"))
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


def resident(key: str) -> int | None:
    """Bytes that /proc calls VmRSS (held now) or VmHWM (held at most); None where there is no /proc."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), None)


def peak_here(name: str, config: Speed) -> dict[str, int | None]:
    """Peak bytes of one side, alone in this process: CUDA's, or resident memory beyond the libraries'."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    small = replace(config, structure="tiny", width=1.0, resolution=64, batch_size=1, rank=1)
    SIDES[name](small, device).step(0)  # loads the libraries, and what they keep after a first step
    before, side = resident("VmRSS"), SIDES[name](config, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for at in range(2):  # the first step makes the optimizer's moments, the second works beside them
        side.step(at)
    if device.type == "cuda":
        return {"peak_bytes": torch.cuda.max_memory_allocated(), "library_bytes": None}
    most = resident("VmHWM")
    return {"peak_bytes": most and before and most - before, "library_bytes": before}


def peak_apart(name: str, file: Path) -> dict[str, int | None]:
    """`peak_here` of the config in `file`, by a process of its own. Raises `UserError` if that dies."""
    freed = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # glibc then gives back what is freed
    path = {"PYTHONPATH": str(Path(lcm_kit.__file__).parents[1])}
    command = [sys.executable, __file__, name, str(file)]
    done = subprocess.run(command, env={**os.environ, **freed, **path}, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(
            f"{name}: the process that measures its memory ended with {done.returncode}; if it ran out of "
            "memory, lower batch_size or resolution"
        )
    found: dict[str, int | None] = json.loads(done.stdout.splitlines()[-1])
    return found


# -- The benchmark -------------------------------------------------------------------------------------------


def show(results: dict[str, Any]) -> None:
    """Print the two sides and their ratio, and the parts of our step."""
    table = Table("", *SIDES, "ratio", box=SIMPLE, pad_edge=False)
    for label, key, unit in (
        ("samples/s", "samples_per_second", 1), ("peak memory, GiB", "peak_bytes", 2**30),
        ("TFLOPs a step", "flops_per_step", 1e12), ("share of the FLOP limit", "share_of_limit", 1),
    ):  # fmt: skip
        figures = [results[name][key] for name in SIDES]
        shown = ["" if figure is None else f"{figure / unit:.3f}" for figure in figures]
        ratio = results["ratio"].get(key)
        table.add_row(label, *shown, "" if ratio is None else f"{ratio:.3f}")
    for part, seconds in results["parts"].items():
        table.add_row(f"{part}, s", f"{seconds:.4f}", "", "")
    Console().print(table)


def main(config: Speed) -> Path:
    """Measure both sides; returns the path of `results.json`."""
    # -- Memory first: each side alone, while this process holds nothing -------------------------------------
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype, output = Base(config, device).dtype, Path(config.output)
    atomic_write(output / "config.yaml", dump(config))
    peaks = {name: peak_apart(name, output / "config.yaml") for name in SIDES}

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
        timed, counted = seconds[name][config.warmup :], flops(name, config)
        median = statistics.median(timed)
        results[name] = {
            "samples_per_second": config.batch_size / median, "seconds": timed, **peaks[name],
            "flops_per_step": counted, "share_of_limit": counted / median / limit,
        }  # fmt: skip
    mine, other = results["ours"], results["baseline"]
    compared = ("samples_per_second", "peak_bytes", "flops_per_step")
    results["ratio"] = {key: mine[key] / other[key] if other[key] else None for key in compared}
    results |= {"parts": parts, "limit_flops_per_second": limit, "dtype": str(dtype).removeprefix("torch.")}
    machine = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor()
    results["machine"] = {"device": machine or "cpu", "threads": torch.get_num_threads()}
    results["versions"] = {"lcm_kit": lcm_kit.__version__, "torch": torch.__version__}
    results["config"] = asdict(config)

    # -- Write -----------------------------------------------------------------------------------------------
    atomic_write(output / "results.json", json.dumps(results, indent=1) + "\n")
    show(results)
    return output / "results.json"


if __name__ == "__main__":  # as `peak_apart` runs this file
    wanted = load(Path(sys.argv[2]))
    assert isinstance(wanted, Speed)
    print(json.dumps(peak_here(sys.argv[1], wanted)))
