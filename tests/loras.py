"""LoRAs with random weights for the modules of a structure, and the UNet that has one fused by arithmetic."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from lcm_kit.bases import lora_targets
from lcm_kit.lora.layers import Layer, Lora
from lcm_kit.lora.structure import Structure


def lcm_modules(structure: Structure) -> list[str]:
    """The UNet's modules that LCM-LoRA adapts, by the rule of peft: the name ends with a target."""
    endings = tuple("." + target for target in lora_targets("lcm"))
    return [name for name in structure.modules if name.startswith("unet.") and name.endswith(endings)]


def text_modules(structure: Structure) -> list[str]:
    """All text encoder modules that a LoRA can change."""
    return [name for name in structure.modules if not name.startswith("unet.")]


def random_lora(
    structure: Structure,
    modules: Iterable[str] | None = None,
    *,
    ranks: tuple[int, ...] = (4,),
    alphas: tuple[float, ...] = (8.0,),
    size: float = 0.1,
    seed: int = 0,
) -> Lora:
    """Normal weights of deviation `size`; ranks and alphas take turns. The LCM modules if none are named."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for k, name in enumerate(lcm_modules(structure) if modules is None else modules):
        out, *inner = structure.modules[name]
        rank, alpha = ranks[k % len(ranks)], alphas[k % len(alphas)]
        ones = (1,) * (len(inner) - 1)
        down = torch.randn((rank, *inner), generator=generator) * size
        up = torch.randn((out, rank, *ones), generator=generator) * size
        layers[name] = Layer(down, up, alpha)
    return Lora(layers)


@torch.no_grad()
def fuse(unet: Any, lora: Lora, weight: float = 1.0) -> Any:
    """Add weight * alpha / rank * up @ down to the weights of `unet`, in place, without peft."""
    for name, layer in lora.layers.items():
        if name.startswith("unet."):
            module = unet.get_submodule(name.removeprefix("unet."))
            product = layer.up.flatten(1) @ layer.down.flatten(1)
            module.weight += weight * layer.alpha / layer.rank * product.reshape(module.weight.shape)
    return unet
