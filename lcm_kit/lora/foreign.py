"""LoRA files of other models than Stable Diffusion's UNets, told by their keys or their header.

The names of blocks are those of each model's published code and of its port in diffusers
(`models/transformers/`); prefixes are sd-scripts', ComfyUI's and diffusers'.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

# What stands before a module's name
_PREFIX = (
    r"(?:base_model\.model\.)?"
    r"(?:lora_unet_|lora_transformer_|lycoris_|diffusion_model\.|transformer\.|unet\.|model\.|net\.)*"
)
_N = r"[._]\d+[._]"
# Model: what its keys begin with behind the prefix; the first that fits any key counts
_BLOCKS = [
    ("HunyuanVideo", rf"(?:txt_in[._]individual_token_refiner|double_blocks{_N}(?:img|txt)_mlp[._]fc)"),
    ("HunyuanVideo", rf"single_blocks{_N}modulation[._]linear"),
    ("Chroma", r"distilled_guidance_layer"),
    ("Flux", rf"(?:double_blocks|single_blocks|single_transformer_blocks){_N}"),
    ("Stable Diffusion 3", rf"(?:joint_blocks{_N}|context_embedder)"),
    ("AuraFlow", rf"(?:joint_transformer_blocks|double_layers|single_layers){_N}"),
    ("Qwen-Image", rf"transformer_blocks{_N}(?:img|txt)_m(?:lp|od)"),
    ("Cosmos", rf"blocks{_N}(?:adaln_modulation|(?:self|cross)_attn[._](?:[qkv]|output)_proj)"),
    ("Cosmos", r"blocks[._]block\d+[._]"),
    ("Wan", rf"blocks{_N}(?:(?:self|cross)_attn[._][qkvo]\b|(?:self|cross)_attn[._][qkvo][._]|ffn[._])"),
    ("Wan", rf"blocks{_N}attn[12][._]to_"),
    ("Mochi", rf"(?:blocks|transformer_blocks){_N}attn[._](?:qkv_[xy]|add_[qkv]_proj.*mochi)"),
    ("Hunyuan-DiT", rf"blocks{_N}(?:attn[12][._](?:Wqkv|q_proj|kv_proj)|default_modulation)"),
    ("Lumina or Z-Image", rf"(?:context_refiner|noise_refiner){_N}"),
    ("Lumina or Z-Image", rf"layers{_N}(?:attention|attn|feed_forward|adaLN_modulation)"),
    ("PixArt", r"(?:adaln_single|caption_projection)[._]"),
    ("LTX-Video", r"(?:patchify_proj|vae_per_channel)"),
    ("Flux or Stable Diffusion 3", rf"transformer_blocks{_N}(?:attn[._]|ff_context|norm1_context)"),
    ("a video or image transformer", rf"transformer_blocks{_N}"),
]
_KEYS = [(model, re.compile(_PREFIX + blocks)) for model, blocks in _BLOCKS]
_KEYS += [
    ("Stable Cascade", re.compile(r"lora_prior_(?:unet|te)_")),
    (
        "a model with a T5 text encoder (Flux, Stable Diffusion 3)",
        re.compile(r"(?:lora_te3_|text_encoder_3\.)"),
    ),
    (
        "a model with a T5 text encoder",
        re.compile(r"(?:lora_te\d?_|text_encoder(?:_2)?\.)encoder[._]block[._]"),
    ),
]
_TRANSFORMER = ("transformer.", "lora_transformer_", "base_model.model.transformer.")
# Header: ModelSpec's architecture or sd-scripts' base version, up to the first slash
_HEADERS = ("modelspec.architecture", "ss_base_model_version")
_NAMES = {
    "flux": "Flux", "chroma": "Chroma", "stable-diffusion-v3": "Stable Diffusion 3",
    "stable-diffusion-3": "Stable Diffusion 3", "sd3": "Stable Diffusion 3", "hunyuan-video": "HunyuanVideo",
    "hunyuan_video": "HunyuanVideo", "hunyuan": "a Hunyuan model", "wan": "Wan", "cosmos": "Cosmos",
    "lumina": "Lumina or Z-Image", "z-image": "Lumina or Z-Image", "zimage": "Lumina or Z-Image",
    "qwen": "Qwen-Image", "stable-cascade": "Stable Cascade", "auraflow": "AuraFlow",
    "pixart": "PixArt", "ltx": "LTX-Video",
}  # fmt: skip


def model_of(keys: Iterable[str], metadata: Mapping[str, str]) -> str | None:
    """The other model that a file with these keys and this header is for; None if nothing tells of one."""
    keys = list(keys)
    for model, pattern in _KEYS:
        if any(pattern.match(key) for key in keys):
            return model
    if any(key.startswith(_TRANSFORMER) for key in keys):
        return "a video or image transformer"
    told = [metadata.get(key, "").lower() for key in _HEADERS]
    return next((name for mark, name in _NAMES.items() for text in told if text.startswith(mark)), None)
