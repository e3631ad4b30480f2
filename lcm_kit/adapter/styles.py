"""LoRAs that training begins with, from anybody's files: the teacher's, and the one that it starts from."""

from __future__ import annotations

from collections.abc import Mapping

from lcm_kit import console
from lcm_kit.adapter.adapted_unet import AdaptedUNet
from lcm_kit.bases import BaseInfo
from lcm_kit.config import schema
from lcm_kit.errors import UserError
from lcm_kit.io.files import sha256_file
from lcm_kit.lora import provenance, reading, structure
from lcm_kit.lora.base_weights import BaseWeights
from lcm_kit.lora.inherited import license_of
from lcm_kit.lora.kinds import Norm, exact_rank
from lcm_kit.lora.layers import Layer, Lora, Update
from lcm_kit.lora.locate import adapter_file
from lcm_kit.lora.merge import concatenate
from lcm_kit.lora.plain import MOST, plain
from lcm_kit.lora.reading_words import bundled

_FUSE = (
    "; to distil all of it, fuse it into the base first (`lcm-kit merge {path} --fuse-into {base} --output "
    "FOLDER`) and give that folder as base.path"
)
_CONVERT = "; make a LoRA of it with `lcm-kit convert`"


def add_teacher_adapters(
    adapted: AdaptedUNet, teacher: schema.Teacher, base: BaseInfo
) -> tuple[provenance.Lora, ...]:
    """Put `teacher.adapters` on the UNet for the teacher; returns what they are, for adapter.json.

    Only what they change in the UNet counts: captions are encoded by the base's own text encoders, so what a
    LoRA changes there is left out, and said, with the way to distil that too. Raises `UserError` if a file is
    not whole or for another base.
    """
    if not teacher.adapters:
        return ()
    place = structure.of_folder(base.folder, base.path)
    loras = [_layers("teacher.adapters", entry.path, place, base, _FUSE) for entry in teacher.adapters]
    lora = concatenate(loras, [entry.weight for entry in teacher.adapters])
    layers = {
        name.removeprefix("unet."): (layer.down, layer.up, layer.alpha) for name, layer in lora.layers.items()
    }
    adapted.add_teacher_lora(layers, in_student=teacher.in_student)
    return teacher_loras(teacher)


def teacher_loras(teacher: schema.Teacher) -> tuple[provenance.Lora, ...]:
    """What `teacher.adapters` are, as `add_teacher_adapters` tells it, without reading the weights.

    Raises `UserError` if a file is not there.
    """
    return _facts(teacher.adapters)


def _facts(loras: schema.Loras) -> tuple[provenance.Lora, ...]:
    files = [(entry, adapter_file(entry.path)) for entry in loras]
    return tuple(
        provenance.Lora(entry.path, sha256_file(file), entry.weight, license_of(file))
        for entry, file in files
    )


def start_from(adapted: AdaptedUNet, config: schema.Adapter, base: BaseInfo) -> tuple[provenance.Lora, ...]:
    """Give the LoRA that is trained on `adapted` the effect of `config.start`, the sum of its LoRAs.

    From one LoRA at weight 1, of the same layers, rank and alpha, it takes the weights bit for bit. A start
    of fewer layers or lower ranks leaves the rest of the LoRA as it was, whose B is zero; where alpha / rank
    differs B takes the ratio. Several are joined exactly, and need their ranks together. Returns what the
    files are, for adapter.json. Raises `UserError` if one is not whole, or together they are larger than the
    LoRA.
    """
    if not config.start:
        return ()
    place = structure.of_folder(base.folder, base.path)
    loras = [_layers("adapter.start", entry.path, place, base) for entry in config.start]
    alone = len(loras) == 1 and config.start[0].weight == 1
    whole = loras[0] if alone else concatenate(loras, [entry.weight for entry in config.start])
    layers = {name.removeprefix("unet."): layer for name, layer in whole.layers.items()}
    named = " and ".join(entry.path for entry in config.start)
    state = adapted.state()
    beyond = [name for name in layers if f"{name}.lora_A.weight" not in state]
    if beyond:
        raise UserError(
            f"adapter.start: {named} adapts {len(beyond)} layers of the UNet that adapter.targets "
            f"{config.targets} leaves alone, such as {beyond[0]}; give one within the targets, or set "
            "adapter.targets to lcm"
        )
    largest = max(layer.rank for layer in layers.values())
    if largest > config.rank:
        raise UserError(
            f"adapter.start: {named} has rank {largest}, more than adapter.rank {config.rank}; set "
            f"adapter.rank to {largest} or above"
        )
    for name, layer in layers.items():
        ratio = layer.scale / (config.alpha / config.rank)
        state[f"{name}.lora_A.weight"][: layer.rank] = layer.down.float()
        state[f"{name}.lora_B.weight"][:, : layer.rank] = layer.up.float() * ratio
    adapted.load_state(state)
    return _facts(config.start)


def largest_rank(key: str, path: str, base: BaseInfo) -> int:
    """The highest rank among the UNet's layers of the LoRA that `key` names.

    Raises `UserError` if it is not whole or for another base.
    """
    read = _read(key, path, structure.of_folder(base.folder, base.path))
    return max(exact_rank(update) for update in read.lora.updates.values())


def _layers(key: str, path: str, place: structure.Structure, base: BaseInfo, advice: str = _CONVERT) -> Lora:
    """The UNet's layers of a file that the config's `key` names, other kinds made into layers exactly."""
    read = _read(key, path, place, advice)
    return plain(read, BaseWeights(base.folder, base.variant)).lora


def _read(key: str, path: str, place: structure.Structure, advice: str = _CONVERT) -> reading.Reading:
    """What a file that the config's `key` names changes in the UNet; `advice` ends what is said of others."""
    read = reading.read(adapter_file(path), place)
    advice = advice.format(path=path, base=place.label)
    if read.problems:
        raise UserError(f"{key}: {path} is not whole ({read.problems[0]}); `lcm-kit convert` may repair it")
    unet = {name: update for name, update in read.lora.updates.items() if name.startswith("unet.")}
    if left := len(read.lora.updates) - len(unet):
        console.say(
            f"{key}: {path} changes {left} text encoder layers too, which are left out, since captions are "
            f"encoded by the base's own text encoders{advice if advice != _CONVERT else ''}"
        )
    if read.embeddings:
        console.say(f"{key}: {path} bundles the embeddings {bundled(read.embeddings)}, which are left out")
    if not unet:
        raise UserError(f"{key}: {path} changes nothing in the UNet; remove it")
    _require_layers(key, path, read, unet, advice)
    layers = {name: update for name, update in unet.items() if isinstance(update, Layer)}
    others = {name: update for name, update in unet.items() if name not in layers}
    return reading.Reading(
        read.path, Lora(layers, others=others), place, read.tensors, read.findings, read.problems,
        read.lacks_alpha,
    )  # fmt: skip


def _require_layers(
    key: str, path: str, read: reading.Reading, unet: Mapping[str, Update], advice: str
) -> None:
    """Raise `UserError` for what no layer beside the UNet's own holds, or none of a sensible rank."""
    beyond = [name for name, update in unet.items() if isinstance(update, Norm)]
    beyond += [name for name in read.biases if name.startswith("unet.")]
    if beyond:
        raise UserError(
            f"{key}: {path} changes {len(beyond)} norms and biases, such as {beyond[0]}, which no LoRA "
            f"holds{advice}"
        )
    ranks = {name: exact_rank(update) for name, update in unet.items() if not isinstance(update, Layer)}
    if large := [name for name, rank in ranks.items() if rank > MOST]:
        kind, rank = unet[large[0]].kind, ranks[large[0]]
        raise UserError(
            f"{key}: {path} changes {large[0]} by rank {rank} ({kind}), too much for a layer{advice}"
        )
