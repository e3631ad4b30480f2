#!/usr/bin/env bash
# diffusers 0.42.1: `AnimateDiffPipeline` takes `timesteps=[399]`, says nothing, and draws at 999, for its call takes
# any keyword at all and drops it; `StableDiffusionPipeline` draws at 399, and `AnimateDiffSDXLPipeline` has the
# parameter.
# A good guess: the pipelines of one family take the same call, and one that does not know a keyword refuses it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet diffusers==0.42.1 torch==2.13.0 transformers==5.3.0 accelerate==1.15.0
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
venv/bin/python - <<'PY'
import inspect

import torch
from diffusers import (
    AnimateDiffPipeline, AnimateDiffSDXLPipeline, AutoencoderKL, LCMScheduler, MotionAdapter,
    StableDiffusionPipeline, UNet2DConditionModel, UNetMotionModel,
)

torch.manual_seed(0)
unet = UNet2DConditionModel(
    sample_size=8, block_out_channels=(8, 8), layers_per_block=1, cross_attention_dim=8, norm_num_groups=4,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    attention_head_dim=2,
)
vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
motion = MotionAdapter(
    block_out_channels=(8, 8), motion_layers_per_block=1, motion_mid_block_layers_per_block=1,
    motion_num_attention_heads=2, motion_norm_num_groups=4,
)
own = {"vae": vae, "text_encoder": None, "tokenizer": None, "scheduler": LCMScheduler(), "feature_extractor": None}
told = {
    "prompt_embeds": torch.zeros(1, 4, 8), "height": 8, "width": 8, "num_inference_steps": 1, "guidance_scale": 1.0,
    "output_type": "latent",
}
still = StableDiffusionPipeline(unet=unet, safety_checker=None, requires_safety_checker=False, **own)
moving = AnimateDiffPipeline(unet=UNetMotionModel.from_unet2d(unet, motion), motion_adapter=motion, **own)
found = []
for pipe, more in ((still, {}), (moving, {"num_frames": 2}), (moving, {"num_frames": 2, "no_such_thing": True})):
    pipe.set_progress_bar_config(disable=True)
    pipe(**told, **more, timesteps=[399])
    found.append(pipe.scheduler.timesteps.tolist())
named = [
    "timesteps" in inspect.signature(kind.__call__).parameters
    for kind in (StableDiffusionPipeline, AnimateDiffPipeline, AnimateDiffSDXLPipeline)
]
print("timesteps drawn at:", found, "the call names them:", named)
assert found == [[399], [999], [999]] and named == [True, False, True]
PY
