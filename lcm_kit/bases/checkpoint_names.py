"""One spelling for the tensors of a checkpoint in one file, whichever program wrote it.

The original layout's: `model.diffusion_model.`, `first_stage_model.`, `cond_stage_model.`, `conditioner.`.
Old merges lack `text_model.` in their text encoder, a UNet alone lacks its prefix, and 8-bit floats may come
with a scale for each weight, which stays behind with the tensors that only its program reads.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from lcm_kit.families.kinds import CHECKPOINT_UNET

_BARE_UNET = ("input_blocks.", "middle_block.", "output_blocks.", "time_embed.", "label_emb.", "out.")
_CLIP = re.compile(
    r"(cond_stage_model|conditioner\.embedders\.0)\.transformer\.(?=embeddings|encoder|final_layer)"
)
_SCALES = (".scale_weight", ".weight_scale")  # ComfyUI's, old and new: weight = scale * what is stored
_UNUSED = (".scale_input", ".input_scale", ".comfy_quant", "scaled_fp8")


@dataclass(frozen=True)
class Names:
    """What of a file is read: its name of each tensor, and of its scale, by the original layout's name."""

    tensors: dict[str, str] = field(default_factory=dict)
    scales: dict[str, str] = field(default_factory=dict)

    @property
    def changed(self) -> bool:
        """Whether the file has to be written anew before anybody else can read it."""
        return bool(self.scales) or any(name != own for name, own in self.tensors.items())


def names_of(keys: Iterable[str]) -> Names:
    """The names of a file with these tensors."""
    keys = list(keys)
    bare = any(key.startswith("input_blocks.") for key in keys)
    found = Names()
    for key in keys:
        standard = _CLIP.sub(r"\1.transformer.text_model.", key)
        if bare and key.startswith(_BARE_UNET):
            standard = CHECKPOINT_UNET + key
        if standard.endswith(_SCALES):
            found.scales[f"{standard.rpartition('.')[0]}.weight"] = key
        elif not standard.endswith(_UNUSED):
            found.tensors[standard] = key
    return found
