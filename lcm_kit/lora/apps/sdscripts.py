"""sd-scripts, as it loads a LoRA to train on or to draw with: kohya's names, down and up, and nothing else.

Sources: sd-scripts `networks/lora.py` (`create_network_from_weights`, `convert_diffusers_to_sai_if_needed`,
`LoRANetwork`) and `library/sdxl_model_util.py`, at 48d368fa. It makes a layer for each name that it finds in
its own model, and fills it by `load_state_dict(strict=False)`: other shapes stop it, other keys are passed
over.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lcm_kit.lora.apps.loaded import LEFT_OUT, Loaded, Taken, groups, load, refusal, take
from lcm_kit.lora.apps.original import beginnings
from lcm_kit.lora.structure import Shape, Structure

# Outside of the classes in which it looks for layers
_OUTSIDE = ("conv_in", "conv_out", "time_embedding", "add_embedding", "class_embedding")
_MID = "leaves the third factor (lora_mid) out"


def sdscripts(tensors: Mapping[str, Tensor], structure: Structure) -> Loaded:
    """What sd-scripts' `networks.lora` would change."""
    places = _places(structure)
    spelled = {key: key for key in tensors if "." in key}
    if structure.family.kohya_original:
        spelled = _to_original(tensors)
    taken: dict[str, Taken] = {}
    remarks: dict[str, str] = {}
    for name, keys in groups(spelled).items():
        roles = {role: spelled[key] for role, key in keys.items()}
        module = places.get(name)
        if module is None or "lora_down.weight" not in roles:
            continue
        if odd := _misfit(tensors, structure.modules[module], roles):
            return refusal(tensors, f"it stops at {odd}, which has another shape than its layer")
        if one := take({role: key for role, key in roles.items() if role != "lora_mid.weight"}, ("LoRA",)):
            taken[module] = one  # a down without its up does nothing: the up stays at zero
            for role, words in (("dora_scale", LEFT_OUT), ("lora_mid.weight", _MID)):
                remarks |= {module: words} if role in roles else {}
    loaded = load(tensors, taken, remarks=remarks)
    # an alpha of 0 counts as none
    return loaded._replace(modules={module: value or 1.0 for module, value in loaded.modules.items()})


def _places(structure: Structure) -> dict[str, str]:
    """The names of its own layers -> our modules."""
    found = {}
    for module, name in structure.kohya.items():
        part, _, rest = module.partition(".")
        if not (part == "unet" and rest.startswith(_OUTSIDE)) and not rest.startswith("text_projection"):
            found[name] = module
    return found


def _to_original(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """SDXL's keys in the original spelling -> the file's keys."""
    keys = [key for key in tensors if "." in key]
    if not any("down_blocks" in key or "up_blocks" in key for key in keys):
        return {key: key for key in keys}
    table = {diffusers: sgm for sgm, diffusers in beginnings().items()}
    found = {}
    for key in keys:
        name, dot, role = key.partition(".")
        if name.startswith("lora_unet_") and (inner := next((ours for ours in table if ours in name), None)):
            name = name.replace(inner, table[inner])
        found[name + dot + role] = key
    return found


def _misfit(tensors: Mapping[str, Tensor], weight: Shape, roles: Mapping[str, str]) -> str | None:
    """The key whose tensor is of another shape than the layer that is made for it."""
    down, up = roles["lora_down.weight"], roles.get("lora_up.weight")
    rank = int(tensors[down].shape[0]) if tensors[down].ndim else 0
    shapes = {down: (rank, *weight[1:])}
    shapes |= {up: (weight[0], rank, *(1,) * (len(weight) - 2))} if up else {}
    return next((key for key, shape in shapes.items() if tuple(tensors[key].shape) != shape), None)
