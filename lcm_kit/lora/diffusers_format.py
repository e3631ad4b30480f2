"""The LoRA file of diffusers: raw peft keys behind the part's name, and the LoRA's config in the header.

The header matters: without `lora_adapter_metadata` diffusers takes alpha = rank, and a LoRA of rank 8 and
alpha 16 comes back at half its strength. Raw keys matter too: diffusers looks at the first key of a file to
tell its style, and drops without a word what is spelled otherwise.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from torch import Tensor

from lcm_kit.lora.layers import Layer, Lora
from lcm_kit.lora.structure import Structure

FILE = "pytorch_lora_weights.safetensors"  # the name that diffusers looks for in a folder
HEADER = "lora_adapter_metadata"


def as_written(lora: Lora) -> Lora:
    """The LoRA as this format can hold it: any."""
    return lora


def tensors(lora: Lora, structure: Structure) -> dict[str, Tensor]:
    """`unet.<module>.lora_A.weight` and `.lora_B.weight`."""
    found = {}
    for name, layer in lora.layers.items():
        found[f"{name}.lora_A.weight"] = layer.down
        found[f"{name}.lora_B.weight"] = layer.up
    return found


def header(lora: Lora) -> dict[str, str]:
    """What `load_lora_weights` needs besides the tensors: rank, alpha and targets of each part.

    No more than that: a key that a user's older peft does not know would be refused there.
    """
    settings: dict[str, Any] = {}
    for part in lora.parts():
        layers = {_target(k, part): layer for k, layer in lora.layers.items() if k.startswith(f"{part}.")}
        settings |= {f"{part}.{key}": value for key, value in _peft(layers).items()}
    return {HEADER: json.dumps(settings, sort_keys=True)}


def _target(name: str, part: str) -> str:
    # transformers 5 dropped `text_model.` from CLIPTextModel; peft matches endings, so this fits both
    return name.removeprefix(f"{part}.").removeprefix("text_model.")


def _peft(layers: dict[str, Layer]) -> dict[str, Any]:
    rank = Counter(layer.rank for layer in layers.values()).most_common(1)[0][0]
    alpha = Counter(layer.alpha for layer in layers.values()).most_common(1)[0][0]
    return {
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(layers),
        "rank_pattern": {name: layer.rank for name, layer in layers.items() if layer.rank != rank},
        "alpha_pattern": {name: layer.alpha for name, layer in layers.items() if layer.alpha != alpha},
    }
