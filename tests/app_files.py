"""LoRA files for the apps' rules: names, shapes and alphas, and no values."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from lcm_kit.lora.apps import APPS
from lcm_kit.lora.structure import Structure
from tests.loras import lcm_modules, text_modules

GENERATIONS = ("sd1", "sd2", "sdxl")
RANKS, ALPHAS = (4, 16, 8), (8.0, 1.0)
File = dict[str, Tensor]
UPSAMPLER = "unet.up_blocks.0.upsamplers.0.conv"  # SDXL's first


def of(
    base: Structure,
    names: Iterable[str] | None = None,
    spell: Callable[[str], str] | None = None,
    ends: tuple[str, str] = (".lora_down.weight", ".lora_up.weight"),
    alphas: tuple[float, ...] = ALPHAS,
) -> File:
    """A file without values: shapes on the meta device, and alphas (`()`: none). kohya's if not told else."""
    file: File = {}
    for k, name in enumerate(everything(base) if names is None else names):
        out, *inner = base.modules[name]
        key, rank = (spell or base.kohya.__getitem__)(name), RANKS[k % len(RANKS)]
        file[key + ends[0]] = torch.empty((rank, *inner), device="meta")
        file[key + ends[1]] = torch.empty((out, rank, *(1,) * (len(inner) - 1)), device="meta")
        if alphas:
            file[f"{key}.alpha"] = torch.tensor(alphas[k % len(alphas)])
    return file


def everything(base: Structure) -> list[str]:
    return lcm_modules(base) + text_modules(base)


def strengths(base: Structure, names: Iterable[str] | None = None) -> dict[str, float]:
    """alpha / rank by arithmetic; the six of them differ."""
    names = everything(base) if names is None else names
    return {name: ALPHAS[k % 2] / RANKS[k % 3] for k, name in enumerate(names)}


def in_diffusers_spelling(base: Structure) -> Callable[[str], str]:
    prefix = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
    if base.generation.name != "sdxl":
        prefix["text_encoder"] = "lora_te_"

    def spell(name: str) -> str:
        part, _, module = name.partition(".")
        return prefix[part] + module.replace(".", "_")

    return spell


def refusal(app: str, file: File, base: Structure) -> str:
    """The reason; "" if the file is taken."""
    loaded = APPS[app](file, base)
    assert loaded.refused is None or (loaded.modules, loaded.unmatched) == ({}, list(file))
    return loaded.refused or ""


def peft(base: Structure, names: Iterable[str] | None = None) -> File:
    return of(base, names, lambda name: name, (".lora_A.weight", ".lora_B.weight"), ())
