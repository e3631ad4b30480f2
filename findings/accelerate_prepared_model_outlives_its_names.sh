#!/usr/bin/env bash
# accelerate 1.15.0 with torch 2.13.0: a model that went through Accelerator(mixed_precision="bf16").prepare_model is
# part of a reference cycle (its new forward, which lies on the model, holds the old one, which is bound to the model).
# After the last name is deleted and free_memory was called on the accelerator it is in memory until Python's cycle
# collector runs; without mixed precision, or not prepared, it goes with its last name. On a GPU gigabytes stay.
# A good guess: when nobody holds a model any more and the accelerator has let go, its memory is free.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet torch==2.13.0 accelerate==1.15.0 numpy
export OMP_NUM_THREADS=1 ACCELERATE_USE_CPU=true
venv/bin/python - <<'PY'
import gc
import weakref

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn


def alive(precision: str | None) -> bool:
    """Whether the model is in memory after its names are gone; the collector is off."""
    model = nn.Linear(8, 8)
    seen = weakref.ref(model)
    if precision:
        AcceleratorState._reset_state()
        accelerator = Accelerator(mixed_precision=precision)
        model = accelerator.prepare_model(model, evaluation_mode=True)
        del model
        accelerator.free_memory()
    else:
        del model
    found = seen() is not None
    gc.collect()
    assert seen() is None, "changed: the collector does not free it either"
    return found


gc.disable()
found = {str(precision): alive(precision) for precision in (None, "no", "bf16")}
print("alive after its last name is deleted:", found)
assert found == {"None": False, "no": False, "bf16": True}, "changed"
PY
