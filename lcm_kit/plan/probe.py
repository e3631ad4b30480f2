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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lcm_kit import families
from lcm_kit.bases import compiling
from lcm_kit.config.load import dump, load
from lcm_kit.config.schema import Adapter, Logging, Memory, Training
from lcm_kit.errors import UserError
from lcm_kit.io.files import atomic_write
from lcm_kit.plan import base_profile, style, trial
from lcm_kit.plan.base_profile import BaseProfile
from lcm_kit.plan.meter import Meter, resident
from lcm_kit.plan.trial import Trial
from lcm_kit.training import runtime

STEPS = 2
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
    first: float  # of the first, which compiles if blocks are
    compiled: bool  # whether they are
    peak: int | None  # bytes: CUDA's, or resident ones beyond the libraries'; None: the system does not say
    phases: dict[str, int]  # the same in each phase; nothing if the system cannot tell
    micro: int  # samples a forward: fewer than batch_size if memory ran out
    exported: int  # modules that came back from the file as they were


def run(config: Training, structure: str | None) -> Probe:
    """Probe `config` in a process of its own. Raises `UserError` if that does not come to its end."""
    with tempfile.TemporaryDirectory(prefix="lcm-kit-probe-") as folder:
        file = Path(folder) / "config.yaml"
        tried = replace(config, output=folder, logging=Logging(trackers=()))
        atomic_write(file, dump(tried))
        command = [sys.executable, "-m", "lcm_kit.plan.probe", str(file), *([structure] if structure else [])]
        path = {"PYTHONPATH": str(Path(__file__).parents[2])}
        environment = {**os.environ, **path}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise UserError(
            f"the probe ended with {done.returncode} ({said[-1] if said else 'it was killed: no memory?'}); "
            "see what the plan says to change"
        )
    return Probe(**json.loads(done.stdout.splitlines()[-1]))


# -- In the process ------------------------------------------------------------------------------------------


def _warm(config: Training, accelerator: Any) -> None:
    """A step of next to nothing: loads the libraries, whose memory is not the run's."""
    small = replace(
        config, batch_size=1, accumulation=1, adapter=Adapter(1, 1.0),
        memory=Memory(tf32=config.memory.tf32, compile=False),
        data=replace(config.data, resolution=64),
    )  # fmt: skip
    meter = Meter(accelerator.device.type == "cuda")
    trial.make(small, accelerator, base_profile.published(families.names()[0]), _SMALL, meter).step()


def _export(trial: Trial, found: BaseProfile, folder: Path) -> int:
    """Write the adapter in kohya's style, read it back, hold it against the structure and the apps' rules."""
    from lcm_kit.lora import verify, write
    from lcm_kit.lora.apps import WHOLE
    from lcm_kit.lora.layers import Layer, Lora
    from lcm_kit.lora.provenance import Provenance

    state, alpha = trial.adapted.state(), trial.config.adapter.alpha
    names = [key.removesuffix(".lora_A.weight") for key in state if key.endswith(".lora_A.weight")]
    lora = Lora({
        f"unet.{n}": Layer(state[f"{n}.lora_A.weight"], state[f"{n}.lora_B.weight"], alpha) for n in names
    })  # fmt: skip
    file = folder / "probe.safetensors"
    write.write(file, lora, found.structure, "kohya", "float32", Provenance("probe"))
    report = verify.verify(file, verify.Against(found.structure), apps=WHOLE)
    held = report.file.lora.layers
    same = [n for n in lora.layers if n in held and torch.equal(held[n].up, lora.layers[n].up)]
    same = [n for n in same if torch.equal(held[n].down, lora.layers[n].down)]
    if not report.ok or len(same) != len(lora.layers):
        raise UserError(f"the adapter does not come back whole: {len(same)} of {len(lora.layers)} modules")
    return len(same)


def measure(config: Training, structure: str | None) -> Probe:
    """The probe itself, in this process."""
    found = base_profile.find(config.base, structure)
    accelerator = runtime.start(config)
    _warm(config, accelerator)
    cuda = accelerator.device.type == "cuda"
    meter = Meter(cuda, 0 if cuda else resident("VmRSS") or 0)
    teacher_lora, _ = style.find(config, found.structure)
    tried = trial.make(config, accelerator, found, found.unet_config, meter, teacher_lora)
    # the first makes the optimizer's moments, beside which the second works; and compiles
    (first, _), (seconds, micro) = (tried.step() for _ in range(STEPS))
    return Probe(
        accelerator.device.type, "random" if found.folder is None else "real", seconds, first,
        compiling.wants(config, accelerator.device), meter.most,
        meter.peaks, micro, _export(tried, found, Path(config.output)),
    )  # fmt: skip


if __name__ == "__main__":
    wanted = load(Path(sys.argv[1]), imports=True)
    assert isinstance(wanted, Training)
    try:
        result = measure(wanted, sys.argv[2] if len(sys.argv) > 2 else None)
    except UserError as error:
        sys.exit(str(error))
    sys.stdout.write(json.dumps(vars(result)) + "\n")
