"""The LoRA file of kohya's sd-scripts, which ComfyUI, A1111, Forge, InvokeAI and diffusers all read.

`lora_unet_<module with _>.lora_down.weight`, `.lora_up.weight` and `.alpha`; SDXL's UNet in the original
spelling (`lcm_kit.lora.names`). Source: sd-scripts, `networks/lora.py`.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from lcm_kit.lora.layers import Layer, Lora
from lcm_kit.lora.structure import Structure

_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")


def as_written(lora: Lora) -> Lora:
    """The LoRA with one alpha for all layers, and with the attentions of text encoders whole.

    diffusers (0.42) reads the alphas of a kohya file whose alphas differ under names that do not exist and
    leaves attention layers at the wrong strength; a single alpha it reads right, also with mixed ranks. So
    the rest of a layer's strength is moved into its up weights. Of a text encoder it drops q, k and v where
    no layer has an out_proj, and A1111 drops those of an OpenCLIP attention that lacks any of the four: what
    is missing gets a layer of zeros.
    """
    lora = _whole_attentions(lora)
    counts = Counter(layer.alpha for layer in lora.layers.values() if layer.alpha > 0)
    alpha = counts.most_common(1)[0][0] if counts else 1.0

    def even(layer: Layer) -> Layer:
        if layer.alpha == alpha:
            return layer
        return Layer(layer.down, (layer.up.float() * (layer.alpha / alpha)).to(layer.up.dtype), alpha)

    return Lora({name: even(layer) for name, layer in lora.layers.items()}, lora.metadata)


def _whole_attentions(lora: Lora) -> Lora:
    """With zeros for those of q, k, v and out that a text encoder's attention lacks beside the others."""
    layers = dict(lora.layers)
    for name, layer in lora.layers.items():
        place, found, _ = name.partition(".self_attn.")
        if found:
            for end in _ATTENTION:
                layers.setdefault(f"{place}{found}{end}", _zeros(layer))
    return Lora(layers, lora.metadata)


def _zeros(like: Layer) -> Layer:
    """A layer of rank 1 that changes nothing; the four of an attention are square and of one size."""
    down, up = like.down[:1], like.up[:, :1]
    return Layer(torch.zeros_like(down), torch.zeros_like(up), like.alpha)


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
