"""InvokeAI: tells the base from the file, groups keys at the first dot, and walks diffusers' own modules.

Sources: InvokeAI `invokeai/backend/model_manager/configs/lora.py` and `model_manager/util/model_util.py`
(which base), `model_manager/load/model_loaders/lora.py` (bundled embeddings), `patches/lora_conversions/`
(SDXL's names, the groups), `patches/layers/` (what is accepted, strength, DoRA) and
`patches/layer_patcher.py` (from a joined name to a module), at 8e71a8a. The same loader serves a diffusers
folder. The header is not read for the strength.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from lcm_kit.families import generation_of
from lcm_kit.lora.apps.loaded import (
    BY_INPUT,
    NEEDS,
    Loaded,
    Taken,
    bundled,
    dora_remarks,
    groups,
    load,
    refusal,
    take,
    targets,
)
from lcm_kit.lora.apps.original import beginnings, to_diffusers
from lcm_kit.lora.layers import PARTS
from lcm_kit.lora.structure import Structure

# Its own list, by the width of the text embeddings that it finds; 1280 is SDXL's second encoder alone
_GENERATION = {768: "sd1", 1024: "sd2", 1280: "sdxl", 2048: "sdxl"}
_SEVERAL_BLOCKS = "sdxl"
_SDXL_PREFIXES = ("lora_unet_", "lora_te1_", "lora_te2_")
# An attention of several transformer blocks: SDXL's alone
_SDXL_ATTENTION = re.compile(
    r"lora_unet_(?:(?:down|up)_blocks_\d+_attentions_\d+|mid_block_attentions_\d+"
    r"|(?:input|output)_blocks_\d+_\d+|middle_block_\d+)_transformer_blocks_(\d+)_"
)
# What makes it take a layer for one of a kind; what else that needs and is not there stops it
_MARKS = {
    "LoRA": ("lora_up.weight",), "LoHa": ("hada_w1_a",), "LoKr": ("lokr_w1", "lokr_w1_a"),
    "full difference": ("diff",), "norm": ("w_norm",),
}  # fmt: skip
_FLUX_CLIP = re.compile(r"lora_te1_text_model_encoder_layers_\d+_(mlp|self_attn)_\w+")


class _Refused(Exception):
    """Its loader raises."""


def invokeai(tensors: Mapping[str, Tensor], structure: Structure) -> Loaded:
    """What InvokeAI would change.

    No app knows a base in small (`structure.published` is False); then only the names are followed.
    """
    modules = targets(tensors, structure)
    try:
        if structure.published:
            _identify(tensors, structure)
        landing = {key: key for key in tensors if not bundled(key)}
        if structure.family.kohya_original:
            landing = sdxl_to_diffusers(landing)
        taken = {name: _taken(name, keys) for name, keys in _groups(landing).items()}
        found = _modules(taken, modules)
    except _Refused as refused:
        return refusal(tensors, str(refused))
    placed = {module: taken[name] for name, module in found.items()}
    return load(tensors, placed, remarks=dora_remarks(tensors, placed, modules, BY_INPUT))


def _identify(tensors: Mapping[str, Tensor], structure: Structure) -> None:
    if all(_FLUX_CLIP.match(key) for key in tensors):
        raise _Refused("with its first text encoder's layers alone it is taken for a Flux LoRA")
    length = token_vector_length(tensors)
    found = _GENERATION.get(length or 0)
    if found is None and any((m := _SDXL_ATTENTION.match(key)) and int(m[1]) >= 2 for key in tensors):
        found = _SEVERAL_BLOCKS
    if found is None:
        raise _Refused("it finds no layer by which it tells a base, so it does not take the file for a LoRA")
    if found != structure.generation.name:
        raise _Refused(f"it takes the file for a LoRA of {generation_of(found).short}")


def token_vector_length(tensors: Mapping[str, Tensor]) -> int | None:
    """The width of the text embeddings that the file is for, or what the app takes for it.

    The first key that tells decides, in the order of the names, which is that of safetensors files. Of two
    text encoders the widths are added; but each key of one sets its width anew, and where a LoRA's last, the
    up, tells none, the first encoder's is forgotten before the second's is found.
    """
    first = second = None
    for key in sorted(tensors):
        name, _, rest = key.partition(".")
        crossing = name.endswith(("_attn2_to_k", "_attn2_to_v"))
        width = None
        if name.startswith("lora_unet_") and (crossing or name.endswith("time_emb_proj")):
            width = _width(key, tensors) if crossing or rest == "lora_down.weight" else None
        elif name.startswith("lora_te") and "_self_attn_" in name:
            told = _width(key, tensors)
            width = told if name.startswith("lora_te_") else None
            first = told if name.startswith("lora_te1_") else first
            second = told if name.startswith("lora_te2_") else second
        if first is not None and second is not None:
            width = first + second
        if width is not None:
            return width
    return None


def _width(key: str, tensors: Mapping[str, Tensor]) -> int | None:
    """How wide what the module of `key` takes is, where that key tells."""
    name, _, rest = key.partition(".")
    sizes = [tensors[key]] if rest in ("lora_down.weight", "hada_w1_b", "hada_w2_b", "diff") else []
    if rest.startswith("lokr_"):
        whole = (f"{name}.lokr_w1", f"{name}.lokr_w2")
        sizes = [tensors[each] for each in whole] if all(each in tensors for each in whole) else []
    if any(tensor.ndim < 2 for tensor in sizes):
        raise _Refused(f"it stops at {key}, which is no matrix")
    return math.prod(int(tensor.shape[1]) for tensor in sizes) if sizes else None


def _groups(landing: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Name -> rest -> the file's key, from the key after conversion -> the file's key."""
    if dotless := next((key for key in landing if "." not in key), None):
        raise _Refused(f"it cannot take the key {dotless!r} apart")
    return {
        name: {rest: landing[key] for rest, key in keys.items()} for name, keys in groups(landing).items()
    }


def _taken(name: str, keys: Mapping[str, str]) -> Taken:
    """The keys of one layer; the loader knows no other kinds, and raises before it asks where they lead."""
    if "dora_scale" in keys:
        return _whole(name, keys, "LoRA", ("dora_scale",))
    for kind, marks in _MARKS.items():
        if any(mark in keys for mark in marks):
            return _whole(name, keys, kind)
    raise _Refused(f"it does not know the format of {next(iter(keys.values()))}")


def _whole(name: str, keys: Mapping[str, str], kind: str, extra: tuple[str, ...] = ()) -> Taken:
    one = take(keys, (kind,), extra)
    if one is None:
        lacking = next((role for role in NEEDS[kind] if role not in keys), "a factor")
        raise _Refused(f"it stops at {name}, because its {lacking} is missing")
    return one


def _modules(names: Iterable[str], modules: Iterable[str]) -> dict[str, str]:
    """Joined name -> the module that it leads to; names that lead nowhere are left out."""
    prefixes = {"lora_unet_": "unet", "lora_te_": "text_encoder"}
    trees = _trees(modules)
    if "text_encoder_2" in trees:
        prefixes = dict(zip(_SDXL_PREFIXES, PARTS, strict=True))
    found = {}
    for name in names:
        for prefix, part in prefixes.items():
            path = walk(trees.get(part, {}), name.removeprefix(prefix)) if name.startswith(prefix) else None
            if path is not None:
                found[name] = f"{part}.{path}"
    if whole := next((name for name, module in found.items() if module not in set(modules)), None):
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


def _trees(modules: Iterable[str]) -> dict[str, Any]:
    """The modules of each part by the pieces of their names."""
    tree: dict[str, Any] = {}
    for name in modules:
        node = tree
        for word in name.split("."):
            node = node.setdefault(word, {})
    return tree


def sdxl_to_diffusers(keys: Iterable[str]) -> dict[str, str]:
    """Each key of an SDXL file in diffusers' spelling -> the key itself.

    Raises where the app does: a prefix that it does not know, or keys in both spellings.
    """
    table = beginnings()
    ordered = sorted(table)
    found, converted, others = {}, 0, 0
    for key in keys:
        if not key.startswith(_SDXL_PREFIXES):
            raise _Refused(f"SDXL keys must start with {', '.join(_SDXL_PREFIXES)}, and {key} does not")
        new = key
        if key.startswith("lora_unet_"):
            if begins := to_diffusers(key.removeprefix("lora_unet_"), table, ordered):
                new, converted = key.replace(*begins), converted + 1
            else:
                others += 1
        found[new] = key
    if converted and others:
        raise _Refused(f"{converted} of its UNet keys are in the original spelling, but {others} are not")
    return found
