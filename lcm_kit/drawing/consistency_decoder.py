"""diffusers' ConsistencyDecoderVAE: pixels drawn in two steps from noise, beside the latents.

Its class takes the latents' mean and deviation from four numbers each in its code, those of Stable Diffusion
1's VAE. One for other latents says its own in its config.json, as `latents_mean` and `latents_std`, by
channel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lcm_kit.bases import BaseInfo, decoded_at_once
from lcm_kit.drawing.noise import Picture, for_decoding
from lcm_kit.errors import UserError

FIRST_TIME = 1008  # the first of the two times at which diffusers' scheduler calls its UNet
# Its UNet holds 4.7 GiB for a picture of 512 x 512 pixels in float32, Stable Diffusion 1's VAE 0.75
_AS_MANY_PIXELS = 8
_CHANNELS = 4  # whose mean and deviation the class knows


def require_fit(path: str, config: Mapping[str, Any], base: BaseInfo) -> None:
    """Raise `UserError` for one that was made for latents of another scale, or that says too little."""
    _require_scale(path, config, base)
    channels = base.latent_channels
    _statistics(path, config, channels)
    takes = config.get("decoder_in_channels", 7)
    if takes != channels + 3:
        raise UserError(
            f"decoder {path!r}: its UNet takes {takes} channels, where {channels} of latents and 3 of pixels "
            "come in; save it again"
        )
    halves = len(config.get("decoder_block_out_channels", (320, 640, 1024, 1024))) - 1
    if base.factor % 2**halves:
        raise UserError(
            f"decoder {path!r}: its UNet halves pictures {halves} times, and those of {base.path!r} may be "
            f"any multiple of {base.factor} pixels; give one that was made for this base's VAE"
        )
    times = config.get("decoder_num_train_timesteps", 1024)
    if config.get("decoder_time_embedding_type", "learned") == "learned" and times <= FIRST_TIME:
        raise UserError(
            f"decoder {path!r} has learned {times} times, and diffusers asks for time {FIRST_TIME}; give one "
            "of 1024"
        )


def _require_scale(path: str, config: Mapping[str, Any], base: BaseInfo) -> None:
    scale = config.get("scaling_factor", 0.18215)
    if abs(scale - base.scaling_factor) > 1e-5 * base.scaling_factor:
        raise UserError(
            f"decoder {path!r} was made for latents of scaling_factor {scale:g}, and those of {base.path!r} "
            f"have {base.scaling_factor:g}: they are another VAE's; give one that was made for this base's"
        )
    if base.shift_factor or base.latents_mean is not None:
        raise UserError(
            f"decoder {path!r} knows no shift of latents, and the VAE of {base.path!r} has one; leave out "
            "decoder"
        )


def _statistics(path: str, config: Mapping[str, Any], channels: int) -> tuple[Any, Any] | None:
    """Mean and deviation by channel; None: those that the class has."""
    mean, deviation = config.get("latents_mean"), config.get("latents_std")
    if mean is None and deviation is None and channels == _CHANNELS:
        return None
    if not (_numbers(mean, channels) and _numbers(deviation, channels) and min(deviation or [0]) > 0):
        raise UserError(
            f"decoder {path!r}: its class knows mean and deviation of {_CHANNELS} channels of latents alone; "
            f"for {channels} its config.json must say latents_mean and latents_std, a number each"
        )
    return mean, deviation


def _numbers(values: Any, count: int) -> bool:
    each = values if isinstance(values, list) else []
    return len(each) == count and all(isinstance(value, int | float) for value in each)


def set_statistics(model: Any, config: Mapping[str, Any]) -> None:
    """Put what `config` says of the latents into the loaded model."""
    found = _statistics("", config, model.config.latent_channels)
    if found is not None:
        for name, values in zip(("means", "stds"), found, strict=True):
            setattr(model, name, torch.tensor(values, dtype=model.dtype).view(1, -1, 1, 1))


@torch.no_grad()
def decoded(model: Any, latents: Tensor, pictures: Sequence[Picture]) -> Tensor:
    """Latents [B, C, h, w], as the UNet sees them, to pixels [B, 3, H, W], about [-1, 1] and not clipped.

    By diffusers' own `decode`, whose noise for each picture follows from its seed and number alone.
    """
    own = latents.to(model.device, model.dtype) / model.config.scaling_factor
    factor = 2 ** (len(model.config.block_out_channels) - 1)
    height, width = (factor * side for side in own.shape[2:])
    few = max(1, decoded_at_once(height, width) // _AS_MANY_PIXELS)
    parts = [
        model.decode(own[k : k + few], generator=for_decoding(pictures[k : k + few])).sample
        for k in range(0, len(own), few)
    ]
    return torch.cat(parts)
