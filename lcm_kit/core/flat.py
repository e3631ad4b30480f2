"""Many tensors that lie in one: what is done to each of them is then one kernel instead of hundreds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def whole(tensors: Sequence[Tensor], *, in_order: bool = False) -> Tensor | None:
    """The 1-D tensor that `tensors` are all the parts of, sharing its memory; None if there is none.

    They must lie in one storage without a gap between them, of one dtype, each dense and no two of them the
    same; in any order, unless `in_order`.
    """
    if not tensors:
        return None
    first = tensors[0]
    storage, dtype = _address(first), first.dtype
    begin = end = first.storage_offset()
    total = 0
    for tensor in tensors:
        offset = tensor.storage_offset()
        if tensor.dtype != dtype or _address(tensor) != storage or not _dense(tensor):
            return None
        if in_order and offset != begin + total:
            return None
        total += tensor.numel()
        begin, end = min(begin, offset), max(end, offset + tensor.numel())
    if end - begin != total:
        return None
    return first.detach().as_strided((total,), (1,), begin)


def clip_grad_norm_(parameters: Sequence[Tensor], most: float) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_`: in place, and the L2 norm before; two kernels of gradients in one."""
    one = whole([p.grad for p in parameters if p.grad is not None])
    if one is None:
        return torch.as_tensor(torch.nn.utils.clip_grad_norm_(parameters, most))
    norm: Tensor = torch.linalg.vector_norm(one)
    one *= (most / (norm + 1e-6)).clamp(max=1)
    return norm


def _address(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _dense(tensor: Tensor) -> bool:
    if tensor.is_contiguous():
        return True
    return tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)


def flattened(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies of `tensors`, detached, which lie in one as the originals do, of the same order and strides."""
    one = whole(tensors)
    if one is None:
        return [tensor.detach().clone() for tensor in tensors]
    begin, copy = one.storage_offset(), one.clone()
    return [
        copy.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset() - begin) for tensor in tensors
    ]


def alike(first: Sequence[Tensor], second: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """`first` and `second`, of the same shapes, detached; each as one tensor if both lie so, in one order."""
    a, b = whole(first), whole(second)
    if a is not None and b is not None:
        shift = a.storage_offset() - b.storage_offset()
        if all(
            x.storage_offset() - y.storage_offset() == shift and x.stride() == y.stride()
            for x, y in zip(first, second, strict=True)
        ):
            return [a], [b]
    return [tensor.detach() for tensor in first], [tensor.detach() for tensor in second]
