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
    Motion,
)

# Shorter side: longer sides of the shapes that SDXL was trained on, lying and standing (arXiv:2307.01952,
# appendix I)
_TRAINED_ON = {
    512: (2048, 1984, 1920, 1856), 576: (1792, 1728, 1664), 640: (1600, 1536), 704: (1472, 1408, 1344),
    768: (1344, 1280), 832: (1216, 1152), 896: (1152, 1088), 960: (1088, 1024),
}  # fmt: skip
_LYING = tuple((long, short) for short, sides in _TRAINED_ON.items() for long in sides)
_STANDING = tuple((short, long) for long, short in _LYING)

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
    shapes={1024: (*_STANDING, (1024, 1024), *_LYING)},
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
    motion=Motion("AnimateDiffSDXLPipeline", "a-r-r-o-w/animatediff-motion-adapter-sdxl-beta", middle=False),
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
    motion=None,  # it has no attention in the middle, which diffusers' motion model wants
    checkpoint_lacks=(f"{CHECKPOINT_UNET}middle_block.1.",),  # no attention in the middle
    unknown_to=("sd-scripts",),
)
