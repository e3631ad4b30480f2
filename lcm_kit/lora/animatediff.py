"""AnimateDiff in diffusers: a base's UNet with a motion adapter between its layers, and a LoRA in both.

What a file does to it depends on names, shapes and strengths, and not on what the base has learned. So the
model has the structure of the base and random weights, all of them views of one buffer: SDXL's 2.7
thousand million take 120 MB, and no base is loaded. Frames are as small as the UNet takes them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lcm_kit.core.schedule import SD_BETAS
from lcm_kit.families.kinds import Motion
from lcm_kit.lora.layers import Layer, Lora, Update
from lcm_kit.lora.loading import empty_text
from lcm_kit.lora.structure import Structure, empty_unet

_FRAMES, _SIDE, _STEPS, _TOKENS = 2, 8, 2, 8  # the side in latents
_OFFSETS = 2**16  # two weights of one shape are not the same numbers
_DEVIATION = 0.02  # keeps activations near 1 at the fan-ins of these UNets, between their norms


def fits(structure: Structure) -> bool:
    """Whether a motion adapter is published for the base's blocks, at any width."""
    return structure.blocks is not None and structure.blocks.motion is not None


def names(structure: Structure) -> tuple[str, str]:
    """diffusers' pipeline, and a motion adapter on the hub, for a base that one fits."""
    motion = _motion(structure)
    return motion.pipeline, motion.adapter


def _motion(structure: Structure) -> Motion:
    assert structure.blocks is not None and structure.blocks.motion is not None
    return structure.blocks.motion


def models(lora: Lora, structure: Structure) -> dict[str, Any]:
    """The models that `lora` changes, by part: a motion UNet, float32, and text encoders without weights."""
    parts = {part: empty_text(part, structure) for part in lora.parts() if part != "unet"}
    return {"unet": unet(structure)} | {
        part: each.eval().requires_grad_(False) for part, each in parts.items()
    }


def unet(structure: Structure) -> Any:
    """diffusers' UNetMotionModel of this structure, with random weights that share one buffer."""
    from diffusers import MotionAdapter, UNetMotionModel

    plain = empty_unet(structure.unet_config)
    with torch.device("meta"):
        motion = MotionAdapter(
            tuple(plain.config.block_out_channels), motion_norm_num_groups=plain.config.norm_num_groups,
            use_motion_mid_block=_motion(structure).middle,
        )  # fmt: skip
        model = UNetMotionModel.from_unet2d(plain, motion, load_weights=False)
    _fill(model)
    return model.eval().requires_grad_(False)


def _fill(model: Any) -> None:
    """Normal numbers as weights, those about 1 where a norm multiplies; and the places of frames."""
    from diffusers.models.embeddings import SinusoidalPositionalEmbedding

    for module in model.modules():
        if isinstance(module, SinusoidalPositionalEmbedding):
            _, length, width = module.pe.shape
            module.pe = SinusoidalPositionalEmbedding(width, length).pe
    named = list(model.named_parameters())
    longest = max(weight.numel() for _, weight in named)
    numbers = torch.randn(longest + _OFFSETS, generator=torch.Generator().manual_seed(0)) * _DEVIATION
    for k, (name, weight) in enumerate(named):
        owner, _, leaf = name.rpartition(".")
        begin = 977 * k % _OFFSETS
        values = numbers[begin : begin + weight.numel()].view(weight.shape)
        if weight.ndim == 1 and leaf == "weight":
            values = values + 1
        setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(values, requires_grad=False))


def pipeline(structure: Structure, parts: Mapping[str, Any]) -> Any:
    """AnimateDiff's pipeline with `parts` alone, which draws latents in LCM's steps."""
    import diffusers

    given = dict.fromkeys(structure.family.parts) | dict(parts)
    given |= {"scheduler": diffusers.LCMScheduler(**SD_BETAS), "motion_adapter": None}
    given["vae"] = diffusers.AutoencoderKL()  # its smallest: SDXL's pipeline asks for a dtype, no more
    pipe = getattr(diffusers, names(structure)[0])(**given)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def frames(pipe: Any, structure: Structure) -> Tensor:
    """Frames of one clip from the same noise and condition at each call, as latents [1, C, F, h, w]."""
    generator = torch.Generator().manual_seed(0)
    config = pipe.unet.config
    told = {"prompt_embeds": torch.randn((1, _TOKENS, structure.width), generator=generator)}
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        told["pooled_prompt_embeds"] = torch.randn((1, pooled), generator=generator)
    noise = torch.randn((1, config.in_channels, _FRAMES, _SIDE, _SIDE), generator=generator)
    side = _SIDE * pipe.vae_scale_factor
    return pipe(
        **told, latents=noise, height=side, width=side, num_frames=_FRAMES, num_inference_steps=_STEPS,
        guidance_scale=1.0, generator=generator, output_type="latent",
    ).frames.float()  # fmt: skip


@contextlib.contextmanager
def added(model: Any, lora: Lora) -> Iterator[None]:
    """The UNet `model` with what `lora` changes of it added to the layers' outputs, without peft.

    What is a LoRA goes through its factors, so that no weight has to be held twice.
    """

    def module(name: str) -> Any:
        return model.get_submodule(name.removeprefix("unet."))

    handles = [
        module(name).register_forward_hook(partial(_moved, update))
        for name, update in lora.updates.items()
        if name.startswith("unet.")
    ]
    handles += [
        module(name).register_forward_hook(partial(_shifted, change))
        for name, change in lora.biases.items()
        if name.startswith("unet.")
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _moved(update: Update, module: Any, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
    x = given[0]
    if isinstance(update, Layer):
        down, up = update.down.float(), update.up.float()
        if isinstance(module, torch.nn.Conv2d):
            down, up = (each.reshape(*each.shape, *(1,) * (4 - each.ndim)) for each in (down, up))
            inner = functional.conv2d(x, down, stride=module.stride, padding=module.padding)
            return output + update.scale * functional.conv2d(inner, up)
        return output + update.scale * (x @ down.flatten(1).T @ up.flatten(1).T)
    change = update.delta(module.weight.reshape(update.shape)).reshape(module.weight.shape)
    if isinstance(module, torch.nn.Conv2d):
        return output + functional.conv2d(x, change, stride=module.stride, padding=module.padding)
    return output + x @ change.T


def _shifted(change: Tensor, module: Any, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
    shape = (-1, 1, 1) if isinstance(module, torch.nn.Conv2d) else (-1,)
    return output + change.float().view(shape)
