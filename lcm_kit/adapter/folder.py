"""The folder of a trained adapter: its weights, and what says how they were made."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lcm_kit.adapter.adapted_unet import AdaptedUNet
from lcm_kit.errors import UserError
from lcm_kit.io import own_files
from lcm_kit.io.files import atomic_folder
from lcm_kit.lora import provenance

WEIGHTS, FACTS = "lora.safetensors", "adapter.json"  # the files of an adapter folder


def save_adapter(
    folder: Path,
    adapted: AdaptedUNet,
    facts: provenance.Provenance,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write `lora.safetensors` and `adapter.json` (`facts`, and `AdaptedUNet.peft_configs`).

    `weights`: those of `adapted`, where they are sharded and had to be put together by all processes.
    """
    with atomic_folder(folder) as temporary:
        own_files.write_tensors(temporary / WEIGHTS, adapted.state() if weights is None else weights)
        own_files.write_json(temporary / FACTS, provenance.trained(facts, **adapted.peft_configs()))


def read_provenance(folder: Path) -> provenance.Trained:
    """`adapter.json` of an adapter folder.

    Raises `UserError` if the folder holds no finished adapter, or one of a kit that says more.
    """
    if not (folder / FACTS).is_file() or not (folder / WEIGHTS).is_file():
        raise UserError(f"{folder}: there is no trained adapter; run `lcm-kit train` to its end first")
    return own_files.read_json(folder / FACTS, provenance.Trained, _again(folder))


def base_of(facts: provenance.Trained) -> dict[str, Any]:
    """`path`, `revision` and `variant` of the base that an adapter was trained on."""
    base = facts.base
    return {"path": base.path, "revision": base.revision, "variant": base.variant}


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The weights of an adapter folder, as `save_adapter` had them. Raises `UserError` for damaged ones."""
    return own_files.read_tensors(folder / WEIGHTS, _again(folder))


def is_of_these_weights(run: Path, name: str) -> bool:
    """Whether the run has such an evaluation, and not one from before its last training."""
    file, weights = run / name, run / "adapter" / WEIGHTS
    return file.is_file() and not (weights.is_file() and file.stat().st_mtime < weights.stat().st_mtime)


def _again(folder: Path) -> str:
    """What makes an adapter folder anew: that of a run, or of the steps of it that were best."""
    if folder.name == "adapter":
        run, then = folder.parent, "makes it anew from the last state"
    else:
        run, then = folder.parent.parent, "keeps another step's weights"
    return f"remove {folder} and run `lcm-kit train {run / 'config.yaml'}`, which {then}"
