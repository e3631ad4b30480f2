"""The adapter of a run, as a `Lora`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lcm_kit.adapter import folder as adapter
from lcm_kit.errors import UserError
from lcm_kit.lora.layers import Layer, Lora
from lcm_kit.lora.structure import Structure


def read(folder: Path, structure: Structure) -> Lora:
    """The float32 weights of adapter folder `folder`, in the order of the base's modules.

    The UNet's and, where they were trained, the text encoders'.

    Raises `UserError` if there is no finished adapter or it was made for another base.
    """
    facts = adapter.read_provenance(folder)
    configs = {"unet": facts.lora_config, **facts.text_lora_config}
    weights = {_full(key): tensor for key, tensor in adapter.read_weights(folder).items()}
    names = {key.rsplit(".lora_", 1)[0] for key in weights}
    if odd := sorted(names - structure.modules.keys()):
        raise UserError(
            f"{folder}: {len(odd)} of its modules are not in the base {structure.label!r}, such as {odd[0]}; "
            "give the base that it was trained on"
        )
    return Lora(
        {
            name: Layer(
                weights[f"{name}.lora_A.weight"], weights[f"{name}.lora_B.weight"], _alpha(name, configs)
            )
            for name in structure.modules
            if name in names
        }
    )


def _full(key: str) -> str:
    """A key with its part in front, which the UNet's have not."""
    return key if key.startswith("text_encoder") else f"unet.{key}"


def _alpha(name: str, configs: Mapping[str, Any]) -> float:
    part, _, module = name.partition(".")
    pattern = configs[part].get("alpha_pattern") or {}
    return float(pattern.get(module, configs[part]["lora_alpha"]))
