"""LoRA files broken as the public trainers break them: each function gives what such a program writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lcm_kit.lora.layers import Lora
from lcm_kit.lora.structure import Structure

Tensors = dict[str, Tensor]
PEFT = {"down": "lora_A.weight", "up": "lora_B.weight"}
KOHYA = {"down": "lora_down.weight", "up": "lora_up.weight"}


def _keys(lora: Lora, spell: Callable[[str], str], roles: dict[str, str], dot: str = ".") -> Tensors:
    return {
        f"{spell(name)}{dot}{end}": getattr(layer, role)
        for name, layer in lora.layers.items()
        for role, end in roles.items()
    }


def peft_wrapper(lora: Lora, base: Structure) -> tuple[Tensors, dict[str, str]]:
    """diffusers' LCM-LoRA script for SD1.5: the state of a PeftModel saved behind `unet.`; alpha is lost."""
    return _keys(lora, lambda n: n.replace("unet.", "unet.base_model.model.", 1), PEFT), {}


def mixed_styles(lora: Lora, base: Structure) -> tuple[Tensors, dict[str, str]]:
    """diffusers' LCM-LoRA script for SDXL: its converter renames attention keys only; alpha is lost."""
    from diffusers.utils import convert_state_dict_to_diffusers

    raw = {key.removeprefix("unet."): value for key, value in _keys(lora, str, PEFT).items()}
    return {f"unet.{key}": value for key, value in convert_state_dict_to_diffusers(raw).items()}, {}


def attention_processors(lora: Lora, base: Structure) -> tuple[Tensors, dict[str, str]]:
    """diffusers before 0.21: `attn1.processor.to_q_lora.down.weight`; attention alone, no alpha."""

    def spell(name: str) -> str:
        for end, old in (("to_q", "to_q"), ("to_k", "to_k"), ("to_v", "to_v"), ("to_out.0", "to_out")):
            if name.endswith(f".{end}"):
                return f"{name.removesuffix(end)}processor.{old}_lora"
        raise AssertionError(name)

    return _keys(lora, spell, {"down": "down.weight", "up": "up.weight"}), {}


def processors_without_prefix(lora: Lora, base: Structure) -> tuple[Tensors, dict[str, str]]:
    """diffusers' `save_attn_procs`: the same without `unet.` in front."""
    tensors, header = attention_processors(lora, base)
    return {key.removeprefix("unet."): value for key, value in tensors.items()}, header


def lora_down_up(lora: Lora, base: Structure) -> tuple[Tensors, dict[str, str]]:
    """diffusers 0.22: `.lora.down.weight` in the UNet, `.lora_linear_layer.` in text encoders; no alpha."""
    unet = Lora({n: x for n, x in lora.layers.items() if n.startswith("unet.")})
    text = Lora({n: x for n, x in lora.layers.items() if not n.startswith("unet.")})
    found = _keys(unet, str, {"down": "lora.down.weight", "up": "lora.up.weight"})
    ends = {"down": "lora_linear_layer.down.weight", "up": "lora_linear_layer.up.weight"}
    return found | _keys(text, str, ends), {}


def named_adapter(lora: Lora, base: Structure) -> tuple[Tensors, dict[str, str]]:
    """A peft model's `state_dict()`: the adapter's name stands in the keys."""
    ends = {"down": "lora_A.default.weight", "up": "lora_B.default.weight"}
    return _keys(lora, lambda n: n.replace("unet.", "base_model.model.", 1), ends), {}


def kohya_diffusers_spelling(lora: Lora, base: Structure) -> tuple[Tensors, dict[str, str]]:
    """The LCM scripts' own kohya conversion: SDXL too in diffusers' spelling, with alphas."""

    def spell(name: str) -> str:
        return f"lora_unet_{name.removeprefix('unet.').replace('.', '_')}"

    alphas = {f"{spell(n)}.alpha": torch.tensor(x.alpha) for n, x in lora.layers.items()}
    return _keys(lora, spell, KOHYA) | alphas, {}


def kohya_two_spellings(lora: Lora, base: Structure) -> tuple[Tensors, dict[str, str]]:
    """A conversion that knew only the transformer blocks: the rest is left in diffusers' spelling."""

    def spell(name: str) -> str:
        if ".attentions." in name:
            return base.kohya[name]
        return f"lora_unet_{name.removeprefix('unet.').replace('.', '_')}"

    alphas = {f"{spell(n)}.alpha": torch.tensor(x.alpha) for n, x in lora.layers.items()}
    return _keys(lora, spell, KOHYA) | alphas, {}


def kohya_without_alphas(lora: Lora, base: Structure) -> tuple[Tensors, dict[str, str]]:
    """Alpha tensors dropped on the way; sd-scripts' header still tells the network's alpha."""
    alphas = {layer.alpha for layer in lora.layers.values()}
    assert len(alphas) == 1
    return _keys(lora, base.kohya.__getitem__, KOHYA), {"ss_network_alpha": str(alphas.pop())}


def kohya_with_peft_header(lora: Lora, base: Structure) -> tuple[Tensors, dict[str, str]]:
    """Both ways to tell alpha in one file, which diffusers refuses."""
    alphas = {f"{base.kohya[n]}.alpha": torch.tensor(x.alpha) for n, x in lora.layers.items()}
    header = {"lora_adapter_metadata": json.dumps({"unet.r": 4, "unet.lora_alpha": 8.0})}
    return _keys(lora, base.kohya.__getitem__, KOHYA) | alphas, header


def sgm_with_dots(lora: Lora, base: Structure) -> tuple[Tensors, dict[str, str]]:
    """The model's own names with dots, behind `diffusion_model.`; alphas as tensors."""

    def spell(name: str) -> str:
        return f"diffusion_model.{base.sgm[name.removeprefix('unet.')]}"

    alphas = {f"{spell(n)}.alpha": torch.tensor(x.alpha) for n, x in lora.layers.items()}
    return _keys(lora, spell, KOHYA) | alphas, {}


def save(path: Path, made: tuple[Tensors, dict[str, str]]) -> Path:
    """Write what one of the above gives."""
    tensors, header = made
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata={"format": "pt", **header})
    return path


Breaker = Callable[[Lora, Structure], tuple[Tensors, dict[str, Any]]]
