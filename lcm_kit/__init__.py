"""Distils a Stable Diffusion base into a few-step LoRA, checks it and proves it on a picture.

What a program calls is here by name, `lcm_kit.distill(...)`, and is loaded when it is first asked for:
`import lcm_kit` alone costs nothing. The types are in `__init__.pyi`, the guide is docs/api.md.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PLACES = {
    "UserError": "lcm_kit.errors",
    "load_config": "lcm_kit.api.stages",
    "encode": "lcm_kit.api.stages",
    "train": "lcm_kit.api.stages",
    "distill": "lcm_kit.api.stages",
    "finetune": "lcm_kit.api.stages",
    "evaluate": "lcm_kit.api.stages",
    "write_report": "lcm_kit.api.stages",
    "Finetuned": "lcm_kit.api.stages",
    "caption": "lcm_kit.api.captions",
    "accept_captions": "lcm_kit.api.captions",
    "export_run": "lcm_kit.api.lora_files",
    "verify": "lcm_kit.api.lora_files",
    "convert": "lcm_kit.api.lora_files",
    "merge": "lcm_kit.api.lora_files",
    "fuse": "lcm_kit.api.lora_files",
    "recommended_for": "lcm_kit.api.lora_files",
    "sample_images": "lcm_kit.api.pictures",
    "load_into": "lcm_kit.api.pictures",
    "Client": "lcm_kit.api.client",
    "edit": "lcm_kit.api.editing",
    "save_animation": "lcm_kit.api.animations",
}
__all__ = ["__version__", *_PLACES]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(_PLACES[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted(__all__)
