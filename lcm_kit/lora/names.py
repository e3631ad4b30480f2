"""How the two spellings of a UNet's modules map to each other, and what a kohya file calls a module.

diffusers' spelling: `down_blocks.1.attentions.0.proj_in`. The original (sgm) spelling of Stability's
checkpoints: `input_blocks.4.1.proj_in`. A kohya file joins either with `_` behind `lora_unet_`; SD1.x and 2.x
files use diffusers' spelling, SDXL files the original one (sd-scripts, `networks/lora.py` and
`library/sdxl_original_unet.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from lcm_kit.errors import UserError
from lcm_kit.families import Family

# Within a residual block (`ResBlock` of the original code)
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
# Outside of the blocks
_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def sgm_names(modules: Iterable[str]) -> dict[str, str]:
    """The original spelling of each module of a UNet, from the list of its modules (no part in front).

    The original code numbers its blocks through: every residual block opens one, and so does a downsampler;
    an attention and an upsampler join the block before them. So the numbers follow from which modules there
    are, also for a pruned UNet.
    """
    modules = list(modules)
    blocks = _block_names(modules)
    found = {}
    for module in modules:
        if module in _ENDS:
            found[module] = _ENDS[module]
            continue
        match = re.match(r"((?:down_blocks|up_blocks)\.\d+|mid_block)\.(\w+)\.(\d+)\.(.+)", module)
        if match is None or (block := ".".join(match.groups()[:3])) not in blocks:
            continue
        inner, kind = match[4], match[2]
        if kind == "resnets":
            inner = _RESNET.get(inner, inner)
        elif kind == "downsamplers":
            inner = inner.replace("conv", "op", 1)
        found[module] = f"{blocks[block]}.{inner}"
    return found


def _block_names(modules: list[str]) -> dict[str, str]:
    """`down_blocks.1.attentions.0` -> `input_blocks.4.1`, for all such blocks."""
    pieces: dict[str, set[tuple[str, int]]] = {}
    for module in modules:
        if match := re.match(r"((?:down_blocks|up_blocks)\.\d+|mid_block)\.(\w+)\.(\d+)\.", module):
            pieces.setdefault(match[1], set()).add((match[2], int(match[3])))

    def indices(block: str, kind: str) -> list[int]:
        return sorted(k for found, k in pieces[block] if found == kind)

    def ordered(side: str) -> list[str]:
        return sorted((b for b in pieces if b.startswith(side)), key=lambda b: int(b.rpartition(".")[2]))

    names, n = {}, 1  # input_blocks.0 is conv_in
    for block in ordered("down_blocks"):
        for k in indices(block, "resnets"):
            names[f"{block}.resnets.{k}"] = f"input_blocks.{n}.0"
            if k in indices(block, "attentions"):
                names[f"{block}.attentions.{k}"] = f"input_blocks.{n}.1"
            n += 1
        for k in indices(block, "downsamplers"):
            names[f"{block}.downsamplers.{k}"] = f"input_blocks.{n}.0"
            n += 1
    if "mid_block" in pieces:
        # resnets.0, attentions.0, resnets.1: one after the other
        order = sorted(
            (k + 0.5 * (kind == "attentions"), kind, k)
            for kind, k in pieces["mid_block"]
            if kind in ("resnets", "attentions")
        )
        for place, (_, kind, k) in enumerate(order):
            names[f"mid_block.{kind}.{k}"] = f"middle_block.{place}"
    n = 0
    for block in ordered("up_blocks"):
        last = len(indices(block, "resnets")) - 1
        for k in indices(block, "resnets"):
            names[f"{block}.resnets.{k}"] = f"output_blocks.{n}.0"
            attends = k in indices(block, "attentions")
            if attends:
                names[f"{block}.attentions.{k}"] = f"output_blocks.{n}.1"
            if k == last:
                for up in indices(block, "upsamplers"):
                    names[f"{block}.upsamplers.{up}"] = f"output_blocks.{n}.{1 + attends}"
            n += 1
    return names


def kohya_names(modules: Iterable[str], family: Family) -> dict[str, str]:
    """What a kohya file calls each module (names with their part in front).

    Raises `UserError` if two modules would share a name or one has none: such a file could not be read back.
    """
    modules = list(modules)
    sgm: Mapping[str, str] = {}
    if family.kohya_original:
        sgm = sgm_names(name.removeprefix("unet.") for name in modules if name.startswith("unet."))
    found: dict[str, str] = {}
    for name in modules:
        part, _, module = name.partition(".")
        prefix = family.kohya_prefixes.get(part)
        if prefix is None:
            raise UserError(
                f"{name}: a base of {family.title} has no {part}; check that the LoRA was made for this base"
            )
        spelled = sgm.get(module) if part == "unet" and family.kohya_original else module
        if spelled is None:
            raise UserError(f"{name}: the kohya format has no name for it; export to diffusers only")
        found[name] = f"{prefix}_{spelled.replace('.', '_')}"
    if len(set(found.values())) != len(found):
        seen: dict[str, str] = {}
        first, second = next(
            (seen[key], name) for name, key in found.items() if seen.setdefault(key, name) != name
        )
        raise UserError(f"{first} and {second} would share a name in a kohya file; export to diffusers only")
    return found
