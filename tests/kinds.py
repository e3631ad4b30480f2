"""Tensors of files that are no plain LoRA, as LyCORIS and peft spell them; their deltas in plain steps."""

from __future__ import annotations

import torch
from torch import Tensor

Tensors = dict[str, Tensor]


def loha(shape: tuple[int, ...], rank: int = 3, *, core: bool = False) -> Tensors:
    """Factors of a LoHa for a weight of this shape."""
    out, inner, *kernel = shape
    found = {}
    for n in ("1", "2"):
        if core:
            found |= {f"hada_w{n}_a": torch.randn(rank, out), f"hada_w{n}_b": torch.randn(rank, inner)}
            found[f"hada_t{n}"] = torch.randn(rank, rank, *kernel)
        else:
            size = inner * int(torch.Size(kernel).numel())
            found |= {f"hada_w{n}_a": torch.randn(out, rank), f"hada_w{n}_b": torch.randn(rank, size)}
    return found


def loha_delta(t: Tensors, shape: tuple[int, ...], alpha: float) -> Tensor:
    """alpha / rank times the product of both matrices, entry by entry."""
    halves = []
    for n in ("1", "2"):
        a, b, core = t[f"hada_w{n}_a"], t[f"hada_w{n}_b"], t.get(f"hada_t{n}")
        if core is None:
            halves.append((a @ b).reshape(shape))
        else:
            halves.append(torch.einsum("ijkl,jr,ip->prkl", core, b, a))
    return alpha / t["hada_w1_b"].shape[0] * halves[0] * halves[1]


def lokr(shape: tuple[int, ...], rank: int | None, *, both: bool = False, core: bool = False) -> Tensors:
    """Factors of a LoKr whose first one is [2, 2]; `rank` None: both whole."""
    out, inner, *kernel = shape
    c, d = out // 2, inner // 2
    found = {"lokr_w1": torch.randn(2, 2)}
    if both and rank is not None:
        found = {"lokr_w1_a": torch.randn(2, rank), "lokr_w1_b": torch.randn(rank, 2)}
    if rank is None:
        return found | {"lokr_w2": torch.randn(c, d, *kernel)}
    if core:
        found["lokr_t2"] = torch.randn(rank, rank, *kernel)
        return found | {"lokr_w2_a": torch.randn(rank, c), "lokr_w2_b": torch.randn(rank, d)}
    size = d * int(torch.Size(kernel).numel())
    return found | {"lokr_w2_a": torch.randn(c, rank), "lokr_w2_b": torch.randn(rank, size)}


def lokr_delta(t: Tensors, shape: tuple[int, ...], alpha: float) -> Tensor:
    """alpha / rank times the Kronecker product, block by block; without a rank times 1."""
    out, inner, *kernel = shape
    w1 = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
    if "lokr_w2" in t:
        w2, scale = t["lokr_w2"], 1.0
    else:
        a, b, core = t["lokr_w2_a"], t["lokr_w2_b"], t.get("lokr_t2")
        w2 = a @ b if core is None else torch.einsum("ijkl,jr,ip->prkl", core, b, a)
        scale = alpha / b.shape[0]
    w2 = w2.reshape(out // 2, inner // 2, *kernel)
    rows = [torch.cat([w1[i, j] * w2 for j in range(2)], dim=1) for i in range(2)]
    return scale * torch.cat(rows)


def dora_delta(weight: Tensor, update: Tensor, magnitude: Tensor, axis: int) -> Tensor:
    """Each row (axis 0) or column (axis 1) of W + update at the length that magnitude says, less W."""
    moved = (weight + update).transpose(0, axis)
    rows = [m * row / row.norm() for m, row in zip(magnitude.flatten(), moved, strict=True)]
    return torch.stack(rows).transpose(0, axis) - weight
