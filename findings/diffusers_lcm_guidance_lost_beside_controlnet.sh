#!/usr/bin/env bash
# diffusers 0.42.1: a UNet that was distilled as an LCM with guidance inside (time_cond_proj_dim) is given the guidance
# as an embedding by the pipelines of Stable Diffusion for text, image, inpainting and ControlNet with text, in a batch
# of one. Those of ControlNet with image and ControlNet with inpainting, and AnimateDiff, give it none, and guide with a
# batch of two: the layer that takes the embedding never runs, and nothing is said. Seen with torch 2.13.0 and
# transformers 5.24.0.
# A good guess: StableDiffusionControlNetImg2ImgPipeline asks a UNet as StableDiffusionControlNetPipeline and
# StableDiffusionImg2ImgPipeline do.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet diffusers==0.42.1 torch==2.13.0 transformers==5.24.0 accelerate==1.15.0
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
venv/bin/python - <<'PY'
import diffusers
import torch
from PIL import Image

torch.manual_seed(0)
shape = {
    "block_out_channels": (16, 32), "layers_per_block": 1, "cross_attention_dim": 16, "norm_num_groups": 4,
    "attention_head_dim": 4, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
}
unet = diffusers.UNet2DConditionModel(
    sample_size=8, up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), time_cond_proj_dim=16, **shape,
)
control = diffusers.ControlNetModel(conditioning_embedding_out_channels=(16, 32), **shape)
motion = diffusers.MotionAdapter(
    block_out_channels=(16, 32), motion_layers_per_block=1, motion_mid_block_layers_per_block=1,
    motion_norm_num_groups=4, motion_num_attention_heads=4,
)
vae = diffusers.AutoencoderKL(
    block_out_channels=(8, 8), norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
)
passes, embedded = [], []


def note_pass(module, places):
    passes.append(len(places[0]))


def note_embedding(module, places):
    embedded.append(tuple(places[0].shape))


picture, mask = Image.new("RGB", (16, 16), "red"), Image.new("L", (16, 16), 255)
begun = {"image": picture, "strength": 1.0}
cases = {
    "StableDiffusionPipeline": {"height": 16, "width": 16},
    "StableDiffusionImg2ImgPipeline": begun,
    "StableDiffusionInpaintPipeline": {**begun, "mask_image": mask},
    "StableDiffusionControlNetPipeline": {"image": picture},
    "StableDiffusionControlNetImg2ImgPipeline": {**begun, "control_image": picture},
    "StableDiffusionControlNetInpaintPipeline": {**begun, "control_image": picture, "mask_image": mask},
    "AnimateDiffPipeline": {"height": 16, "width": 16, "num_frames": 3},
}
steps = diffusers.LCMScheduler(steps_offset=1)
found = {}
for name, given in cases.items():
    parts = {"vae": vae, "text_encoder": None, "tokenizer": None, "unet": unet, "scheduler": steps}
    if name.startswith("Stable"):
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    else:
        parts["motion_adapter"] = motion
    if "ControlNet" in name:
        parts["controlnet"] = control
    pipe = getattr(diffusers, name)(**parts)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.unet.config.time_cond_proj_dim == 16
    hooks = [
        pipe.unet.register_forward_pre_hook(note_pass),
        pipe.unet.time_embedding.cond_proj.register_forward_pre_hook(note_embedding),
    ]
    passes.clear()
    embedded.clear()
    pipe(
        prompt_embeds=torch.ones(1, 4, 16), negative_prompt_embeds=torch.zeros(1, 4, 16), num_inference_steps=1,
        guidance_scale=8.0, output_type="latent", generator=torch.Generator().manual_seed(0), **given,
    )
    for hook in hooks:
        hook.remove()
    found[name] = (list(passes), list(embedded))
    print(f"{name}: {passes} in the batch of one prompt, guidance embedded: {embedded}")
inside, beside = ([1], [(1, 16)]), ([2], [])
assert list(found.values()) == [inside] * 4 + [beside] * 3, found
PY
