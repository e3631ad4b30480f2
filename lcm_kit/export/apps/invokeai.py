"""InvokeAI: tells the base from the file, groups keys at the first dot, and walks diffusers' own modules.

Sources: InvokeAI `invokeai/backend/model_manager/configs/lora.py` and `model_manager/util/model_util.py`
(which base), `patches/lora_conversions/` (SDXL's names, the groups), `patches/layers/` (what is accepted,
strength) and `patches/layer_patcher.py` (from a joined name to a module), at 8e71a8a. The same loader serves
a diffusers folder. The header is not read for the strength.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from lcm_kit.export.apps.loaded import Loaded, Pair, groups, joined, load, refusal
from lcm_kit.export.lora import PARTS
from lcm_kit.export.structure import Structure

_GENERATION = {768: "sd1", 1024: "sd2", 1280: "sdxl", 2048: "sdxl"}
_TITLE = {"sd1": "SD1.x", "sd2": "SD2.x", "sdxl": "SDXL"}
_SDXL_PREFIXES = ("lora_unet_", "lora_te1_", "lora_te2_")
# An attention of several transformer blocks: SDXL's alone
_SDXL_ATTENTION = re.compile(
    r"lora_unet_(?:(?:down|up)_blocks_\d+_attentions_\d+|mid_block_attentions_\d+"
    r"|(?:input|output)_blocks_\d+_\d+|middle_block_\d+)_transformer_blocks_(\d+)_"
)
_FLUX_CLIP = re.compile(r"lora_te1_text_model_encoder_layers_\d+_(mlp|self_attn)_\w+")


class _Refused(Exception):
    """Its loader raises."""


def invokeai(tensors: Mapping[str, Tensor], structure: Structure) -> Loaded:
    """What InvokeAI would change.

    No app knows a base in small (`structure.published` is False); then only the names are followed.
    """
    try:
        if structure.published:
            _identify(tensors, structure)
        landing = {key: key for key in tensors}
        if structure.generation == "sdxl":
            landing = sdxl_to_diffusers(tensors)
        pairs = {name: _pair(name, keys) for name, keys in _groups(landing).items()}
        modules = _modules(pairs, structure)
    except _Refused as refused:
        return refusal(tensors, str(refused))
    return load(tensors, {module: pairs[name] for name, module in modules.items()})


def _identify(tensors: Mapping[str, Tensor], structure: Structure) -> None:
    if all(_FLUX_CLIP.match(key) for key in tensors):
        raise _Refused("with its first text encoder's layers alone it is taken for a Flux LoRA")
    length = token_vector_length(tensors)
    found = _GENERATION.get(length or 0)
    if found is None and any((m := _SDXL_ATTENTION.match(key)) and int(m[1]) >= 2 for key in tensors):
        found = "sdxl"
    if found is None:
        raise _Refused("it finds no layer by which it tells a base, so it does not take the file for a LoRA")
    if found != structure.generation:
        raise _Refused(f"it takes the file for a LoRA of {_TITLE[found]}")


def token_vector_length(tensors: Mapping[str, Tensor]) -> int | None:
    """The width of the text embeddings that the file is for, or what the app takes for it.

    The first key that tells decides, in the order of the names, which is that of safetensors files.
    """
    first = second = None
    for key in sorted(tensors):
        name, _, rest = key.partition(".")
        if rest == "lora_down.weight" and tensors[key].ndim < 2:
            raise _Refused(f"it stops at {key}, which is no matrix")
        width = int(tensors[key].shape[1]) if rest == "lora_down.weight" else None
        if name.startswith("lora_unet_") and name.endswith(("_attn2_to_k", "_attn2_to_v", "time_emb_proj")):
            if width is not None:
                return width
        elif name.startswith("lora_te") and "_self_attn_" in name and width is not None:
            if name.startswith("lora_te_"):
                return width
            first = width if name.startswith("lora_te1_") else first
            second = width if name.startswith("lora_te2_") else second
        if first is not None and second is not None:
            return first + second
    return None


def _groups(landing: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Name -> rest -> the file's key, from the key after conversion -> the file's key."""
    if dotless := next((key for key in landing if "." not in key), None):
        raise _Refused(f"it cannot take the key {dotless!r} apart")
    return {
        name: {rest: landing[key] for rest, key in keys.items()} for name, keys in groups(landing).items()
    }


def _pair(name: str, keys: Mapping[str, str]) -> Pair:
    """The keys of one layer; the loader knows no other endings, and raises before it asks where they lead."""
    if "lora_up.weight" not in keys:
        raise _Refused(f"it does not know the format of {next(iter(keys.values()))}")
    if "lora_down.weight" not in keys:
        raise _Refused(f"it stops at {name}, because its lora_down.weight is missing")
    return Pair(
        keys["lora_up.weight"], keys["lora_down.weight"], keys.get("alpha"), keys.get("lora_mid.weight")
    )


def _modules(names: Iterable[str], structure: Structure) -> dict[str, str]:
    """Joined name -> the module that it leads to; names that lead nowhere are left out."""
    prefixes = {"lora_unet_": "unet", "lora_te_": "text_encoder"}
    if structure.generation == "sdxl":
        prefixes = dict(zip(_SDXL_PREFIXES, PARTS, strict=True))
    trees = _trees(structure)
    found = {}
    for name in names:
        for prefix, part in prefixes.items():
            path = walk(trees.get(part, {}), name.removeprefix(prefix)) if name.startswith(prefix) else None
            if path is not None:
                found[name] = f"{part}.{path}"
    if whole := next((name for name, module in found.items() if module not in structure.modules), None):
        raise _Refused(f"it stops at {whole}, which is a block and no layer")
    return found


def walk(tree: Mapping[str, Any], name: str) -> str | None:
    """The dotted path of the joined `name` in a tree of modules, as the app's greedy search finds it."""
    path, piece = [], ""
    for word in name.split("_"):
        piece = f"{piece}_{word}" if piece else word
        if piece in tree:
            path.append(piece)
            tree, piece = tree[piece], ""
    return None if piece else ".".join(path)


def _trees(structure: Structure) -> dict[str, Any]:
    """The modules of each part by the pieces of their names."""
    tree: dict[str, Any] = {}
    for name in structure.modules:
        node = tree
        for word in name.split("."):
            node = node.setdefault(word, {})
    return tree


def sdxl_to_diffusers(keys: Iterable[str]) -> dict[str, str]:
    """Each key of an SDXL file in diffusers' spelling -> the key itself.

    Raises where the app does: a prefix that it does not know, or keys in both spellings.
    """
    table = _sdxl_table()
    ordered = sorted(table)
    found, converted, others = {}, 0, 0
    for key in keys:
        if not key.startswith(_SDXL_PREFIXES):
            raise _Refused(f"SDXL keys must start with {', '.join(_SDXL_PREFIXES)}, and {key} does not")
        new = key
        if key.startswith("lora_unet_"):
            search = key.removeprefix("lora_unet_")
            nearest = ordered[bisect.bisect_right(ordered, search) - 1]
            if search.startswith(nearest):
                new, converted = key.replace(nearest, table[nearest]), converted + 1
            else:
                others += 1
        found[new] = key
    if converted and others:
        raise _Refused(f"{converted} of its UNet keys are in the original spelling, but {others} are not")
    return found


def _sdxl_table() -> dict[str, str]:
    """Beginnings of SDXL's joined original names -> diffusers'."""
    resnet = {
        "in_layers.0": "norm1", "in_layers.2": "conv1", "out_layers.0": "norm2", "out_layers.3": "conv2",
        "emb_layers.1": "time_emb_proj", "skip_connection": "conv_shortcut",
    }  # fmt: skip
    table = {
        "input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out",
        "middle_block.1": "mid_block.attentions.0",
    }  # fmt: skip
    resnets = {f"middle_block.{2 * j}": f"mid_block.resnets.{j}" for j in range(2)}
    for i in range(3):
        for j in range(2):
            resnets[f"input_blocks.{3 * i + j + 1}.0"] = f"down_blocks.{i}.resnets.{j}"
            table[f"input_blocks.{3 * i + j + 1}.1"] = f"down_blocks.{i}.attentions.{j}"
        for j in range(3):
            resnets[f"output_blocks.{3 * i + j}.0"] = f"up_blocks.{i}.resnets.{j}"
            table[f"output_blocks.{3 * i + j}.1"] = f"up_blocks.{i}.attentions.{j}"
        table[f"input_blocks.{3 * i + 3}.0.op"] = f"down_blocks.{i}.downsamplers.0.conv"
        table[f"output_blocks.{3 * i + 2}.2"] = f"up_blocks.{i}.upsamplers.0"
    for j in range(2):
        table[f"time_embed.{2 * j}"] = f"time_embedding.linear_{j + 1}"
        table[f"label_emb.0.{2 * j}"] = f"add_embedding.linear_{j + 1}"
    for sgm, diffusers in resnets.items():
        table |= {f"{sgm}.{a}": f"{diffusers}.{b}" for a, b in resnet.items()}
    return {joined(sgm): joined(diffusers) for sgm, diffusers in table.items()}
