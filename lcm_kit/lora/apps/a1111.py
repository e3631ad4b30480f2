"""A1111: rules that turn what stands before a key's first dot into a module's name in the original code.

Sources: stable-diffusion-webui `extensions-builtin/Lora/networks.py` (names, which modules an attention of
OpenCLIP takes), `network_*.py` (what is accepted) and `network.py` (strength, DoRA), at 873edba and as in
1.10. The header is read for the list of files only. A name that leads nowhere is only logged.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from torch import Tensor

from lcm_kit.lora.apps.loaded import (
    BY_INPUT,
    Loaded,
    Taken,
    bundled,
    dora_remarks,
    groups,
    joined,
    load,
    original,
    refusal,
    take,
    targets,
)
from lcm_kit.lora.structure import Structure

_RESNET = {
    "conv1": "in_layers_2",
    "conv2": "out_layers_3",
    "norm1": "in_layers_0",
    "norm2": "out_layers_0",
    "time_emb_proj": "emb_layers_1",
    "conv_shortcut": "skip_connection",
}
_KINDS = ("LoRA", "LoHa", "LoKr", "full difference", "norm")
_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")


def a1111(tensors: Mapping[str, Tensor], structure: Structure) -> Loaded:
    """What A1111's Lora extension would change."""
    modules = targets(tensors, structure)
    ours = _modules(structure, modules)
    containers = {joined(dotted[:k]) for dotted in ours for k, c in enumerate(dotted) if c == "."}
    places = {joined(dotted): module for dotted, module in ours.items()}
    embeddings = [key for key in tensors if bundled(key)]
    landed: dict[str, dict[str, str]] = {}
    for name, keys in groups(key for key in tensors if not bundled(key)).items():
        candidates = _candidates(name, structure.generation.open_clip == "text_encoder")
        place = next((c for c in candidates if c in places or c in containers), None)
        if place is not None:
            landed.setdefault(place, {}).update(keys)
    taken = {}
    for place, keys in landed.items():
        one = _taken(keys)
        if place not in places or one is None:
            what = "has no weight of its own" if place not in places else "lacks a part that it needs"
            return refusal(tensors, f"it stops at {next(iter(keys.values()))}, whose layer {what}")
        taken[places[place]] = one
    taken = _whole_attentions(taken, structure)
    return load(tensors, taken, embeddings, dora_remarks(tensors, taken, modules, BY_INPUT))


def _taken(keys: Mapping[str, str]) -> Taken | None:
    """The keys of one layer, if they make something; a norm's needs its bias beside it."""
    one = take(keys, _KINDS, extra=("scale", "dora_scale"))
    if one is None and {"lora_B.weight", "lora_A.weight"} <= keys.keys():
        # it keeps these two alone: the alpha is lost
        return Taken(
            "LoRA", {"lora_up.weight": keys["lora_B.weight"], "lora_down.weight": keys["lora_A.weight"]}
        )
    return None if one is not None and one.kind == "norm" and "b_norm" not in keys else one


def _whole_attentions(taken: Mapping[str, Taken], structure: Structure) -> dict[str, Taken]:
    """Without q, k, v and out of an OpenCLIP attention, one tensor in A1111, that are not all four there."""
    part = structure.generation.open_clip

    def kept(module: str) -> bool:
        place, found, _ = module.partition(".self_attn.")
        if not found or module.partition(".")[0] != part:
            return True
        return all(f"{place}{found}{end}" in taken for end in _ATTENTION)

    return {module: one for module, one in taken.items() if kept(module)}


def _modules(structure: Structure, modules: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """A1111's name of each module of the base, with dots, -> ours."""
    open_clip, several = structure.generation.open_clip, len(structure.family.text_parts) > 1
    found = {f"diffusion_model.{sgm}": module for module, sgm in original(structure, modules).items()}
    for name in modules:
        part, _, module = name.partition(".")
        # OpenCLIP's norms have other names, and its projection is no module
        if part == "unet" or (part == open_clip and ".self_attn." not in name and ".mlp." not in name):
            continue
        # several embedders are numbered, as SDXL's
        number = f"{structure.family.text_parts.index(part)}." if several else ""
        if part == open_clip:
            # q, k and v are no modules of their own: the app gets from their names to their attention
            for theirs, clip in (("self_attn", "attn"), ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj")):
                module = module.replace(theirs, clip)
            module = module.replace("text_model.encoder.layers", "model.transformer.resblocks")
            found[f"{number}{module}"] = name
        else:
            found[f"{number}transformer.{module}"] = name
    return found


def _candidates(name: str, first_is_open: bool) -> list[str]:
    """The names that it tries, in their order."""
    found = [_convert(name, first_is_open)]
    if "lora_unet" in name:
        found.append(name.replace("lora_unet", "diffusion_model"))
    elif "lora_te1_text_model" in name:
        found += [name.replace("lora_te1", "0_transformer"), name.replace("lora_te1", "transformer")]
    return found


def _convert(name: str, first_is_open: bool) -> str:
    for pattern, convert in _RULES:
        if match := re.match(pattern, name):
            return convert(match)
    if match := re.match(r"lora_te(2?)_text_model_encoder_layers_(\d+)_(.+)", name):
        if match[1]:
            return f"1_model_transformer_resblocks_{match[2]}_{_openclip_layer(match[3])}"
        if first_is_open:
            return f"model_transformer_resblocks_{match[2]}_{_openclip_layer(match[3])}"
        return f"transformer_text_model_encoder_layers_{match[2]}_{match[3]}"
    return name


def _openclip_layer(layer: str) -> str:
    for theirs, clip in (("mlp_fc1", "mlp_c_fc"), ("mlp_fc2", "mlp_c_proj"), ("self_attn", "attn")):
        if theirs in layer:
            return layer.replace(theirs, clip)
    return layer


def _place(side: str, number: int, kind: str, rest: str) -> str:
    """A residual block is the first thing at its place, an attention the second."""
    if kind == "attentions":
        return f"diffusion_model_{side}_{number}_1_{rest}"
    return f"diffusion_model_{side}_{number}_0_{_RESNET.get(rest, rest)}"


def _middle(kind: str, number: int, rest: str) -> str:
    if kind == "attentions":
        return f"diffusion_model_middle_block_1_{rest}"
    return f"diffusion_model_middle_block_{2 * number}_{_RESNET.get(rest, rest)}"


# The numbers are SD1.x's: three places to a block, and an upsampler behind an attention in all blocks but the
# first. SDXL has an attention in its first up block too, so its `up_blocks_0_upsamplers_0_conv` is lost.
_RULES: tuple[tuple[str, Callable[[re.Match[str]], str]], ...] = (
    (r"lora_unet_conv_in(.*)", lambda m: f"diffusion_model_input_blocks_0_0{m[1]}"),
    (r"lora_unet_conv_out(.*)", lambda m: f"diffusion_model_out_2{m[1]}"),
    (
        r"lora_unet_time_embedding_linear_(\d+)(.*)",
        lambda m: f"diffusion_model_time_embed_{2 * int(m[1]) - 2}{m[2]}",
    ),
    (
        r"lora_unet_down_blocks_(\d+)_(attentions|resnets)_(\d+)_(.+)",
        lambda m: _place("input_blocks", 1 + 3 * int(m[1]) + int(m[3]), m[2], m[4]),
    ),
    (
        r"lora_unet_mid_block_(attentions|resnets)_(\d+)_(.+)",
        lambda m: _middle(m[1], int(m[2]), m[3]),
    ),
    (
        r"lora_unet_up_blocks_(\d+)_(attentions|resnets)_(\d+)_(.+)",
        lambda m: _place("output_blocks", 3 * int(m[1]) + int(m[3]), m[2], m[4]),
    ),
    (
        r"lora_unet_down_blocks_(\d+)_downsamplers_0_conv",
        lambda m: f"diffusion_model_input_blocks_{3 + 3 * int(m[1])}_0_op",
    ),
    (
        r"lora_unet_up_blocks_(\d+)_upsamplers_0_conv",
        lambda m: f"diffusion_model_output_blocks_{2 + 3 * int(m[1])}_{2 if int(m[1]) > 0 else 1}_conv",
    ),
)
