"""What a guidance sweep recommends for a run's adapter, for the file's metadata and its card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from lcm_kit import console
from lcm_kit.config.resolution import read, shown
from lcm_kit.core.methods import DEFAULT, MethodInfo
from lcm_kit.errors import UserError
from lcm_kit.evaluation.results import decoded, of_sweep
from lcm_kit.io.files import sha256_bytes
from lcm_kit.lora import metadata, untrusted
from lcm_kit.lora.diffusers_format import HEADER
from lcm_kit.lora.metadata_reading import provenance_from_header
from lcm_kit.lora.provenance import Recommended

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
    if name is None or found is None or found["adapter"] not in (name, None):
        return None
    warnings = tuple(each["sentence"] for each in found["warnings"] if each["adapter"] == name)
    if told := decoded(results):
        warnings = (f"It was measured on pictures that are {told}.", *warnings)
    return Recommended(
        found["sentence"], found["sampler"], found["steps"], found["guidance_scale"], found["lora_weight"],
        tuple(found["reasons"]), warnings,
        at=shown(read(size)) if isinstance(size := results["resolution"], list) else None,
    )  # fmt: skip


def require(run: Path, file: Path) -> Recommended:
    """`of_run`, or a `UserError` that says what to do."""
    found = of_run(run, file) if file.is_file() else None
    if found is None:
        raise UserError(
            f"{run / FOLDER} holds no sweep of these weights; run `lcm-kit evaluate "
            f"evaluation/guidance_sweep adapters='[{run}]'` first"
        )
    return found


def method_of(file: Path) -> MethodInfo:
    """How a LoRA file is drawn in few steps, as its header says of the method that made it."""
    return provenance_from_header(untrusted.inspect(file).metadata, file.stem).student


def of_adapter(adapter: Path, file: Path) -> Recommended | None:
    """What was measured to serve best for a run's folder or a LoRA file; None if nothing was.

    `file`: what `adapter_file` says of `adapter`. A sweep's results that cannot be read are named in a line,
    and what the file's own header says is taken: it is advice, without which there are defaults.
    """
    try:
        swept = of_run(adapter, file) if adapter.is_dir() else None
    except UserError as error:
        console.say(f"the sweep's recommendation is left out: {error}")
        swept = None
    return swept or provenance_from_header(untrusted.inspect(file).metadata, file.stem).recommended


class Settings(NamedTuple):
    """How a picture is drawn: by default what serves an LCM-LoRA."""

    sampler: str = DEFAULT.sampler
    steps: int = DEFAULT.usual_steps
    guidance_scale: float = 1.0
    lora_weight: float = 1.0

    def __str__(self) -> str:
        """In words."""
        how = f"{self.sampler}, {self.steps} steps, guidance_scale {self.guidance_scale:g}"
        return f"{how}, LoRA weight {self.lora_weight:g}"


def misfit(use: Settings, method: MethodInfo) -> str | None:
    """What is to be said where a LoRA is drawn in another number of steps than the one that it serves."""
    if method.only_steps in (None, use.steps):
        return None
    n = method.only_steps
    return (
        f"{method.title} made it for {n} step{'s'[: n != 1]} and no other number: with {use.steps} they "
        "begin and end where it was not trained to"
    )


def no_negative(adapter: Path | str, usual: float | None) -> str:
    """What is wrong with a negative prompt at guidance_scale 1; `usual`: `MethodInfo.guidance_scale`."""
    if usual is None:
        way = "give one above 1 (up to about 2 where guidance is baked in, to which it adds)"
    else:
        way = f"give one above 1, as {max(usual, 2):g}: no guidance is baked in"
    return (
        f"a negative prompt does nothing at guidance_scale 1, which {adapter} is drawn at; {way}, or leave "
        "it out"
    )


def settings(use: Recommended | None, method: MethodInfo = DEFAULT, **asked: Any) -> Settings:
    """What was asked for, by name; where that is None what `use` recommends, else what serves `method`."""
    known: dict[str, Any] = {
        "sampler": method.sampler, "steps": method.usual_steps, "guidance_scale": method.usual_guidance,
    }  # fmt: skip
    if use and use.steps:
        known = {"sampler": use.sampler, "steps": use.steps, "guidance_scale": use.guidance_scale}
        known["lora_weight"] = use.lora_weight
    return Settings(**known | {name: value for name, value in asked.items() if value is not None})
