"""Does the written file give the trained adapter? Load it as a user does, and compare numbers."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcm_kit import adapter, families
from lcm_kit.errors import UserError
from lcm_kit.sample import load_adapter, pipeline

# Largest relative error of the UNet's output, by the dtype of the file's weights. The halves round each
# weight (2^-11, 2^-8 relative), and the errors of a few hundred layers add up.
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}


@contextlib.contextmanager
def complaints() -> Iterator[list[str]]:
    """Collect what diffusers, peft and transformers log at WARNING or above, and Python's `UserWarning`s."""
    found: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    handler = Collect(logging.WARNING)
    loggers = [logging.getLogger(name) for name in ("diffusers", "peft", "transformers")]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for logger in loggers:
            logger.addHandler(handler)
        try:
            yield found
        finally:
            for logger in loggers:
                logger.removeHandler(handler)
            found.extend(str(w.message) for w in caught if issubclass(w.category, UserWarning))


def probe_unet(unet: Any, seed: int = 0) -> Tensor:
    """The UNet's outputs [3, C, h, w] for fixed random latents and embeddings at three timesteps; float32."""
    generator = torch.Generator().manual_seed(seed)
    size = min(int(unet.config.sample_size), 32)  # the error does not depend on the size; the time does
    x = torch.randn((3, unet.config.in_channels, size, size), generator=generator)
    embeds = torch.randn((3, 8, unet.config.cross_attention_dim), generator=generator)
    with torch.no_grad():
        return unet(x, torch.tensor([999, 499, 19]), encoder_hidden_states=embeds).sample.float()


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """||found - wanted|| / ||wanted||, over all elements."""
    return float((found - wanted).norm() / wanted.norm())


def _layers(unet: Any) -> dict[str, tuple[float, Tensor, Tensor]]:
    """(scale, A, B) of each LoRA layer by its module's name, whatever the adapter is called."""
    from peft.tuners.lora import LoraLayer

    layers = {}
    for name, module in unet.named_modules():
        if isinstance(module, LoraLayer):
            (key,) = module.lora_A
            down, up = module.lora_A[key].weight, module.lora_B[key].weight
            layers[name] = (module.scaling[key], down.data, up.data)
    return layers


def _compare_layers(found: Mapping[str, Any], wanted: Mapping[str, Any], dtype: str) -> str | None:
    """The first disagreement in words, or None: modules, scales and weights (rounded) are equal."""
    if odd := sorted(found.keys() ^ wanted.keys()):
        return f"{len(odd)} modules are not matched, such as {odd[0]}"
    for name, (scale, *weights) in wanted.items():
        if found[name][0] != scale:
            return f"{name} comes back with scale {found[name][0]:g} instead of {scale:g}"
        rounded = (w.to(getattr(torch, dtype)).float() for w in weights)
        if not all(torch.equal(a.float(), b) for a, b in zip(found[name][1:], rounded, strict=True)):
            return f"{name} comes back with other weights"
    return None


def check(file: Path, trained: Path, base: Mapping[str, Any], dtype: str = "float32") -> float:
    """Load `file` onto `base` with plain diffusers, compare with adapter folder `trained`; give the error.

    Modules, scales and weights must be the same (after rounding to `dtype`), nothing may be warned about, and
    ||UNet(loaded) - UNet(trained)|| / ||UNet(trained)|| must not exceed `TOLERANCE[dtype]`, all computed in
    float32. Raises `UserError` that says what disagrees.
    """
    info = families.inspect_base(base["path"], revision=base["revision"], variant=base["variant"])
    if info.base_hash != base["hash"]:
        raise UserError(
            f"base {info.path!r} has changed since {trained.parent} was trained on it; put it back"
        )
    unet = pipeline(info.path, revision=info.revision, variant=info.variant).unet
    adapter.load_adapter(trained, unet)
    wanted, wanted_layers = probe_unet(unet.eval()), _layers(unet)
    del unet  # so that a large base is never held twice
    pipe = pipeline(info.path, revision=info.revision, variant=info.variant)
    with complaints() as found:
        load_adapter(pipe, file)
    error = relative_error(probe_unet(pipe.unet.float()), wanted)
    problem = _compare_layers(_layers(pipe.unet), wanted_layers, dtype) or (found[0] if found else None)
    if problem is None and not error <= TOLERANCE[dtype]:
        problem = (
            f"the UNet's output is off by {error:.1e} relative, above {TOLERANCE[dtype]:.0e} for {dtype}"
        )
    if problem:
        raise UserError(f"export of {trained.parent} failed its check: {problem}; nothing was written")
    return error
