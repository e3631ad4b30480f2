"""What each app would load of a LoRA file, worked out from that app's own naming rules.

The rules are those for the layers of a LoRA; what an app makes of other kinds (LoHa, DoRA, a norm's weights)
is not followed. Names decide: that the shapes fit is for the reader to check (`lcm_kit.export.reading`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from lcm_kit.export.apps.a1111 import a1111
from lcm_kit.export.apps.comfyui import comfyui
from lcm_kit.export.apps.forge import forge
from lcm_kit.export.apps.invokeai import invokeai
from lcm_kit.export.apps.loaded import Loaded
from lcm_kit.export.structure import Structure

__all__ = ["APPS", "TITLES", "Loaded"]

APPS: dict[str, Callable[[Mapping[str, Tensor], Structure], Loaded]] = {
    "comfyui": comfyui,
    "a1111": a1111,
    "forge": forge,
    "invokeai": invokeai,
}
TITLES = {"comfyui": "ComfyUI", "a1111": "A1111", "forge": "Forge", "invokeai": "InvokeAI"}
