#!/usr/bin/env bash
# A pipeline that was saved in float16 comes back in two dtypes from `from_pretrained(folder)` without a dtype: diffusers
# 0.42.1 gives its own models (UNet, VAE) float32, and the text encoder, a model of transformers 5.24.0, keeps the
# float16 of its file. A good guess: one folder of one dtype gives one dtype.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet torch==2.13.0 diffusers==0.42.1 transformers==5.24.0 peft==0.21.2 accelerate==1.15.0
export HF_HUB_OFFLINE=1 HF_HOME="$folder/hub" OMP_NUM_THREADS=1
venv/bin/python - <<'PY'
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer


def small_pipeline() -> StableDiffusionPipeline:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32,
        attention_head_dim=8, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=64,
            bos_token_id=62, eos_token_id=63,
        )
    )
    return StableDiffusionPipeline(
        vae=None, text_encoder=text, tokenizer=None, unet=unet, safety_checker=None, feature_extractor=None,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False), requires_safety_checker=False,
    )



letters = ["a", "a</w>", "b", "b</w>", "<|startoftext|>", "<|endoftext|>"]
Path("vocab.json").write_text(json.dumps({letter: k for k, letter in enumerate(letters)}))
Path("merges.txt").write_text("#version: 0.2\n")
pipe = small_pipeline()
pipe.register_modules(
    vae=AutoencoderKL(block_out_channels=(16,), norm_num_groups=8), tokenizer=CLIPTokenizer("vocab.json", "merges.txt")
)
pipe.to(torch.float16).save_pretrained("pipeline")
again = StableDiffusionPipeline.from_pretrained("pipeline")
found = {part: str(getattr(again, part).dtype) for part in ("unet", "vae", "text_encoder")}
print(found)
assert found == {"unet": "torch.float32", "vae": "torch.float32", "text_encoder": "torch.float16"}, "changed"
PY
