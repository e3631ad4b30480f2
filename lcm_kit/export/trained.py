"""The adapter of a run, as a `Lora`."""

from __future__ import annotations

from pathlib import Path

from lcm_kit import adapter
from lcm_kit.errors import UserError
from lcm_kit.export.lora import Layer, Lora
from lcm_kit.export.structure import Structure


def read(folder: Path, structure: Structure) -> Lora:
    """The float32 weights of adapter folder `folder`, in the order of the base's modules.

    Raises `UserError` if there is no finished adapter or it was made for another base.
    """
    from safetensors.torch import load_file

    config = adapter.read_facts(folder)["lora_config"]
    weights = load_file(folder / adapter.WEIGHTS)
    names = {key.rsplit(".lora_", 1)[0] for key in weights}
    if odd := sorted(names - structure.unet.keys()):
        raise UserError(
            f"{folder}: {len(odd)} of its modules are not in the base {structure.label!r}, such as {odd[0]}; "
            "give the base that it was trained on"
        )
    alpha, pattern = config["lora_alpha"], config.get("alpha_pattern") or {}
    return Lora(
        {
            f"unet.{name}": Layer(
                weights[f"{name}.lora_A.weight"],
                weights[f"{name}.lora_B.weight"],
                float(pattern.get(name, alpha)),
            )
            for name in structure.unet
            if name in names
        }
    )
