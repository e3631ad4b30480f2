"""The teacher's LoRA (`teacher.adapters`): how large it is, from its files; and one of that size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from lcm_kit.adapter.adapted_unet import AdaptedUNet
from lcm_kit.config.schema import Distill, Training
from lcm_kit.errors import UserError
from lcm_kit.lora import reading
from lcm_kit.lora.kinds import exact_rank
from lcm_kit.lora.locate import adapter_file
from lcm_kit.lora.structure import Structure

_SIZE = 0.01  # of random weights


@dataclass(frozen=True)
class Style:
    """The LoRA of the teacher, and of the student too if `in_student`."""

    ranks: Mapping[str, int]  # by layer of the UNet
    in_student: bool = False


def find(config: Training, structure: Structure) -> tuple[Style | None, str]:
    """The teacher's LoRA, its files put side by side as training does; and what cannot be counted, if so."""
    if not isinstance(config, Distill) or not config.teacher.adapters:
        return None, ""
    ranks: dict[str, int] = {}
    try:
        for entry in config.teacher.adapters:
            held = reading.read(adapter_file(entry.path), structure).lora.updates
            for name, update in held.items():
                if name.startswith("unet.") and name in structure.modules:
                    plain = name.removeprefix("unet.")
                    ranks[plain] = ranks.get(plain, 0) + exact_rank(update)
    except UserError as error:
        return None, f"the teacher's adapters are not counted: {error}"
    return (Style(ranks, config.teacher.in_student), "") if ranks else (None, "")


def put_on(adapted: AdaptedUNet, style: Style | None) -> None:
    """Give the UNet's teacher a LoRA of these ranks, of random weights."""
    if style is None:
        return
    layers = {}
    for name, rank in style.ranks.items():
        module = adapted.unet.get_submodule(name)
        linear = isinstance(module, nn.Linear)  # whose weight is packed where it is in few bits
        out, *of = (module.out_features, module.in_features) if linear else module.weight.shape
        ones: tuple[int, ...] = () if linear else (1, 1)
        down, up = torch.randn(rank, *of) * _SIZE, torch.randn(out, rank, *ones) * _SIZE
        layers[name] = (down, up, float(rank))
    adapted.add_teacher_lora(layers, in_student=style.in_student)
