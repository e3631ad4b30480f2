"""The teacher's LoRAs: read from anybody's files, summed exactly, and put on the UNet."""

from __future__ import annotations

from typing import Any

from lcm_kit.adapter import add_style
from lcm_kit.config import schema
from lcm_kit.errors import UserError
from lcm_kit.export import reading, structure
from lcm_kit.export.lora import Lora
from lcm_kit.export.merge import concatenate
from lcm_kit.families import BaseInfo
from lcm_kit.files import sha256_file
from lcm_kit.sample import adapter_file


def add_teacher_adapters(unet: Any, teacher: schema.Teacher, base: BaseInfo) -> list[dict[str, Any]]:
    """Put `teacher.adapters` on `unet` for the teacher; returns what they are, for adapter.json.

    Only what they change in the UNet counts: captions are encoded by the base's own text encoders, so what a
    LoRA changes there is left out, and said. Raises `UserError` if a file is not whole or for another base.
    """
    if not teacher.adapters:
        return []
    place = structure.of_folder(base.folder, base.path)
    reads = [_read(entry, place) for entry in teacher.adapters]
    lora = concatenate([read.lora for read in reads], [entry.weight for entry in teacher.adapters])
    layers = {
        name.removeprefix("unet."): (layer.down, layer.up, layer.alpha) for name, layer in lora.layers.items()
    }
    add_style(unet, layers, in_student=teacher.in_student)
    return [
        {"path": entry.path, "weight": entry.weight, "sha256": sha256_file(read.path)}
        for entry, read in zip(teacher.adapters, reads, strict=True)
    ]


def _read(entry: schema.TeacherAdapter, place: structure.Structure) -> reading.Reading:
    read = reading.read(adapter_file(entry.path), place)
    if read.problems:
        raise UserError(
            f"teacher.adapters: {entry.path} is not whole ({read.problems[0]}); `lcm-kit convert` may mend it"
        )
    unet = {name: layer for name, layer in read.lora.layers.items() if name.startswith("unet.")}
    if left := len(read.lora.layers) - len(unet):
        print(f"teacher.adapters: {entry.path} changes {left} text encoder layers too, which are left out")
    if not unet:
        raise UserError(f"teacher.adapters: {entry.path} changes nothing in the UNet; remove it")
    return reading.Reading(
        read.path, Lora(unet), place, read.tensors, read.findings, read.problems, read.lacks_alpha
    )
