"""LoRAs into the weights of a base: a pipeline folder of diffusers like the base's, with their updates added.

Exact for every kind of update: the sum is float32 and rounded once to the weight's dtype.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lcm_kit.bases.source import read_json
from lcm_kit.errors import UserError
from lcm_kit.io.files import atomic_folder
from lcm_kit.lora import untrusted
from lcm_kit.lora.base_weights import BaseWeights, check_weight
from lcm_kit.lora.layers import PARTS, Lora
from lcm_kit.lora.merge import check_weights


class Change(NamedTuple):
    """Which tensor of the base changes."""

    name: str  # module
    end: str  # "weight" or "bias"


Plan = dict[Path, dict[str, Change]]  # a part's file, relative to the base: tensor -> what changes it
Weighted = Sequence[tuple[Lora, float]]


def fuse_into(
    loras: Sequence[Lora],
    weights: Sequence[float],
    base: Path,
    output: Path,
    *,
    variant: str | None = None,
    finish: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Write the diffusers pipeline `output`: the folder `base` with W + sum_i weight_i * update_i for each W.

    Norms and biases are added alike. Weights keep their dtype, file and header; the sum is float32 and
    rounded once. Of the parts that change, only the safetensors files of `variant` come along: other variants
    and formats would be the old weights. `finish` may change the new folder before it is at its place, where
    it is whole from the first moment. Raises `UserError`, writing nothing, if `output` exists, `base` is
    no such folder, it lacks a module or has it in another shape, or a sum overflows its dtype.
    """
    if os.path.lexists(output):
        raise UserError(f"{output} exists already; choose another output")
    check_weights(weights)
    index = read_json(base / "model_index.json", str(base))
    weighted = list(zip(loras, weights, strict=True))
    parts = [part for part in PARTS if any(part in lora.parts() for lora in loras)]
    plan = _plan(weighted, base, variant, parts)
    copies = list(_copies(base, index, parts))  # listed first: `output` may lie within `base`
    with atomic_folder(output) as temporary:
        for file in [*copies, *(file for file, changes in plan.items() if not changes)]:
            (temporary / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(base / file, temporary / file)  # the content of the hub cache's links
        for file, changes in plan.items():
            if changes:
                _fuse_file(base / file, temporary / file, changes, weighted)
        finish(temporary)


def _plan(weighted: Weighted, base: Path, variant: str | None, parts: Sequence[str]) -> Plan:
    """The files of the parts that change, and the tensors in each; reads the headers alone."""
    held = BaseWeights(base, variant)
    found: list[tuple[Path, str, Change]] = []
    for lora, _ in weighted:
        for name, update in lora.updates.items():
            home = held.home(name)
            check_weight(name, update.shape, home)
            found.append((home.file, home.key, Change(name, "weight")))
        for name, bias in lora.biases.items():
            home = held.home(name, "bias")
            check_weight(name, bias.shape, home)
            found.append((home.file, home.key, Change(name, "bias")))
    plan: Plan = {file: {} for part in parts for file in held.files(part)}
    for file, key, change in found:
        plan[file][key] = change
    return plan


def _copies(base: Path, index: Mapping[str, Any], changed: Collection[str]) -> Iterator[Path]:
    """What of a pipeline folder is copied as it is, relative to `base`, whose model_index.json is `index`.

    The hub's folders hold more: whole checkpoints beside model_index.json, other frameworks' and other
    variants' weights. None of them would have the LoRA. So the top level gives its texts and the parts that
    `index` names; a part that changes gives its JSON and Python files.
    """
    for entry in sorted(base.iterdir()):
        if entry.is_dir() and isinstance(index.get(entry.name), list):
            for file in sorted(entry.rglob("*")):
                text = file.suffix in (".json", ".py") and ".index." not in file.name
                hidden = any(part.startswith(".") for part in file.relative_to(base).parts)
                if file.is_file() and not hidden and (text or entry.name not in changed):
                    yield file.relative_to(base)
        elif entry.is_file() and _is_text(entry):
            yield entry.relative_to(base)


def _is_text(file: Path) -> bool:
    licence = not file.suffix and not file.name.startswith(".")
    return licence or file.suffix in (".json", ".md", ".txt", ".py")


def _fuse_file(source: Path, target: Path, changes: Mapping[str, Change], weighted: Weighted) -> None:
    """Copy a safetensors file with the updates in `changes` (by tensor) added."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with safe_open(source, framework="pt") as file:
            header = {"format": "pt"} | (file.metadata() or {})
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        for key, change in changes.items():
            tensors[key] = _added(change, tensors[key], weighted)
        save_file(tensors, target, metadata=header)
    except SafetensorError as error:  # also where the disk is full: safetensors raises no OSError
        raise UserError(f"{source} cannot be copied with its changes ({error}); free some space") from error


def _added(change: Change, weight: Tensor, weighted: Weighted) -> Tensor:
    """weight + sum_i weight_i * update_i, in the weight's dtype; each update sees the base's own weight."""
    exact = weight.float()
    for lora, strength in weighted:
        if (delta := _delta(change, weight, lora)) is not None:
            exact = exact + strength * delta.reshape(weight.shape)
    if not torch.isfinite(exact).all():
        raise UserError(f"{change.name}: its update holds NaN or Inf; take a file from an earlier checkpoint")
    rounded = exact.to(weight.dtype)
    if untrusted.not_finite({change.name: rounded}):
        raise UserError(
            f"{change.name}: its sum, up to {float(exact.abs().max()):.3g}, overflows the base's "
            f"{str(weight.dtype).removeprefix('torch.')}; take smaller weights or a base in float32"
        )
    return rounded


def _delta(change: Change, weight: Tensor, lora: Lora) -> Tensor | None:
    if change.end == "bias":
        return lora.biases.get(change.name)
    update = lora.layers.get(change.name) or lora.others.get(change.name)
    return None if update is None else update.delta(weight.float().reshape(update.shape))
