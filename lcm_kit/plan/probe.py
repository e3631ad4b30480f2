"""Two real training steps, with random weights if the base's are not there; then export and reload.

    python -m lcm_kit.plan.probe CONFIG.yaml [STRUCTURE]

runs in a process of its own, so that its peak is its own: the last line it prints is a JSON object.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lcm_kit import families, memory, runtime, stepping
from lcm_kit.adapter import add_lora, lora_state, swapped, teacher, update_ema
from lcm_kit.config.load import dump, load
from lcm_kit.config.schema import Adapter, Distill, Logging, Memory
from lcm_kit.errors import UserError
from lcm_kit.export.structure import empty_unet
from lcm_kit.families.condition import Condition
from lcm_kit.files import atomic_write
from lcm_kit.guidance import guide
from lcm_kit.losses import LOSSES
from lcm_kit.methods import METHODS, Times
from lcm_kit.plan import subject
from lcm_kit.plan.subject import Subject
from lcm_kit.prediction import predictor
from lcm_kit.schedule import Schedule
from lcm_kit.solvers import SOLVERS
from lcm_kit.step import consistency_loss

STEPS = 2
_MICRO_BATCHES = 2  # of a step with accumulation: the second has the gradients of the first
_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
# glibc then gives back what is freed, and one arena holds it all
_MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1",
}  # fmt: skip
_SMALL = {
    "sample_size": 8, "block_out_channels": (32, 64), "layers_per_block": 1, "cross_attention_dim": 32,
    "attention_head_dim": 8, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip


@dataclass(frozen=True)
class Probe:
    """What two steps measured."""

    device: str
    weights: str  # real or random
    seconds: float  # of the second step
    peak: int | None  # bytes: CUDA's, or resident ones beyond the libraries'; None: the system does not say
    phases: dict[str, int]  # the same in each phase; nothing if the system cannot tell
    micro: int  # samples a forward: fewer than batch_size if memory ran out
    exported: int  # modules that came back from the file as they were


def run(config: Distill, structure: str | None) -> Probe:
    """Probe `config` in a process of its own. Raises `UserError` if that does not come to its end."""
    with tempfile.TemporaryDirectory(prefix="lcm-kit-probe-") as folder:
        file = Path(folder) / "config.yaml"
        tried = replace(config, output=folder, logging=Logging(trackers=()))
        atomic_write(file, dump(tried))
        command = [sys.executable, "-m", "lcm_kit.plan.probe", str(file), *([structure] if structure else [])]
        path = {"PYTHONPATH": str(Path(__file__).parents[2])}
        environment = {**os.environ, **_MALLOC, **path}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise UserError(
            f"the probe ended with {done.returncode} ({said[-1] if said else 'it was killed: no memory?'}); "
            "see what the plan says to change"
        )
    return Probe(**json.loads(done.stdout.splitlines()[-1]))


# -- In the process ------------------------------------------------------------------------------------------


def random_unet(config: Any, dtype: torch.dtype) -> Any:
    """A UNet of this configuration with random weights, on the CPU, frozen; never twice in memory."""
    unet = empty_unet(config)
    for p in unet.parameters():
        p.data = p.data.to(dtype)
    unet.to_empty(device="cpu")
    with torch.no_grad():
        for name, p in unet.named_parameters():
            if p.ndim > 1:
                p.uniform_(-1, 1).mul_((3 / p[0].numel()) ** 0.5)
            else:
                p.fill_(float(name.endswith("weight")))
    return unet


@dataclass
class Meter:
    """The highest memory in each phase: CUDA's own count, else the kernel's of resident bytes."""

    cuda: bool
    before: int = 0  # bytes that are not the run's
    peaks: dict[str, int] = field(default_factory=dict)
    most: int | None = None
    _now: str | None = None

    def start(self, phase: str | None) -> None:
        """From here on it is `phase`; None: nothing that counts."""
        held = torch.cuda.max_memory_allocated() if self.cuda else _resident("VmHWM")
        if self._now and held is not None:
            held -= self.before
            self.most = max(held, self.most or 0)
            self.peaks[self._now] = max(held, self.peaks.get(self._now, 0))
        self._now = phase
        if not _forget_peak(self.cuda):
            self.peaks = {}  # they would be those of the run so far


def _forget_peak(cuda: bool) -> bool:
    """Whether the highest memory counts from here on."""
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): VmHWM becomes VmRSS
    except OSError:
        return False
    return True


def _resident(key: str) -> int | None:
    """Bytes that /proc calls VmRSS (held now) or VmHWM (held at most); None where there is no /proc."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), None)


@dataclass(frozen=True)
class _Trial:
    """The step of train/distill on random latents and conditions."""

    config: Distill
    accelerator: Any
    unet: Any
    lora: list[nn.Parameter]
    ema: list[Tensor]
    optimizer: Any
    latents: Tensor
    condition: Condition
    tables: Schedule
    kind: str  # of the UNet's output
    meter: Meter

    def losses(self, part: slice) -> Tensor:
        """Losses of the samples in `part`."""
        config, device = self.config, self.accelerator.device
        dtype = runtime.dtype(self.accelerator)
        condition = self.condition[part].to(device, dtype)
        x0 = self.latents[part].to(device)
        n = len(x0)
        empty = self.condition[0].to(device, dtype).expand(n).sized_as(condition)

        def call(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
            return self.unet(x.to(dtype), t, **condition.kwargs()).sample

        def as_teacher(x: Tensor, t: Tensor) -> Tensor:
            self.meter.start("teacher pass")
            with teacher(self.unet):
                both = Condition.cat([empty, condition])
                uncond, cond = call(x.repeat(2, 1, 1, 1), t.repeat(2), both).chunk(2)
            return guide(uncond, cond, config.guidance.max)

        def as_target(x: Tensor, t: Tensor) -> Tensor:
            self.meter.start("target pass")
            with swapped(self.lora, self.ema or self.lora):
                return call(x, t, condition)

        def as_student(x: Tensor, t: Tensor) -> Tensor:
            self.meter.start("student pass")  # until the gradients are clipped
            return call(x, t, condition)

        method = METHODS[config.method.name](config.method.sigma_data, config.method.timestep_scaling)
        times = method.times(self.tables, config.grid.steps, n, torch.Generator().manual_seed(0))
        schedule = self.tables.to(device)
        predict = partial(predictor, schedule=schedule, kind=self.kind)
        return consistency_loss(
            method=method, solver=SOLVERS[config.solver], schedule=schedule,
            loss=lambda a, b: LOSSES[config.loss.name](a, b, config.loss.c),
            teacher=predict(as_teacher), target=predict(as_target), student=predict(as_student),
            x0=x0, noise=torch.randn(x0.shape).to(device), times=Times(*times).to(device),
        )  # fmt: skip

    def step(self) -> tuple[float, int]:
        """One optimizer step: its seconds with all of its micro-batches, and samples a forward."""
        config = self.config
        passes = stepping.Passes(
            self.accelerator, self.unet, self.lora, len(self.latents), config.batch_size,
            config.optimizer.grad_clip,
        )  # fmt: skip
        start = self._clock()
        passes(1, self.losses)
        middle = self._clock()
        self.meter.start("optimizer step")
        self.optimizer.step()
        if self.ema:
            update_ema(self.ema, self.lora, config.ema)
        self.optimizer.zero_grad()
        left_out = config.batch_size * config.accumulation / len(self.latents)
        seconds = (middle - start) * left_out + self._clock() - middle
        self.meter.start(None)
        return seconds, passes.micro

    def _clock(self) -> float:
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def _trial(config: Distill, accelerator: Any, found: Subject, unet_config: Any, meter: Meter) -> _Trial:
    device, dtype = accelerator.device, runtime.dtype(accelerator)
    tables, kind = Schedule.from_config(_BETAS), "v_prediction"
    meter.start("loading")
    if found.folder is None:
        unet = memory.place(random_unet(unet_config, dtype), config, device)
    else:
        base = families.inspect_base(str(found.folder), variant=config.base.variant)
        unet = memory.load_unet(base, config, device, dtype)
        tables, kind = Schedule.from_config(base.scheduler_config), base.prediction_type
    meter.start(None)
    lora = add_lora(unet, config.adapter, seed=0)
    made = memory.make_optimizer(lora, config.optimizer, device)
    unet, optimizer = runtime.prepare(accelerator, unet, made)
    lora = [p for p in unet.parameters() if p.requires_grad]
    ema = [p.detach().clone() for p in lora] if config.ema else []
    n = config.batch_size * min(config.accumulation, _MICRO_BATCHES)
    side = config.data.resolution // found.structure.factor
    pooled = torch.randn(n, found.pooled) if found.pooled else None
    time_ids = torch.full((n, 6), float(config.data.resolution)) if found.pooled else None
    condition = Condition(torch.randn(n, found.tokens, unet_config["cross_attention_dim"]), pooled, time_ids)
    latents = torch.randn(n, 4, side, side)
    return _Trial(
        config, accelerator, unet, lora, ema, optimizer, latents, condition, tables, kind, meter
    )  # fmt: skip


def _warm(config: Distill, accelerator: Any) -> None:
    """A step of next to nothing: loads the libraries, whose memory is not the run's."""
    small = replace(
        config, batch_size=1, accumulation=1, adapter=Adapter(1, 1.0), memory=Memory(tf32=config.memory.tf32),
        data=replace(config.data, resolution=64),
    )  # fmt: skip
    meter = Meter(accelerator.device.type == "cuda")
    _trial(small, accelerator, subject.published("sd1"), _SMALL, meter).step()


def _export(trial: _Trial, found: Subject, folder: Path) -> int:
    """Write the adapter in kohya's style, read it back, hold it against the structure and the apps' rules."""
    from lcm_kit.export import metadata, verify, write
    from lcm_kit.export.apps import APPS
    from lcm_kit.export.lora import Layer, Lora

    state, alpha = lora_state(trial.unet), trial.config.adapter.alpha
    names = [key.removesuffix(".lora_A.weight") for key in state if key.endswith(".lora_A.weight")]
    lora = Lora({
        f"unet.{n}": Layer(state[f"{n}.lora_A.weight"], state[f"{n}.lora_B.weight"], alpha) for n in names
    })  # fmt: skip
    file = folder / "probe.safetensors"
    write.write(file, lora, found.structure, "kohya", "float32", metadata.Facts("probe"))
    report = verify.verify(file, verify.Against(found.structure), apps=tuple(APPS))
    held = report.file.lora.layers
    same = [n for n in lora.layers if n in held and torch.equal(held[n].up, lora.layers[n].up)]
    same = [n for n in same if torch.equal(held[n].down, lora.layers[n].down)]
    if not report.ok or len(same) != len(lora.layers):
        raise UserError(f"the adapter does not come back whole: {len(same)} of {len(lora.layers)} modules")
    return len(same)


def measure(config: Distill, structure: str | None) -> Probe:
    """The probe itself, in this process."""
    found = subject.find(config.base, structure)
    accelerator = runtime.start(config)
    _warm(config, accelerator)
    cuda = accelerator.device.type == "cuda"
    meter = Meter(cuda, 0 if cuda else _resident("VmRSS") or 0)
    trial = _trial(config, accelerator, found, found.unet_config, meter)
    for _ in range(STEPS):  # the first makes the optimizer's moments, the second works beside them
        seconds, micro = trial.step()
    return Probe(
        accelerator.device.type, "random" if found.folder is None else "real", seconds, meter.most,
        meter.peaks, micro, _export(trial, found, Path(config.output)),
    )  # fmt: skip


if __name__ == "__main__":
    wanted = load(Path(sys.argv[1]))
    assert isinstance(wanted, Distill)
    try:
        result = measure(wanted, sys.argv[2] if len(sys.argv) > 2 else None)
    except UserError as error:
        sys.exit(str(error))
    print(json.dumps(vars(result)))
