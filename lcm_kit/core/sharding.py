"""A tensor that is sharded over processes (torch's DTensor), and the whole of it."""

from __future__ import annotations

from torch import Tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """`tensor`, put together where it is sharded over processes, all of which must call this."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor`, which is whole on every process, sharded as `like` is."""
    if not hasattr(like, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)  # type: ignore[attr-defined]
