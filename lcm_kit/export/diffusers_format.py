"""The LoRA file of diffusers: raw peft keys behind `unet.`, and the LoRA's config in the header.

The header matters: without `lora_adapter_metadata` diffusers takes alpha = rank, and a LoRA of rank 8 and
alpha 16 comes back at half its strength. Renamed keys matter too: a file that mixes spellings loses modules
without a word.
"""

from __future__ import annotations

from pathlib import Path

import torch

from lcm_kit import adapter

# What defines the LoRA, and no more: a header with keys that a user's older peft does not know is refused
# there.
_HEADER = ("r", "lora_alpha", "target_modules")


def write(trained: Path, folder: Path, dtype: str = "float32") -> Path:
    """Write the adapter folder `trained` as `folder/pytorch_lora_weights.safetensors`; returns its path."""
    from diffusers import StableDiffusionPipeline
    from safetensors.torch import load_file

    lora = adapter.read_facts(trained)["lora_config"]
    weights = load_file(trained / adapter.WEIGHTS)
    StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers={key: value.to(getattr(torch, dtype)) for key, value in weights.items()},
        unet_lora_adapter_metadata={key: lora[key] for key in _HEADER},
    )
    return folder / "pytorch_lora_weights.safetensors"
