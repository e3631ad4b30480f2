"""What a guidance sweep recommends for a run's adapter, for the file's metadata and its card."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from lcm_kit.errors import UserError
from lcm_kit.export import metadata, untrusted
from lcm_kit.export.diffusers_format import HEADER
from lcm_kit.files import sha256_bytes
from lcm_kit.results import of_sweep

FOLDER = "sweep"  # within a run's folder, by default


@dataclass(frozen=True)
class Recommended:
    """Settings that were measured to serve best; all None where none can be recommended."""

    sentence: str
    sampler: str | None
    steps: int | None
    guidance_scale: float | None
    lora_weight: float | None
    reasons: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def sampler_name(self) -> str:
        """As apps call it."""
        return {"lcm": "LCM", "tcd": "TCD", "ddim": "DDIM, trailing timesteps"}.get(self.sampler or "", "")


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
