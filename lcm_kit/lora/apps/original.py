"""The table that several apps have between SDXL's original names and diffusers', by the beginnings of names.

A copy of it is in InvokeAI `patches/lora_conversions/sdxl_lora_conversion_utils.py`, SD.Next
`modules/lora/lora_convert.py` and sd-scripts `library/sdxl_model_util.py`: `make_unet_conversion_map`.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping

from lcm_kit.lora.apps.loaded import joined

_RESNET = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "out_layers.0": "norm2", "out_layers.3": "conv2",
    "emb_layers.1": "time_emb_proj", "skip_connection": "conv_shortcut",
}  # fmt: skip


def beginnings(blocks: int = 3) -> dict[str, str]:
    """Beginnings of joined original names -> diffusers', for a UNet of `blocks` blocks down and up."""
    table, resnets = _middle_and_ends()
    for i in range(blocks):
        for j in range(2):
            resnets[f"input_blocks.{3 * i + j + 1}.0"] = f"down_blocks.{i}.resnets.{j}"
            if i < 3:
                table[f"input_blocks.{3 * i + j + 1}.1"] = f"down_blocks.{i}.attentions.{j}"
        for j in range(3):
            resnets[f"output_blocks.{3 * i + j}.0"] = f"up_blocks.{i}.resnets.{j}"
            table[f"output_blocks.{3 * i + j}.1"] = f"up_blocks.{i}.attentions.{j}"
        if i < 3:
            table[f"input_blocks.{3 * i + 3}.0.op"] = f"down_blocks.{i}.downsamplers.0.conv"
            table[f"output_blocks.{3 * i + 2}.2"] = f"up_blocks.{i}.upsamplers.0"
    for sgm, diffusers in resnets.items():
        table |= {f"{sgm}.{a}": f"{diffusers}.{b}" for a, b in _RESNET.items()}
    return {joined(sgm): joined(diffusers) for sgm, diffusers in table.items()}


def _middle_and_ends() -> tuple[dict[str, str], dict[str, str]]:
    table = {
        "input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out",
        "middle_block.1": "mid_block.attentions.0",
    }  # fmt: skip
    for j in range(2):
        table[f"time_embed.{2 * j}"] = f"time_embedding.linear_{j + 1}"
        table[f"label_emb.0.{2 * j}"] = f"add_embedding.linear_{j + 1}"
    return table, {f"middle_block.{2 * j}": f"mid_block.resnets.{j}" for j in range(2)}


def to_diffusers(name: str, table: Mapping[str, str], ordered: list[str]) -> tuple[str, str] | None:
    """The beginning of the joined `name` that is in the table, and what stands for it; None if none is.

    `ordered` are the table's keys, sorted: like the apps, it looks at the nearest one only.
    """
    nearest = ordered[bisect.bisect_right(ordered, name) - 1]
    return (nearest, table[nearest]) if name.startswith(nearest) else None
