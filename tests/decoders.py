"""Random decoders of diffusers' own classes, small, for any base's latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny, ConsistencyDecoderVAE


def build_tiny(folder: Path, channels: int, blocks: int = 3, **more: Any) -> Path:
    """An AutoencoderTiny for latents of `channels`, which makes 2^(blocks - 1) pixels of a side."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"encoder_block_out_channels": (8,) * blocks, "decoder_block_out_channels": (8,) * blocks}
        numbers = {"num_encoder_blocks": (1,) * blocks, "num_decoder_blocks": (1,) * blocks}
        AutoencoderTiny(latent_channels=channels, **sizes, **numbers, **more).save_pretrained(folder)
    return folder


def build_consistency(folder: Path, channels: int = 4, blocks: int = 3, **more: Any) -> Path:
    """A ConsistencyDecoderVAE, whose UNet halves pictures once; by default for the bases of `tests.bases`."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        told = {
            "scaling_factor": 0.5, "latent_channels": channels, "sample_size": 64,
            "encoder_block_out_channels": (8,) * blocks, "encoder_norm_num_groups": 4,
            "encoder_down_block_types": ("DownEncoderBlock2D",) * blocks, "encoder_layers_per_block": 1,
            "encoder_out_channels": channels, "decoder_in_channels": channels + 3,
            "decoder_block_out_channels": (8, 8), "decoder_norm_num_groups": 4,
            "decoder_down_block_types": ("ResnetDownsampleBlock2D",) * 2,
            "decoder_up_block_types": ("ResnetUpsampleBlock2D",) * 2, "decoder_layers_per_block": 1,
        }  # fmt: skip
        ConsistencyDecoderVAE(**{**told, **more}).save_pretrained(folder)
    return folder
