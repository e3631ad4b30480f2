"""Which errors are a device's memory that ran out, and giving back what nothing holds."""

from __future__ import annotations

import gc

import torch

_SAID = (  # in RuntimeErrors of libraries that allocate for themselves
    "CUDNN_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_ALLOC_FAILED", "CUSOLVER_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory", "HIP error: out of memory",
)  # fmt: skip


def out_of_memory(error: RuntimeError) -> bool:
    """Whether memory ran out: torch's own error, or cuDNN's and cuBLAS's, which are plain RuntimeErrors."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in _SAID)


def free() -> None:
    """Give back what nothing refers to, to the GPU too: rings of Python's objects, CUDA's cached blocks."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
