"""What each app would load of a LoRA file, worked out from that app's own rules for names and kinds.

The rules cover LoRA, LoHa, LoKr, full differences, norms, and DoRA on top; what an app makes of other kinds
(OFT, IA3, GLoRA) is not followed. Names decide: that the shapes fit is for the reader to check
(`lcm_kit.lora.reading`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from lcm_kit.lora.apps.a1111 import a1111
from lcm_kit.lora.apps.comfyui import comfyui
from lcm_kit.lora.apps.forge import forge
from lcm_kit.lora.apps.invokeai import invokeai
from lcm_kit.lora.apps.loaded import NOT_JUDGED, Loaded
from lcm_kit.lora.apps.sdcpp import sdcpp
from lcm_kit.lora.apps.sdnext import sdnext
from lcm_kit.lora.apps.sdscripts import sdscripts
from lcm_kit.lora.structure import Structure

__all__ = ["APPS", "CHECKED", "NOT_JUDGED", "TITLES", "VERSIONS", "WHOLE", "Loaded", "able"]

APPS: dict[str, Callable[[Mapping[str, Tensor], Structure], Loaded]] = {
    "comfyui": comfyui,
    "a1111": a1111,
    "forge": forge,
    "invokeai": invokeai,
    "sdnext": sdnext,
    "sd-scripts": sdscripts,
    "sd.cpp": sdcpp,
}
TITLES = {
    "comfyui": "ComfyUI", "a1111": "A1111", "forge": "Forge", "invokeai": "InvokeAI", "sdnext": "SD.Next",
    "sd-scripts": "sd-scripts", "sd.cpp": "stable-diffusion.cpp",
}  # fmt: skip
VERSIONS = {
    "comfyui": "0.19.3", "a1111": "1.10.1", "forge": "dfdcbab", "invokeai": "6.14.0-alpha",
    "sdnext": "058a7f0c", "sd-scripts": "48d368fa", "sd.cpp": "97d29908",
}  # fmt: skip
"""In which the rules were read, and what a card says checked."""
CHECKED = "2026-11-28"  # when
WHOLE = ("comfyui", "a1111", "forge", "invokeai", "sdnext")
"""The apps that must load this kit's kohya file whole: `delivery` writes none that they would not.

The two others have gaps of their own, which are reported and stop nothing: sd-scripts looks for no layers
outside of blocks, and stable-diffusion.cpp drops q, k and v of SD2.x's text encoder."""


def able(structure: Structure) -> tuple[str, ...]:
    """The apps that can load a base with these blocks, whatever its width; none if nobody published them."""
    blocks = structure.blocks
    return () if blocks is None else tuple(app for app in APPS if app not in blocks.unknown_to)
