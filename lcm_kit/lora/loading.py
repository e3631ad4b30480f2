"""The real thing: load a LoRA file with plain diffusers, and say what came of it.

With a base's folder the outputs are compared as well; without one the same loader runs on a model of the same
structure whose weights were never filled in, and names, strengths and LoRA weights are compared.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lcm_kit.bases.weights import Place, load_model
from lcm_kit.errors import UserError, first_line
from lcm_kit.families import PARTS
from lcm_kit.lora.layers import Lora
from lcm_kit.lora.structure import Structure, empty_unet

_NAME = "checked"
_QUIET = (
    "No LoRA keys associated to",  # of every LoRA that leaves a part alone
    "LOAD REPORT",  # transformers lists the base's own weights as missing from the LoRA
)


class LoadedLayer(NamedTuple):
    """One LoRA layer as peft holds it after loading."""

    scale: float
    down: Tensor
    up: Tensor
    magnitude: Tensor | None = None  # DoRA's
    bias: Tensor | None = None  # of up


@contextlib.contextmanager
def complaints() -> Iterator[list[str]]:
    """Collect what diffusers, peft and transformers log from WARNING on, and warnings but deprecations."""
    found: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            message = record.getMessage()
            if not any(quiet in message for quiet in _QUIET):
                found.append(message)

    handler = Collect(logging.WARNING)
    loggers = [logging.getLogger(name) for name in ("diffusers", "peft", "transformers")]
    before = [(logger.propagate, list(logger.handlers)) for logger in loggers]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for logger in loggers:
            logger.handlers, logger.propagate = [handler], False
        try:
            yield found
        finally:
            for logger, (propagate, handlers) in zip(loggers, before, strict=True):
                logger.handlers, logger.propagate = handlers, propagate
            stale = (DeprecationWarning, FutureWarning, PendingDeprecationWarning)
            found.extend(str(w.message) for w in caught if not issubclass(w.category, stale))


def models(lora: Lora, structure: Structure, folder: Path | None, variant: str | None) -> dict[str, Any]:
    """The models that `lora` changes, float32, by part: a base's own, or empty ones of the same structure."""
    parts = {"unet", *lora.parts()}
    if folder is None:
        built = {part: _empty(part, structure) for part in parts}
    else:
        built = {part: _from_folder(part, folder, variant) for part in parts}
    return {part: model.eval().requires_grad_(False) for part, model in built.items()}


def _from_folder(part: str, folder: Path, variant: str | None) -> Any:
    return load_model(Place(str(folder), folder, variant), part, torch.float32)


def _empty(part: str, structure: Structure) -> Any:
    if part != "unet":
        return empty_text(part, structure)
    return empty_unet(structure.unet_config).to_empty(device="cpu")


def empty_text(part: str, structure: Structure) -> Any:
    """A text encoder whose weights were never filled in: memory that is never touched costs nothing."""
    from transformers import CLIPTextConfig

    first = f"{part}.text_model.encoder.layers.0.mlp.fc1"
    hidden, width = structure.modules[first]
    layers = sum(name.startswith(f"{part}.") and name.endswith(".fc1") for name in structure.modules)
    pooled = structure.projections.get(f"{part}.text_projection", (width,))[0]
    config = CLIPTextConfig(
        projection_dim=pooled, hidden_size=width, intermediate_size=hidden, num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64), vocab_size=64,
        bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    with torch.device("meta"):
        model = PARTS[part].kind()(config)
    return model.to_empty(device="cpu")


def pipeline(structure: Structure, parts: Mapping[str, Any]) -> Any:
    """A pipeline that has `parts` alone: enough for `load_lora_weights`."""
    from diffusers import DDIMScheduler

    family = structure.family
    # as the pipelines want it; never used
    scheduler = DDIMScheduler(steps_offset=1, clip_sample=False)
    given = dict.fromkeys(family.parts) | dict(family.pipeline_off) | dict(parts) | {"scheduler": scheduler}
    return family.pipeline_class()(**given)


def load(pipe: Any, file: Path) -> list[str]:
    """Load `file` as a user does; returns what the libraries said. Raises `UserError` if they refuse it."""
    try:
        with complaints() as said:
            pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=_NAME)
    # whatever stops the loader is what a user would meet: ValueError, KeyError, peft's own, ...
    except Exception as error:
        reason = first_line(error)
        raise UserError(f"diffusers refuses {file.name} ({type(error).__name__}: {reason})") from error
    return said


def layers(parts: Mapping[str, Any]) -> dict[str, LoadedLayer]:
    """The LoRA layers that peft holds, by our names."""
    from peft.tuners.lora import LoraLayer

    found = {}
    for part, model in parts.items():
        for name, module in model.named_modules():
            if isinstance(module, LoraLayer) and module.lora_A:
                (key,) = module.lora_A
                ours = part == "unet" or name.startswith(("text_model.", "text_projection"))
                spelled = name if ours else f"text_model.{name}"
                down, up = module.lora_A[key], module.lora_B[key]
                dora = module.lora_magnitude_vector[key].weight.data if module.use_dora.get(key) else None
                bias = up.bias.data if up.bias is not None else None
                found[f"{part}.{spelled}"] = LoadedLayer(
                    module.scaling[key], down.weight.data, up.weight.data, dora, bias
                )
    return found


@torch.no_grad()
def probe(parts: Mapping[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Each model's output for fixed random inputs, float32: the UNet's at three timesteps."""
    return {
        part: _probe_unet(model, seed) if part == "unet" else _probe_text(model, seed)
        for part, model in parts.items()
    }


def _probe_unet(unet: Any, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = min(int(unet.config.sample_size), 32)  # the error does not depend on the size; the time does
    x = torch.randn((3, unet.config.in_channels, size, size), generator=generator)
    embeds = torch.randn((3, 8, unet.config.cross_attention_dim), generator=generator)
    more = {}
    if unet.config.addition_embed_type == "text_time":
        pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
        pixels = float(8 * size)
        more["added_cond_kwargs"] = {
            "text_embeds": torch.randn((3, pooled), generator=generator),
            "time_ids": torch.tensor([[pixels, pixels, 0, 0, pixels, pixels]] * 3),
        }
    return unet(x, torch.tensor([999, 499, 19]), encoder_hidden_states=embeds, **more).sample.float()


def _probe_text(encoder: Any, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (2, min(16, encoder.config.max_position_embeddings))
    tokens = torch.randint(encoder.config.vocab_size, shape, generator=generator)
    return encoder(tokens, output_hidden_states=True).hidden_states[-1].float()


@torch.no_grad()
def fuse(parts: Mapping[str, Any], lora: Lora) -> None:
    """Add every update to the weights of `parts`, in place: the reference, plain arithmetic without peft.

    A linear layer without a bias gets one where the LoRA changes it, as peft's `lora_bias` does.
    """

    def submodule(name: str) -> Any:
        part, _, module = name.partition(".")
        model = parts[part]
        if part != "unet" and not hasattr(model, "text_model"):
            module = module.removeprefix("text_model.")
        return model.get_submodule(module)

    for name, update in lora.updates.items():
        weight = submodule(name).weight
        weight += update.delta(weight.float().reshape(update.shape)).reshape(weight.shape).to(weight.dtype)
    for name, change in lora.biases.items():
        module = submodule(name)
        bias = torch.zeros_like(change) if module.bias is None else module.bias.data
        module.bias = torch.nn.Parameter(bias + change.to(bias.dtype), requires_grad=False)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """||found - wanted|| / ||wanted||, over all elements."""
    return float((found - wanted).norm() / wanted.norm())
