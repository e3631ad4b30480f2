#!/usr/bin/env bash
# bitsandbytes 0.50.2 with torch 2.13.0: torch's gradient checkpointing frees no input of a Linear8bitLt. The layer's
# autograd function puts its input on its context and not through save_for_backward, which is where checkpointing
# drops things: of four layers within a checkpoint no input is in memory after the forward if they are nn.Linear, and
# all four are if they are Linear8bitLt (frozen int8 weights, in train mode, on a CPU).
# A good guess: under torch.utils.checkpoint a layer's activations are dropped, whatever the layer is.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet torch==2.13.0 bitsandbytes==0.50.2 numpy
export OMP_NUM_THREADS=1
venv/bin/python - <<'PY'
import weakref

import bitsandbytes as bnb
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def layer_of(kind: str) -> nn.Module:
    layer = nn.Linear(64, 64, bias=False).requires_grad_(False)
    if kind == "nn.Linear":
        return layer
    few = bnb.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False, threshold=0.0)
    few.weight = bnb.nn.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
    return few.to("cpu").train()


def alive(kind: str) -> int:
    """Inputs of four layers within a checkpoint that are in memory after its forward."""
    layers, inputs = [layer_of(kind) for _ in range(4)], []

    def chain(x: torch.Tensor) -> torch.Tensor:
        for layer in layers:
            h = x * 1.5
            inputs.append(weakref.ref(h.untyped_storage()))
            x = layer(h)
            del h
        return x

    x = torch.randn(8, 64, requires_grad=True)
    y = checkpoint(chain, x, use_reentrant=False)
    found = sum(storage() is not None for storage in inputs)
    y.sum().backward()
    assert x.grad is not None
    return found


found = {kind: alive(kind) for kind in ("nn.Linear", "Linear8bitLt")}
print("inputs of four checkpointed layers alive after the forward:", found)
assert found == {"nn.Linear": 0, "Linear8bitLt": 4}, "changed"
PY
