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

__all__ = ["APPS", "CHECKED", "TITLES", "VERSIONS", "WHOLE", "Loaded"]

APPS: dict[str, Callable[[Mapping[str, Tensor], Structure], Loaded]] = {
    "comfyui": comfyui,
    "a1111": a1111,
    "forge": forge,
    "invokeai": invokeai,
}
TITLES = {"comfyui": "ComfyUI", "a1111": "A1111", "forge": "Forge", "invokeai": "InvokeAI"}
VERSIONS = {"comfyui": "0.19.3", "a1111": "1.10.1", "forge": "dfdcbab", "invokeai": "6.14.0-alpha"}
"""In which the rules were read, and what a card says checked."""
CHECKED = "2026-11-28"  # when
WHOLE = ("comfyui", "a1111", "forge", "invokeai")
"""The apps that load this kit's kohya file whole: `delivery` writes none that they would not."""
