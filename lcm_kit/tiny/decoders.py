"""Two more decoders of tiny-sd's latents before training: a preview's, and a consistency decoder.

Both are diffusers' own classes in small: what `decoder` takes for a base of any size is tried on these.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderTiny, ConsistencyDecoderVAE
from torch import Tensor
from torch.nn.functional import interpolate

from lcm_kit.tiny.models import LATENT

TIMES = (1008, 512)  # at which diffusers' scheduler calls a consistency decoder, the first on pure noise


def build_preview() -> AutoencoderTiny:
    """An autoencoder of f = 4 without norms and with few layers."""
    return AutoencoderTiny(
        latent_channels=LATENT,
        encoder_block_out_channels=(16, 16, 16),
        decoder_block_out_channels=(16, 16, 16),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(3, 2, 1),
        scaling_factor=1.0,
    )


def build_consistency(vae: Any) -> ConsistencyDecoderVAE:
    """A consistency decoder of f = 4 whose encoder is that of tiny-sd's `vae`.

    Its class has attention in the encoder's middle, which that one lacks; here it adds nothing.
    """
    config = vae.config
    model = ConsistencyDecoderVAE(
        scaling_factor=config.scaling_factor,
        latent_channels=LATENT,
        sample_size=config.sample_size,
        encoder_block_out_channels=config.block_out_channels,
        encoder_down_block_types=config.down_block_types,
        encoder_layers_per_block=config.layers_per_block,
        encoder_norm_num_groups=config.norm_num_groups,
        encoder_out_channels=LATENT,
        decoder_block_out_channels=(16, 32, 40),
        decoder_down_block_types=("ResnetDownsampleBlock2D",) * 3,
        decoder_up_block_types=("ResnetUpsampleBlock2D",) * 3,
        decoder_in_channels=LATENT + 3,
        decoder_layers_per_block=1,
        decoder_norm_num_groups=8,
    )
    lacking = model.encoder.load_state_dict(vae.encoder.state_dict(), strict=False)
    if lacking.unexpected_keys or not all("attentions" in key for key in lacking.missing_keys):
        raise ValueError(f"the encoder is another: {lacking}")
    model.quant_conv.load_state_dict(vae.quant_conv.state_dict())
    out = model.encoder.mid_block.attentions[0].to_out[0]
    torch.nn.init.zeros_(out.weight)
    torch.nn.init.zeros_(out.bias)
    return model


def denoised(model: ConsistencyDecoderVAE, noisy: Tensor, latents: Tensor, time: int) -> Tensor:
    """The picture that the consistency decoder sees in `noisy` [B, 3, H, W], beside its latents.

    `latents` as its UNet takes them, [B, C, H / 4, W / 4]: of mean 0 and deviation 1 by channel.
    """
    scheduler = model.decoder_scheduler
    wide = interpolate(latents, scale_factor=noisy.shape[-1] // latents.shape[-1], mode="nearest")
    seen = torch.cat([scheduler.scale_model_input(noisy, time), wide], dim=1)
    output = model.decoder_unet(seen, torch.tensor(time)).sample[:, :3]
    return scheduler.c_out[time] * output + scheduler.c_skip[time] * noisy
