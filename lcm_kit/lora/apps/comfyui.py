"""ComfyUI: a table of names, each looked for in the file with each of the endings that it knows.

Sources: ComfyUI `comfy/lora.py` (names), `comfy/weight_adapter/` (endings, strength, `weight_decompose`) and
`comfy/utils.py` (`unet_to_diffusers`), at 41444b5 and after. The header is never read. A key that
matches nothing is only logged.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from lcm_kit.lora.apps.loaded import (
    BASE_NORM,
    ROLES,
    Loaded,
    Taken,
    bias,
    dora_remarks,
    joined,
    load,
    original,
    refusal,
    take,
    targets,
)
from lcm_kit.lora.structure import Structure

# Endings of (up, down, mid) behind a name; the first one whose up is in the file counts.
_ENDINGS: tuple[tuple[str, str, str | None], ...] = (
    (".lora_up.weight", ".lora_down.weight", ".lora_mid.weight"),
    ("_lora.up.weight", "_lora.down.weight", None),
    (".lora_B.weight", ".lora_A.weight", None),
    (".lora.up.weight", ".lora.down.weight", None),
    (".lora_B", ".lora_A", None),
    (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight", None),
    (".lora_B.default.weight", ".lora_A.default.weight", None),
)

_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "conv_norm_out": "out.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "class_embedding.linear_1": "label_emb.0.0",
    "class_embedding.linear_2": "label_emb.0.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "norm2": "out_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_TRANSFORMER_BLOCK = (
    *(f"attn{k}.to_{end}" for k in (1, 2) for end in ("q", "k", "v", "out.0")),
    "ff.net.0.proj",
    "ff.net.2",
    *(f"norm{k}" for k in (1, 2, 3)),
)
# Of two in one file the last counts
_KINDS = ("full difference", "norm", "LoKr", "LoHa", "LoRA")
# Without these beside them the loader stops, or does when it applies the file
_BEGUN = ("lora_up.weight", "hada_w1_a", "lokr_w1", "lokr_w1_a", "lokr_w2", "lokr_w2_a")
_CLIP = ("mlp.fc1", "mlp.fc2", *(f"self_attn.{end}_proj" for end in ("k", "q", "v", "out")))
_CLIP_LAYERS = 32


def comfyui(tensors: Mapping[str, Tensor], structure: Structure) -> Loaded:
    """What ComfyUI's LoRA loader would change."""
    modules = targets(tensors, structure)
    own = {f"lora_prior_unet_{joined(sgm)}": module for module, sgm in original(structure, modules).items()}
    for part, clip in _encoders(structure).items():
        for module in _clip_modules():
            own[f"text_encoders.{clip}.transformer.{module}"] = f"{part}.{module}"
    table = own | names(structure, modules)
    return load_or_refuse(tensors, match(tensors, table, _ENDINGS)[0], modules)


def load_or_refuse(
    tensors: Mapping[str, Tensor],
    found: Sequence[tuple[str, Mapping[str, str]]],
    modules: Mapping[str, tuple[int, ...]],
) -> Loaded:
    """The modules that the base has; what is begun and not whole stops the loader (KeyError).

    Of two entries for one module the later one counts.
    """
    taken: dict[str, Taken] = {}
    for module, keys in found:
        one = take(keys, _KINDS, extra=("dora_scale", "diff_b"))
        if one is None and (begun := next((keys[role] for role in _BEGUN if role in keys), None)):
            return refusal(tensors, f"it stops at {begun}, because {_missing(keys)} is missing")
        one = one or bias(keys)
        if one is not None and module in modules:
            taken[module] = one
    return load(tensors, taken, remarks=dora_remarks(tensors, taken, modules, BASE_NORM))


def _missing(keys: Mapping[str, str]) -> str:
    if (up := keys.get("lora_up.weight")) is not None:
        return up.replace("lora_up", "lora_down").replace("lora_B", "lora_A").replace(".up.", ".down.")
    return "a factor"


def match(
    tensors: Mapping[str, Tensor],
    table: Mapping[str, str],
    endings: Sequence[tuple[str, str, str | None]],
) -> tuple[list[tuple[str, Mapping[str, str]]], set[str]]:
    """The keys by role for the modules that the table leads to, and the keys that the app takes as known."""
    found: list[tuple[str, Mapping[str, str]]] = []
    known: set[str] = set()
    plain = [role for role in ROLES if not role.startswith("lora_") and role != "scale"]
    for name, module in table.items():
        keys = {role: f"{name}.{role}" for role in plain if f"{name}.{role}" in tensors}
        for up, down, mid in endings:
            if name + up in tensors:
                keys |= {"lora_up.weight": name + up}
                keys |= {"lora_down.weight": name + down} if name + down in tensors else {}
                keys |= {"lora_mid.weight": name + mid} if mid and name + mid in tensors else {}
                break
        if keys:
            found.append((module, keys))
            known |= set(keys.values())  # an alpha also without the rest
    return found, known


def names(structure: Structure, modules: Iterable[str]) -> dict[str, str]:
    """All names that ComfyUI and Forge share -> our module, also such as the base lacks (`?` in front)."""
    ours = {sgm: module for module, sgm in original(structure, modules).items()}
    table: dict[str, str] = {}
    for sgm, module in ours.items():
        table |= {f"lora_unet_{joined(sgm)}": module, f"diffusion_model.{sgm}": module}
    for diffusers, sgm in unet_to_diffusers(structure.unet).items():
        module = ours.get(sgm, f"?{sgm}")
        # the attention processors of diffusers before 0.21, whose `to_out_lora` was for `to_out.0`
        dotted = diffusers.replace(".to_", ".processor.to_")
        dotted = dotted.removesuffix(".0") if dotted.endswith(".to_out.0") else dotted
        table |= {f"{prefix}{joined(diffusers)}": module for prefix in ("lora_unet_", "lycoris_")}
        table |= {f"{prefix}{dotted}": module for prefix in ("", "unet.")}
    return table | _clip_names(structure, modules)


def _encoders(structure: Structure) -> dict[str, str]:
    """Our name of each text encoder -> the app's."""
    held = {module.partition(".")[0] for module in structure.modules}
    return {part: clip.name for part, clip in structure.generation.text.items() if part in held}


def _clip_modules() -> Iterable[str]:
    return (f"text_model.encoder.layers.{k}.{end}" for k in range(_CLIP_LAYERS) for end in _CLIP)


def _clip_names(structure: Structure, modules: Iterable[str]) -> dict[str, str]:
    prefixes = {"text_encoder": ("lora_te_", "lora_te1_"), "text_encoder_2": ("lora_te2_",)}
    table: dict[str, str] = {}
    for part in _encoders(structure):
        for module in _clip_modules():
            name = f"{part}.{module}"
            if name in structure.modules:
                table |= {f"{prefix}{joined(module)}": name for prefix in prefixes[part]}
                table[name] = name
        projection = f"{part}.text_projection"  # OneTrainer's; of the first encoder it is not in use
        if projection in modules:
            table |= {f"{prefix}text_projection": projection for prefix in prefixes[part]}
    return table


def unet_to_diffusers(unet: Iterable[str]) -> dict[str, str]:
    """The app's arithmetic from diffusers' names to its own, for a UNet with these modules.

    How many residual blocks and transformer blocks there are is the UNet's; the numbers are the app's.
    """
    resnets, depths = _counts(unet)
    table = dict(_OUTSIDE)
    for x, count in enumerate(resnets):
        first = 1 + (count + 1) * x
        for i in range(count):
            table |= _renamed(f"down_blocks.{x}.resnets.{i}", f"input_blocks.{first + i}.0", _RESNET)
            place = f"down_blocks.{x}.attentions.{i}"
            table |= _renamed(place, f"input_blocks.{first + i}.1", _attention(depths[place]))
        table[f"down_blocks.{x}.downsamplers.0.conv"] = f"input_blocks.{first + count}.0.op"
    place = "mid_block.attentions.0"
    table |= _renamed(place, "middle_block.1", _attention(depths[place]))
    for i, n in enumerate((0, 2)):
        table |= _renamed(f"mid_block.resnets.{i}", f"middle_block.{n}", _RESNET)
    for x, count in enumerate(reversed(resnets)):
        first = (count + 1) * x
        for i in range(count + 1):
            table |= _renamed(f"up_blocks.{x}.resnets.{i}", f"output_blocks.{first + i}.0", _RESNET)
            place = f"up_blocks.{x}.attentions.{i}"
            table |= _renamed(place, f"output_blocks.{first + i}.1", _attention(depths[place]))
        behind = 2 if depths[place] else 1
        table[f"up_blocks.{x}.upsamplers.0.conv"] = f"output_blocks.{first + count}.{behind}.conv"
    return table


def _counts(unet: Iterable[str]) -> tuple[list[int], Counter[str]]:
    """Residual blocks of each down block, and transformer blocks of each attention."""
    resnets, blocks = set(), set()
    for name in unet:
        if match := re.match(r"down_blocks\.(\d+)\.resnets\.(\d+)\.", name):
            resnets.add((int(match[1]), int(match[2])))
        elif match := re.match(r"(.+\.attentions\.\d+)\.transformer_blocks\.(\d+)\.", name):
            blocks.add((match[1], match[2]))
    per_block = Counter(x for x, _ in resnets)
    return [per_block[x] for x in sorted(per_block)], Counter(place for place, _ in blocks)


def _attention(depth: int) -> dict[str, str]:
    """What is in an attention of `depth` transformer blocks; the app calls it as diffusers does."""
    inner = [f"transformer_blocks.{k}.{end}" for k in range(depth) for end in _TRANSFORMER_BLOCK]
    return {name: name for name in ("norm", "proj_in", "proj_out", *inner)} if depth else {}


def _renamed(place: str, target: str, inner: Mapping[str, str]) -> dict[str, str]:
    return {f"{place}.{ours}": f"{target}.{theirs}" for ours, theirs in inner.items()}
