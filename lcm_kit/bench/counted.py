"""What a step asks of a device whatever its speed: kernels, and bytes kept for the backward; with no GPU.

Both depend on a UNet's structure and not on its width, so they are counted on a narrow one, on the CPU: in
bfloat16, under autocast where a side uses it, as a GPU would be used. On CUDA autocast has norms in float32
besides, which costs the side that uses it more of both than is counted here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lcm_kit.bench.side import Build
from lcm_kit.config.evaluation import Speed
from lcm_kit.config.schema import Memory

# Operators that run nothing on the device, but are no views by their schema
_NOTHING = {"detach", "lift_fresh", "_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty"}


class Kernels(TorchDispatchMode):
    """Counts the operators that are no views within its block, as `found`, by name."""

    def __init__(self) -> None:
        """Nothing is counted yet."""
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count `operator` and run it."""
        space, _, name = operator._schema.name.partition("::")
        if space == "aten" and not operator.is_view and name not in _NOTHING:
            self.found[name] += 1
        return operator(*args, **(kwargs or {}))


@contextmanager
def kept_for_backward(frozen: list[Tensor]) -> Iterator[dict[int, int]]:
    """Within the block, bytes by storage of what autograd keeps; but of those that `frozen` has.

    What is kept stays alive until the block ends, so that no storage is counted twice or left out.
    """
    known = {_storage(tensor) for tensor in frozen}
    held: list[Tensor] = []
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        held.append(tensor)
        if _storage(tensor) not in known:
            found[_storage(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found
    held.clear()


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def counted(build: Build, config: Speed) -> dict[str, int]:
    """{"kernels_per_step", "kept_bytes_narrow"} of a side, from inputs on the device to new weights.

    At an eighth of the width (tiny: whole), two samples of few pixels; uncompiled, and where the config asks
    for gradient checkpointing with it.
    """
    tiny = config.structure == "tiny"
    narrow = replace(
        config, width=1.0 if tiny else 0.125, resolution=64 if tiny else 256, batch_size=2, rank=8,
        precision="bfloat16", memory=Memory(),
    )  # fmt: skip
    side = build(narrow, torch.device("cpu"))
    side.step(0)  # makes the optimizer's moments
    frozen = [p for p in side.frozen() if not p.requires_grad]
    with kept_for_backward([*frozen, *side.lora]) as kept:
        side.loss(*side.inputs(1))
    inputs = side.inputs(2)
    with Kernels() as kernels:
        side._replace(inputs=lambda at: inputs).step(2)
    return {"kernels_per_step": kernels.found.total(), "kept_bytes_narrow": sum(kept.values())}
