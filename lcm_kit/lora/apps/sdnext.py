"""SD.Next, by its native loader: diffusers' own modules, joined names, SDXL's original spelling by a table.

Sources: SD.Next `modules/lora/lora_load.py` (keys, bundled embeddings), `lora_convert.py` (names),
`network_*.py` (what is accepted) and `network.py` (strength, DoRA), at 058a7f0c. The header is read for the
list of files only. A name that leads nowhere is only logged, and so is a layer of which nothing can be made.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lcm_kit.lora.apps.loaded import Loaded, Taken, bundled, joined, load, refusal, take, targets
from lcm_kit.lora.apps.original import beginnings, to_diffusers
from lcm_kit.lora.structure import Structure

_KINDS = ("LoRA", "LoHa", "LoKr", "full difference", "norm")
_PARTS = ("clip_l", "clip_g", "t5", "unet", "transformer")  # of keys with dots
_ENDS = ("alpha", "weight", "lora_up", "lora_down")
_PREFIXES = ("lora_unet_", "lora_te1_", "lora_te2_")


def sdnext(tensors: Mapping[str, Tensor], structure: Structure) -> Loaded:
    """What SD.Next would change."""
    modules = targets(tensors, structure)
    first = "lora_te1_" if len(structure.family.text_parts) > 1 else "lora_te_"
    prefixes = {"unet": "lora_unet_", "text_encoder": first, "text_encoder_2": "lora_te2_"}
    apart = {name: name.partition(".")[::2] for name in modules}
    places = {prefixes[part] + joined(rest): name for name, (part, rest) in apart.items()}
    containers = {
        prefixes[part] + joined(rest[:k])
        for part, rest in apart.values()
        for k, c in enumerate(rest)
        if c == "."
    }
    landed: dict[str, dict[str, str]] = {}
    table = beginnings(blocks=4)
    ordered = sorted(table)
    for key in tensors:
        if not bundled(key):
            name, role = _apart(key)
            landed.setdefault(_place(name, table, ordered), {})[role] = key
    taken = {}
    for place, keys in landed.items():
        one = _taken(keys)
        if place in containers and one is not None and one.kind == "LoRA":
            return refusal(tensors, f"it stops at {next(iter(keys.values()))}, which is a block and no layer")
        if place in places and one is not None:
            taken[places[place]] = one
    return load(tensors, taken, [key for key in tensors if bundled(key)])


def _taken(keys: Mapping[str, str]) -> Taken | None:
    """A norm needs its bias beside it."""
    one = take(keys, _KINDS, extra=("scale", "dora_scale", "diff_b"))
    return None if one is not None and one.kind == "norm" and "b_norm" not in keys else one


def _apart(key: str) -> tuple[str, str]:
    """The joined name of the module that a key is for, and its role."""
    words = key.split(".")
    if words[0] in _PARTS:
        k = len(words)
        while k > 1 and words[k - 1] in _ENDS:
            k -= 1
        name = "_".join(words[:k])
        name = f"lora_{name}" if name.startswith(("unet", "transformer")) else name
        name = name.replace("clip_g", "lora_te2").replace("clip_l", "lora_te")
        return name, ".".join(words[k:])
    if len(words) > 5:  # peft's
        name = "_".join(words[:-2])
        role = ".".join(words[-2:]).replace("lora_A", "lora_down").replace("lora_B", "lora_up")
        return (name if name.startswith("lora_") else f"lora_{name}"), role
    name, _, role = key.partition(".")
    return name, role


def _place(name: str, table: Mapping[str, str], ordered: list[str]) -> str:
    """The name in diffusers' spelling."""
    name = name.replace("diffusion_model", "lora_unet")
    bare = name
    for prefix in _PREFIXES:
        bare = bare.replace(prefix, "")
    begins = to_diffusers(bare, table, ordered)
    return name.replace(*begins) if begins else name
