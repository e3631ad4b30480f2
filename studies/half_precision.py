"""How far a base's endpoint moves in half precision, with norms in half as the kit trains, and in float32.

    python studies/half_precision.py [BASE]

Autocast on CUDA keeps norms in float32; the fast path has them in half as well. Both are computed here on the
CPU, for latents that are pure noise and eight captions: the RMS error of x0 against float32. The
figures stand in docs/benchmarks.md.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lcm_kit import bases
from lcm_kit.core.prediction import to_x0_eps
from lcm_kit.core.schedule import Schedule

CAPTIONS = (
    "a red circle on a blue background", "a green star on a white background", "a yellow house", "a blue cat",
    "a pink heart", "a white tree on a black background", "an orange square", "a purple fish",
)  # fmt: skip
TIMES = (999, 700, 300, 19)


@contextmanager
def full_norms() -> Iterator[None]:
    """Within the block group and layer norms compute and return float32, as CUDA's autocast has them."""
    group, layer = F.group_norm, F.layer_norm
    F.group_norm = lambda x, n, *rest: group(x.float(), n, *map(_full, rest))
    F.layer_norm = lambda x, n, *rest: layer(x.float(), n, *map(_full, rest))
    try:
        yield
    finally:
        F.group_norm, F.layer_norm = group, layer


def _full(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) else value


@torch.no_grad()
def main(path: str) -> None:
    """Print the table for the base at `path`."""
    base = bases.inspect_base(path)
    schedule, kind = Schedule.from_config(base.scheduler_config), base.prediction_type
    condition = bases.family_of(base).encode_text(bases.load_text(base), list(CAPTIONS))
    full = bases.load_unet(base, torch.float32)
    torch.manual_seed(0)
    x = torch.randn(len(CAPTIONS), full.config.in_channels, 16, 16)

    def endpoint(unet: Any, t: Tensor, dtype: torch.dtype) -> Tensor:
        output = unet(x.to(dtype), t, **condition.to("cpu", dtype).kwargs()).sample
        return to_x0_eps(schedule, kind, output, x, t)[0]

    print("| dtype | norms |", *(f"t = {t} |" for t in TIMES))
    for dtype in (torch.float16, torch.bfloat16):
        unet = bases.load_unet(base, dtype)
        found: dict[str, list[float]] = {"half": [], "float32": []}
        for time in TIMES:
            t = torch.full((len(x),), time)
            exact = endpoint(full, t, torch.float32)
            found["half"].append(_rms(endpoint(unet, t, dtype) - exact))
            with full_norms(), torch.autocast("cpu", dtype):
                found["float32"].append(_rms(endpoint(unet, t, dtype) - exact))
        for norms, errors in found.items():
            print(f"| {str(dtype).removeprefix('torch.')} | {norms} |", *(f"{e:.4f} |" for e in errors))


def _rms(error: Tensor) -> float:
    return float(error.square().mean().sqrt())


if __name__ == "__main__":
    main(*(sys.argv[1:] or ["asset:tiny-sd"]))
