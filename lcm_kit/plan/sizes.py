"""Bytes in closed form: weights, moments, what kernels hold besides."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lcm_kit.config.schema import Training
from lcm_kit.plan.dry_run import Weights

FLOAT = 4  # bytes of a float32
GIB = 2**30
# nf4: half a byte, the scale of 64 weights in one byte, that of 256 scales in four (double quantisation)
_NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
_ADAM8_SMALL = 4096  # tensors below keep float32 moments
_CUDA_ALLOWANCE = 128 * 2**20  # workspaces of cuBLAS and cuDNN: an allowance, not measured
_CPU_ALLOWANCE = 24 * 2**20  # objects of Python and primitives of oneDNN, measured (docs/plan.md)

Parts = Mapping[str, int]  # bytes by what they are for


def dtype_of(config: Training, device: str) -> torch.dtype:
    """Of the frozen weights: `precision`, where auto is float32 on a CPU and float16 else."""
    auto = "float32" if device == "cpu" else "float16"
    return getattr(torch, auto if config.precision == "auto" else config.precision)


def base_bytes(config: Training, weights: Weights, dtype: torch.dtype) -> int:
    """Of the frozen base: quantised linear layers, the rest in `dtype`."""
    kind = config.memory.quantize
    few = {"none": 0.0, "nf4": _NF4 * weights.quantizable, "int8": weights.quantizable + FLOAT * weights.rows}
    plain = weights.base - (weights.quantizable if kind != "none" else 0)
    return round(plain * dtype.itemsize + few[kind])


def moment_bytes(config: Training, weights: Weights) -> int:
    """Of AdamW's two moments: float32, or 8 bits with a float32 scale for 256 of them."""
    if config.optimizer.name == "adamw":
        return 2 * FLOAT * sum(weights.lora)
    small = sum(n for n in weights.lora if n < _ADAM8_SMALL)
    large = sum(n for n in weights.lora if n >= _ADAM8_SMALL)
    return 2 * FLOAT * small + round(2 * large * (1 + FLOAT / 256))


def workspace(weights: Weights, dtype: torch.dtype, device: str, *, expanded: bool = False) -> int:
    """What kernels hold besides: a layer's weights, `expanded` from few bits or reordered by oneDNN."""
    largest = weights.widest * dtype.itemsize if expanded else 0
    if device == "cuda":
        return _CUDA_ALLOWANCE + largest
    return _CPU_ALLOWANCE + max(largest, weights.largest * dtype.itemsize)


def allowance(device: str) -> int:
    """What any computation takes besides its tensors."""
    return _CUDA_ALLOWANCE if device == "cuda" else _CPU_ALLOWANCE
