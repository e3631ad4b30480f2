"""Pipelines that know where they are and in what they compute, without a look through all their modules.

diffusers looks for hooks of offloading in each module, several times a call, and for a dtype too: with a LoRA
beside the layers there are thousands of them. What the kit draws with has no such hooks.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch


@cache
def placed(kind: type[Any]) -> type[Any]:
    """The class of pipelines `kind`, whose `device` is that of the UNet's first weight."""

    def device(pipe: Any) -> torch.device:
        return next(pipe.unet.parameters()).device

    here = property(device)
    own = {"device": here, "_execution_device": here, "__module__": kind.__module__}
    return type(kind.__name__, (kind,), own)


def place(pipe: Any) -> tuple[torch.device, torch.dtype]:
    """Where the UNet is, and in what it computes: of a float weight, for quantised ones lie as integers."""
    weights = (weight for weight in pipe.unet.parameters() if weight.is_floating_point())
    first = next(weights)
    return first.device, first.dtype
