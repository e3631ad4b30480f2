"""What a guidance sweep recommends for a run's adapter, for the file's metadata and its card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from lcm_kit.errors import UserError
from lcm_kit.export import metadata, untrusted
from lcm_kit.export.diffusers_format import HEADER
from lcm_kit.export.facts import Recommended, facts_from
from lcm_kit.files import sha256_bytes
from lcm_kit.lora_file import adapter_file
from lcm_kit.results import of_sweep

FOLDER = "sweep"  # within a run's folder, by default


def weights_hash(file: Path) -> str:
    """Of what a LoRA file does: its tensors, and the strength that its header may say; no other metadata."""
    tensors, known = untrusted.read(file)
    return sha256_bytes(json.dumps([metadata.tensor_hash(tensors), known.get(HEADER)]).encode())


def of_run(run: Path, file: Path) -> Recommended | None:
    """What the sweep in `run/sweep` says of `file`; None if there is no sweep, or it is of other weights."""
    results = of_sweep(run / FOLDER)
    if results is None:
        return None
    mine = weights_hash(file)
    name = next((each["name"] for each in results["adapters"] if each["weights"] == mine), None)
    found = results["recommended"]
    if name is None or found["adapter"] not in (name, None):
        return None
    warnings = tuple(each["sentence"] for each in found["warnings"] if each["adapter"] == name)
    return Recommended(
        found["sentence"], found["sampler"], found["steps"], found["guidance_scale"], found["lora_weight"],
        tuple(found["reasons"]), warnings,
    )  # fmt: skip


def insist(run: Path, file: Path) -> Recommended:
    """`of_run`, or a `UserError` that says what to do."""
    found = of_run(run, file) if file.is_file() else None
    if found is None:
        raise UserError(
            f"{run / FOLDER} holds no sweep of these weights; run `lcm-kit evaluate "
            f"evaluation/guidance_sweep adapters='[{run}]'` first"
        )
    return found


def of_adapter(adapter: Path) -> Recommended | None:
    """What was measured to serve best for a run's folder or a LoRA file; None if nothing was."""
    file = adapter_file(adapter)
    return (of_run(adapter, file) if adapter.is_dir() else None) or facts_from(
        untrusted.inspect(file).metadata, file.stem
    ).recommended


class Settings(NamedTuple):
    """How a picture is drawn."""

    solver: str
    steps: int
    guidance_scale: float
    lora_weight: float

    def __str__(self) -> str:
        """In words."""
        how = f"{self.solver}, {self.steps} steps, guidance_scale {self.guidance_scale:g}"
        return f"{how}, LoRA weight {self.lora_weight:g}"


def settings(
    use: Recommended | None,
    solver: str | None,
    steps: int | None,
    guidance_scale: float | None,
    lora_weight: float | None,
) -> Settings:
    """What was asked for; where nothing was, what `use` recommends, and else what serves an LCM-LoRA."""
    known = use if use and use.steps else Recommended("", "lcm", 4, 1.0, 1.0)
    asked = (solver, steps, guidance_scale, lora_weight)
    kept = (known.sampler, known.steps, known.guidance_scale, known.lora_weight)
    return Settings(*(b if a is None else a for a, b in zip(asked, kept, strict=True)))  # type: ignore[arg-type]
