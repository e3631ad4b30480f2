"""Tensors on their way to a device, without the host waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device | str | None) -> Tensor:
    """`tensor` on `device` (None: where it is); itself if it is there already.

    From pinned memory where it goes from the CPU to a GPU: the copy takes its place among the GPU's work, and
    the host goes on. From any other memory the host would wait until the GPU had done all that it was given.
    """
    if device is None:
        return tensor
    device = torch.device(device)
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
