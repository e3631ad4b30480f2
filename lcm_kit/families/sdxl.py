"""SDXL, and SSD-1B, which is pruned from it."""

from __future__ import annotations

from dataclasses import replace

from lcm_kit.families.kinds import (
    CHECKPOINT_UNET,
    CLIP_G,
    CLIP_L,
    CONDITIONER,
    FIRST_EMBEDDER,
    SECOND_EMBEDDER,
    Family,
    Generation,
)

XL = Family(
    name="sdxl",
    title="SDXL",
    module="lcm_kit.bases.sdxl",
    pipeline="StableDiffusionXLPipeline",
    pipeline_off={"add_watermarker": False},
    parts=("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "unet", "scheduler"),
    recognised_by=("text_encoder_2",),
    kohya_prefixes={"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"},
    kohya_original=True,
    hub_tag="stable-diffusion-xl",
    usual_guidance=5.0,
    added_condition="text_time",
    zeros_when_empty=True,
    vae_overflows=True,
    latent_statistics=True,
)
SDXL = Generation(
    name="sdxl",
    family=XL,
    title="SDXL",
    short="SDXL",
    unet={
        "sample_size": 128,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (320, 640, 1280),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    text={"text_encoder": CLIP_L, "text_encoder_2": CLIP_G},
    unet_marks={"addition_embed_type": "text_time"},
    checkpoint_text=(f"{FIRST_EMBEDDER}transformer.", f"{SECOND_EMBEDDER}model."),
    checkpoint_marks=(CONDITIONER, f"{CHECKPOINT_UNET}label_emb."),
    repositories=("stabilityai/stable-diffusion-xl-base-1.0",),
    kohya_version=("sdxl_base_v1-0", "sdxl_base_v1-0"),
    modelspec=("stable-diffusion-xl-v1-base", "stable-diffusion-xl-v1-base"),
    hub_hints=("xl",),
    configs="sdxl",
)
SSD1B = replace(
    SDXL,
    name="ssd1b",
    title="SSD-1B",
    short="SSD-1B",
    # segmind/SSD-1B, unet/config.json
    unet={
        **SDXL.unet,
        "transformer_layers_per_block": (1, [2, 2], [4, 4]),
        "mid_block_type": "UNetMidBlock2D",
        "reverse_transformer_layers_per_block": ([4, 4, 10], [2, 1, 1], 1),
    },
    repositories=("segmind/SSD-1B",),
    hub_hints=("ssd-1b", "ssd1b"),
    pruned_from="sdxl",
    checkpoint_lacks=(f"{CHECKPOINT_UNET}middle_block.1.",),  # no attention in the middle
    unknown_to=("sd-scripts",),
)
