"""Small Stable Diffusion bases: random weights, real structure, no download, no asset."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

_LETTERS = [chr(c) for c in range(ord("a"), ord("z") + 1)] + [",", "."]
_TOKENS = [*_LETTERS, *(c + "</w>" for c in _LETTERS), "<|startoftext|>", "<|endoftext|>"]
_TEXT = {
    "vocab_size": len(_TOKENS), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 24,
}  # fmt: skip
_SCHEDULER = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False,
    "set_alpha_to_one": False, "steps_offset": 1,
}  # fmt: skip


_SMALL = {"sample_size": 16, "norm_num_groups": 8, "cross_attention_dim": 32, "attention_head_dim": 4}
_TWO_BLOCKS = {
    **_SMALL, "block_out_channels": (16, 32), "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip
_REAL_SD = {**_SMALL, "block_out_channels": (8, 16, 24, 24)}  # layers and block types are diffusers' default
# SSD-1B: fewer transformer blocks, a middle without attention (segmind/SSD-1B, unet/config.json)
_PRUNED = {
    "transformer_layers_per_block": (1, [2, 2], [4, 4]), "mid_block_type": "UNetMidBlock2D",
    "reverse_transformer_layers_per_block": ([4, 4, 10], [2, 1, 1], 1),
}  # fmt: skip
_FEW = {"transformer_layers_per_block": (1, 1, 1), "layers_per_block": 1}
_REAL_SDXL = {
    **_SMALL, "block_out_channels": (8, 16, 24), "cross_attention_dim": 64,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10), "use_linear_projection": True,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 32 + 6 * 8,
}  # fmt: skip


def _tokenizer(folder: Path) -> tuple[Any, dict[str, int]]:
    from transformers import CLIPTokenizer

    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(_TOKENS)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=24)
    last = len(_TOKENS) - 1
    return tokenizer, {"bos_token_id": last - 1, "eos_token_id": last, "pad_token_id": last}


def _vae() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16), layers_per_block=1, latent_channels=4, norm_num_groups=4,
        sample_size=64, mid_block_add_attention=False, scaling_factor=0.5,
    )  # fmt: skip


def build_sd(
    folder: Path,
    prediction_type: str = "epsilon",
    seed: int = 0,
    real_blocks: bool = False,
    **scheduler_more: Any,
) -> Path:
    """Write a `StableDiffusionPipeline` folder: 16x16x4 latents of 64x64 pixels (f=4), 24 tokens.

    `real_blocks`: the blocks of SD1.5, with its 282 linear and convolution modules, but narrow.
    """
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer, ends = _tokenizer(folder)
    text = CLIPTextModel(CLIPTextConfig(**_TEXT, **ends))
    vae = _vae()
    shape = _REAL_SD if real_blocks else _TWO_BLOCKS
    unet = UNet2DConditionModel(**shape, use_linear_projection=prediction_type == "v_prediction")
    scheduler = DDIMScheduler(**_SCHEDULER, prediction_type=prediction_type, **scheduler_more)
    StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def build_sdxl(
    folder: Path, seed: int = 0, pruned: bool = False, zeros_when_empty: bool = True, few: bool = False
) -> Path:
    """Write a `StableDiffusionXLPipeline` folder with SDXL's blocks (794 modules in its UNet), but narrow.

    `pruned`: the blocks of SSD-1B instead; `few`: one layer of each, which is faster.
    """
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer, ends = _tokenizer(folder)
    shape = _REAL_SDXL | (_PRUNED if pruned else _FEW if few else {})
    StableDiffusionXLPipeline(
        vae=_vae(), unet=UNet2DConditionModel(**shape),
        text_encoder=CLIPTextModel(CLIPTextConfig(**_TEXT, **ends)),
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**_TEXT, **ends, projection_dim=32)),
        tokenizer=tokenizer, tokenizer_2=tokenizer, force_zeros_for_empty_prompt=zeros_when_empty,
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
        ),
    ).save_pretrained(folder)  # fmt: skip
    return folder
