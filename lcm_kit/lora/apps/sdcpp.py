"""stable-diffusion.cpp: turns every key, whatever its style, into the name of a tensor of the original model.

Sources: stable-diffusion.cpp `src/name_conversion.cpp` (names) and `src/model/adapter/lora.hpp` (what is
accepted, strength, the fused attention of the second text encoder), at 97d29908. The header is never read. A
key that leads nowhere is only logged.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from lcm_kit.lora.apps.loaded import (
    LEFT_OUT,
    NOT_JUDGED,
    ROLES,
    Loaded,
    Taken,
    bias,
    load,
    original,
    take,
    targets,
)
from lcm_kit.lora.structure import Structure

_KINDS = ("LoRA", "full difference", "LoHa", "LoKr")
_FRONTS = ("lora.", "lora_", "lycoris_", "lycoris.")
_UNKNOWN = ("w_norm", "b_norm", "lokr_t2")  # roles of which it has no endings
# Ending of a key -> its role
_ENDINGS = {
    ".lora_down.weight": "lora_down.weight", ".lora_up.weight": "lora_up.weight",
    ".lora_mid.weight": "lora_mid.weight", ".lora.down.weight": "lora_down.weight",
    ".lora.up.weight": "lora_up.weight", ".lora.mid.weight": "lora_mid.weight",
    "_lora.down.weight": "lora_down.weight", "_lora.up.weight": "lora_up.weight",
    "_lora.mid.weight": "lora_mid.weight", ".lora_A.weight": "lora_down.weight",
    ".lora_B.weight": "lora_up.weight", ".lora_A.default.weight": "lora_down.weight",
    ".lora_B.default.weight": "lora_up.weight", ".lora_A": "lora_down.weight", ".lora_B": "lora_up.weight",
    **{f".{role}": role for role in ROLES if not role.startswith("lora_") and role not in _UNKNOWN},
}  # fmt: skip
# In these an underscore is no dot; all others become one
_WORDS = (
    "self_attn", "out_proj", "q_proj", "k_proj", "v_proj", "to_k", "to_q", "to_v", "to_out", "text_model",
    "down_blocks", "mid_block", "up_block", "proj_in", "proj_out", "transformer_blocks", "diffusion_model",
    "cond_stage_model", "conv_in", "conv_out", "time_emb_proj", "conv_shortcut", "time_embedding",
    "conv_norm_out", "input_blocks", "output_blocks", "middle_block", "skip_connection", "emb_layers",
    "in_layers", "out_layers",
)  # fmt: skip
_PROTECTED = re.compile("|".join(sorted(_WORDS, key=len, reverse=True)))
_PREFIXES = {
    "diffusion_model.": "unet.", "unet.": "unet.", "te.": "text_encoder.", "te1.": "text_encoder.",
    "te2.": "text_encoder_2.", "clip_l.": "text_encoder.", "clip_g.": "text_encoder_2.",
}  # fmt: skip
_BLOCKS = ("down_blocks.", "up_blocks.", "mid_block.")
_FUSED = ("q_proj", "k_proj", "v_proj")


def sdcpp(tensors: Mapping[str, Tensor], structure: Structure) -> Loaded:
    """What stable-diffusion.cpp would change of the original checkpoint."""
    modules = targets(tensors, structure)
    places = _places(structure, modules)
    landed: dict[str, dict[str, str]] = {}
    for key in tensors:
        name, role = _apart(key)
        if role and (module := places.get(name)):
            landed.setdefault(module, {})[role] = key
    extra = ("scale", "diff_b")
    taken = {m: one for m, keys in landed.items() if (one := take(keys, _KINDS, extra) or bias(keys))}
    taken = _fused(taken, structure)
    remarks = {module: LEFT_OUT for module in taken if "dora_scale" in landed[module]}
    remarks |= {module: NOT_JUDGED for module, one in taken.items() if _unsure(tensors, one)}
    return load(tensors, taken, remarks=remarks)


def _unsure(tensors: Mapping[str, Tensor], one: Taken) -> bool:
    """Rank 1, which its code asks of sizes without trailing ones; LoKr's and LoHa's cores."""
    down = one.keys.get("lora_down.weight") or one.keys.get("hada_w1_b")
    of_rank_1 = down is not None and tensors[down].shape[:1] == (1,)
    return of_rank_1 or one.kind == "LoKr" or "hada_t1" in one.keys


def _places(structure: Structure, modules: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Its dotted names, as keys come out, -> our modules."""
    found = {}
    for module, sgm in original(structure, modules).items():
        rest = module.removeprefix("unet.")
        found[f"unet.{sgm}"] = module
        if rest.startswith(_BLOCKS):  # of the others it compares names that no LoRA's key has
            found[module] = module
            found[module.replace(".to_out.0", ".to_out")] = module
    for module in modules:
        part, _, rest = module.partition(".")
        # OpenCLIP's, as SD2.x's, has q, k and v in one tensor, which it looks for in a second encoder only
        lost = structure.generation.open_clip == "text_encoder" and module.endswith(_FUSED)
        if part != "unet" and rest.startswith("text_model.") and not lost:
            found[module] = module
    # what has underscores that it takes for dots, as time_embed and label_emb, is never found
    return {name: module for name, module in found.items() if _dotted(rest := name.partition(".")[2]) == rest}


def _fused(taken: Mapping[str, Taken], structure: Structure) -> dict[str, Taken]:
    """Without those of the second encoder's q, k and v before which one is missing: it joins them in turn."""
    if structure.generation.open_clip != "text_encoder_2":
        return dict(taken)

    def kept(module: str) -> bool:
        place, found, end = module.partition(".self_attn.")
        if not module.startswith("text_encoder_2.") or end not in _FUSED:
            return True
        before = _FUSED[: _FUSED.index(end)]
        return all(f"{place}{found}{each}" in taken for each in before)

    return {module: one for module, one in taken.items() if kept(module)}


def _apart(key: str) -> tuple[str, str]:
    """The name that a key leads to, with its part in front, and its role; "" for one that it knows not."""
    name = next((key.removeprefix(front) for front in _FRONTS if key.startswith(front)), key)
    ending = next((end for end in _ENDINGS if name.endswith(end)), "")
    name = _dotted(name.removesuffix(ending).replace(".processor", "", 1))
    for prefix, part in _PREFIXES.items():
        if name.startswith(prefix):
            return part + name.removeprefix(prefix), _ENDINGS.get(ending, "")
    return (f"unet.{name}" if name.startswith(_BLOCKS) else name), _ENDINGS.get(ending, "")


def _dotted(name: str) -> str:
    """With a dot for each underscore outside of `_WORDS`."""
    return _PROTECTED.sub(lambda word: word[0].replace("_", "\0"), name).replace("_", ".").replace("\0", "_")
