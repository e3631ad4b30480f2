"""Forge: an older copy of ComfyUI's rules, which refuses a file that does not fit.

Sources: stable-diffusion-webui-forge `packages_3rdparty/comfyui_lora_collection/lora.py` (names, endings),
`extensions-builtin/sd_forge_lora/networks.py` (`load_lora_for_models`: the refusal) and
`backend/patcher/lora.py` (strength), at dfdcbab.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lcm_kit.lora.apps.comfyui import load_or_refuse, match, names
from lcm_kit.lora.apps.loaded import Loaded, refusal, targets
from lcm_kit.lora.structure import Structure

_ENDINGS = (
    (".lora_up.weight", ".lora_down.weight", ".lora_mid.weight"),
    ("_lora.up.weight", "_lora.down.weight", None),
    (".lora_B.weight", ".lora_A.weight", None),
    (".lora.up.weight", ".lora.down.weight", None),
    (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight", None),
)
_MOST_UNMATCHED = 12  # tensors


def forge(tensors: Mapping[str, Tensor], structure: Structure) -> Loaded:
    """What Forge would change: all that it knows, or nothing at all."""
    modules = targets(tensors, structure)
    found, known = match(tensors, names(structure, modules), _ENDINGS)
    loaded = load_or_refuse(tensors, found, modules)
    unmatched = [key for key in tensors if key not in known]
    if loaded.refused is None and len(unmatched) > _MOST_UNMATCHED:
        return refusal(
            tensors,
            f"{len(unmatched)} of {len(tensors)} keys match nothing, such as {unmatched[0]}, and more than "
            f"{_MOST_UNMATCHED} are too many for it",
        )
    return loaded
