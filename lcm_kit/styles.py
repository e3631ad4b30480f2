"""LoRAs that training begins with, from anybody's files: the teacher's, and the one that it starts from."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lcm_kit.adapter import add_style, load_lora_state, lora_state
from lcm_kit.config import schema
from lcm_kit.errors import UserError
from lcm_kit.export import reading, structure
from lcm_kit.export.lora import Lora
from lcm_kit.export.merge import concatenate
from lcm_kit.families import BaseInfo
from lcm_kit.files import sha256_file
from lcm_kit.sample import adapter_file

_FUSE = (
    "; to distil all of it, fuse it into the base first (`lcm-kit merge {path} --fuse-into {base} --output "
    "FOLDER`) and give that folder as base.path"
)


def add_teacher_adapters(unet: Any, teacher: schema.Teacher, base: BaseInfo) -> list[dict[str, Any]]:
    """Put `teacher.adapters` on `unet` for the teacher; returns what they are, for adapter.json.

    Only what they change in the UNet counts: captions are encoded by the base's own text encoders, so what a
    LoRA changes there is left out, and said, with the way to distil that too. Raises `UserError` if a file is
    not whole or for another base.
    """
    if not teacher.adapters:
        return []
    place = structure.of_folder(base.folder, base.path)
    reads = [_read("teacher.adapters", entry.path, place, _FUSE) for entry in teacher.adapters]
    lora = concatenate([read.lora for read in reads], [entry.weight for entry in teacher.adapters])
    layers = {
        name.removeprefix("unet."): (layer.down, layer.up, layer.alpha) for name, layer in lora.layers.items()
    }
    add_style(unet, layers, in_student=teacher.in_student)
    return teacher_facts(teacher)


def teacher_facts(teacher: schema.Teacher) -> list[dict[str, Any]]:
    """What `teacher.adapters` are, as `add_teacher_adapters` tells it, without reading the weights.

    Raises `UserError` if a file is not there.
    """
    return [
        {"path": entry.path, "weight": entry.weight, "sha256": sha256_file(adapter_file(entry.path))}
        for entry in teacher.adapters
    ]


def start_from(unet: Any, config: schema.Adapter, base: BaseInfo) -> list[dict[str, Any]]:
    """Give the LoRA that is trained (`add_lora`) the weights of `config.start`, bit for bit, if there is one.

    Returns what the file is, for adapter.json. Raises `UserError` unless the file is whole and adapts the
    same layers at the same rank and alpha.
    """
    if config.start is None:
        return []
    place = structure.of_folder(base.folder, base.path)
    read = _read("adapter.start", config.start, place)
    state = _state(read.lora)
    wanted = lora_state(unet)
    if state.keys() != wanted.keys():
        raise UserError(
            f"adapter.start: {config.start} adapts {len(state) // 2} layers of the UNet and adapter.targets "
            f"{config.targets} means {len(wanted) // 2}; give one with the same targets"
        )
    for name, layer in read.lora.layers.items():
        if layer.rank != config.rank or layer.alpha != config.alpha:
            raise UserError(
                f"adapter.start: {config.start} has rank {layer.rank} and alpha {layer.alpha:g} in {name}; "
                f"set adapter.rank and adapter.alpha, which are {config.rank} and {config.alpha:g}, to these"
            )
    load_lora_state(unet, state)
    return [{"path": config.start, "sha256": sha256_file(read.path)}]


def _state(lora: Lora) -> dict[str, Tensor]:
    """The weights under raw peft keys, as `lora_state` gives them."""
    layers = {name.removeprefix("unet."): layer for name, layer in lora.layers.items()}
    return {
        **{f"{name}.lora_A.weight": layer.down.float() for name, layer in layers.items()},
        **{f"{name}.lora_B.weight": layer.up.float() for name, layer in layers.items()},
    }


def _read(key: str, path: str, place: structure.Structure, advice: str = "") -> reading.Reading:
    """The UNet's layers of a file that the config's `key` names; `advice` ends what is said of others."""
    read = reading.read(adapter_file(path), place)
    if read.problems:
        raise UserError(f"{key}: {path} is not whole ({read.problems[0]}); `lcm-kit convert` may mend it")
    unet = {name: layer for name, layer in read.lora.layers.items() if name.startswith("unet.")}
    if left := len(read.lora.layers) - len(unet):
        print(
            f"{key}: {path} changes {left} text encoder layers too, which are left out, since captions are "
            f"encoded by the base's own text encoders{advice.format(path=path, base=place.label)}"
        )
    if not unet:
        raise UserError(f"{key}: {path} changes nothing in the UNet; remove it")
    return reading.Reading(
        read.path, Lora(unet), place, read.tensors, read.findings, read.problems, read.lacks_alpha
    )
