"""The LoRA file of kohya's sd-scripts, which ComfyUI, A1111, Forge, InvokeAI and diffusers all read.

`lora_unet_<module with _>.lora_down.weight`, `.lora_up.weight` and `.alpha`; SDXL's UNet in the original
spelling (`lcm_kit.export.names`). Source: sd-scripts, `networks/lora.py`.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from lcm_kit.export.lora import Layer, Lora
from lcm_kit.export.structure import Structure


def as_written(lora: Lora) -> Lora:
    """The LoRA with one alpha for all layers, the rest of their strength moved into the up weights.

    diffusers (0.42) reads the alphas of a kohya file whose alphas differ under names that do not exist and
    leaves attention layers at the wrong strength; a single alpha it reads right, also with mixed ranks.
    """
    counts = Counter(layer.alpha for layer in lora.layers.values() if layer.alpha > 0)
    alpha = counts.most_common(1)[0][0] if counts else 1.0

    def even(layer: Layer) -> Layer:
        if layer.alpha == alpha:
            return layer
        return Layer(layer.down, (layer.up.float() * (layer.alpha / alpha)).to(layer.up.dtype), alpha)

    return Lora({name: even(layer) for name, layer in lora.layers.items()}, lora.metadata)


def tensors(lora: Lora, structure: Structure) -> dict[str, Tensor]:
    """Three tensors a module; alpha is float32 whatever the weights are, so that no strength is rounded."""
    found = {}
    for name, layer in lora.layers.items():
        key = structure.kohya[name]
        found[f"{key}.lora_down.weight"] = layer.down
        found[f"{key}.lora_up.weight"] = layer.up
        found[f"{key}.alpha"] = torch.tensor(layer.alpha, dtype=torch.float32)
    return found


def header(lora: Lora) -> dict[str, str]:
    """Nothing of its own: diffusers refuses a file that has alphas and `lora_adapter_metadata` as well."""
    return {}
