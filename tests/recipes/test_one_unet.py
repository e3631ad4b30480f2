"""Training holds one UNet and its LoRA, counted in the middle of real steps of the real recipe; a teacher's
or target's pass leaves no trace on it."""

from __future__ import annotations

import gc
import hashlib
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from diffusers import ModelMixin, UNet2DConditionModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from lcm_kit.adapter import roles
from lcm_kit.bases import lora_targets
from tests.recipes.small import configure
from train import distill

STEPS, RANK = 2, 4


# -- What is there -------------------------------------------------------------------------------------------


def objects() -> list[Any]:
    """Every module and tensor that Python can reach."""
    gc.collect()
    return [thing for thing in gc.get_objects() if isinstance(thing, nn.Module | Tensor)]


def storages(tensors: list[Tensor]) -> dict[int, int]:
    """Bytes by address, each storage once, however many tensors look at it."""
    found = (tensor.untyped_storage() for tensor in tensors if tensor.device.type != "meta")
    return {storage.data_ptr(): storage.nbytes() for storage in found}


class Census(NamedTuple):
    """What came since the training began."""

    unet: Any
    models: list[str]
    parameters: int  # bytes
    others: int  # bytes of tensors that share nothing with a parameter


def census(before: set[int]) -> Census:
    new = [thing for thing in objects() if id(thing) not in before]
    models = [thing for thing in new if isinstance(thing, ModelMixin | PreTrainedModel)]
    parts = {id(part) for model in models for part in model.modules() if part is not model}
    models = [model for model in models if id(model) not in parts]  # not a UNet's transformers
    tensors = [thing for thing in new if isinstance(thing, Tensor)]
    of_parameters = storages([tensor for tensor in tensors if isinstance(tensor, nn.Parameter)])
    others = {at: size for at, size in storages(tensors).items() if at not in of_parameters}
    names = sorted(type(model).__name__ for model in models)
    unet = next(model for model in models if isinstance(model, UNet2DConditionModel))
    return Census(unet, names, sum(of_parameters.values()), sum(others.values()))


def traces(unet: Any) -> dict[str, Any]:
    """All that a pass of the UNet could leave changed, for comparison."""
    parameters = list(unet.parameters())
    layers = [module for module in unet.modules() if isinstance(module, BaseTunerLayer)]
    weights = b"".join(p.detach().numpy().tobytes() for p in parameters)
    return {
        "adapter": [(layer._disable_adapters, layer._active_adapter) for layer in layers],
        "training": [module.training for module in unet.modules()],
        "requires_grad": [p.requires_grad for p in parameters],
        "gradients": [p.grad for p in parameters],
        "storages": [p.data_ptr() for p in parameters],
        "versions": [p._version for p in parameters],  # autograd's: what a saved tensor is checked by
        "weights": hashlib.sha256(weights).hexdigest(),
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in unet.modules()],
        "torch's RNG": torch.get_rng_state().tolist(),
        "numpy's RNG": hashlib.sha256(np.random.get_state()[1].tobytes()).hexdigest(),  # type: ignore[union-attr]
        "Python's RNG": random.getstate(),
    }


# -- What there should be, from the headers of files ---------------------------------------------------------


def shapes(file: Path) -> dict[str, list[int]]:
    """The shapes in a safetensors file: its header is JSON after eight bytes that tell its length."""
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    return {key: entry["shape"] for key, entry in header.items() if key != "__metadata__"}


def nbytes(of: dict[str, list[int]]) -> int:
    """In float32."""
    return 4 * sum(map(math.prod, of.values()))


def lora_nbytes(base: dict[str, list[int]], rank: int) -> int:
    """Of A and B for each target of `base`: a weight [o, i, ...] has A [rank, i, ...] and B [o, rank]."""
    adapted = {
        key: shape
        for key, shape in base.items()
        if key.endswith(".weight")
        and any(f".{key}".removesuffix(".weight").endswith(f".{target}") for target in lora_targets("lcm"))
    }
    return 4 * rank * sum(shape[0] + math.prod(shape[1:]) for shape in adapted.values())


# -- The test ------------------------------------------------------------------------------------------------


class Watch:
    """Stands for `consistency_loss`: looks before the teacher's pass, the target's and the student's."""

    def __init__(self, real: Callable[..., Tensor], before: list[Any]) -> None:
        self.real, self.before = real, {id(thing) for thing in before}
        self.counted: list[Census] = []
        self.traced: list[dict[str, Any]] = []

    def __call__(self, **parts: Any) -> Tensor:
        predictors = {name: self.looking(parts[name]) for name in ("teacher", "target", "student")}
        return self.real(**{**parts, **predictors})

    def looking(self, predict: Callable[..., Any]) -> Callable[..., Any]:
        def looked(x: Tensor, t: Tensor) -> Any:
            self.counted.append(census(self.before))
            self.traced.append(traces(self.counted[-1].unet))
            return predict(x, t)

        return looked


def test_one_unet_is_resident_and_passes_without_gradient_leave_no_trace(
    distill_keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an EMA, whose weights the target's pass swaps in."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    before = objects()  # held to the end, so that their addresses stay theirs
    watch = Watch(roles.consistency_loss, before)
    monkeypatch.setattr(roles, "consistency_loss", watch)
    keys = {**distill_keys, "adapter": {"rank": RANK, "alpha": 8.0}}
    run = distill.main(configure(keys, tmp_path / "run", steps=STEPS, ema=0.9))
    assert len(watch.counted) == 3 * STEPS

    header = shapes(Path(distill_keys["base"]["path"]) / "unet" / "diffusion_pytorch_model.safetensors")
    base, lora = nbytes(header), lora_nbytes(header, RANK)
    assert lora == nbytes(shapes(run / "adapter" / "lora.safetensors"))  # so all targets are adapted
    for place, found in enumerate(watch.counted):
        assert found.models == ["UNet2DConditionModel"]  # no second one, no VAE, no text encoder
        assert found.parameters == base + lora
        # beside them the LoRA's average and, from the second step on, AdamW's two moments: no hidden copies
        copies = lora * (1 if place < 3 else 3)
        assert copies <= found.others < copies + base / 8, place

    for step in range(STEPS):
        entered, after_teacher, after_target = watch.traced[3 * step : 3 * step + 3]
        assert after_teacher == entered
        assert after_target == entered
    starts = [traced["weights"] for traced in watch.traced[::3]]
    assert len(set(starts)) == STEPS  # and the steps did train
