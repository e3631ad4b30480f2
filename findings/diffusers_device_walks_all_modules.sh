#!/usr/bin/env bash
# diffusers 0.42.1 with peft 0.21.2 and torch 2.13.0: `pipe.device` of a pipeline on a CPU looks at all modules of its
# models for hooks of group offloading, at 706 for 398 modules, and each call of the pipeline asks again: at 1,104. The
# layers of a LoRA count too, switched off as well: 1,666 and 2,544.
# A good guess: it is an attribute, or the place of the first weight.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet \
  diffusers==0.42.1 peft==0.21.2 torch==2.13.0 transformers==5.3.0 accelerate==1.15.0
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
venv/bin/python - <<'PY'
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig

torch.manual_seed(0)
unet = UNet2DConditionModel(
    sample_size=8, block_out_channels=(32, 64), layers_per_block=2, cross_attention_dim=32,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    norm_num_groups=8,
)
vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
pipe = StableDiffusionPipeline(
    vae=vae, text_encoder=None, tokenizer=None, unet=unet, scheduler=DDIMScheduler(), safety_checker=None,
    feature_extractor=None, requires_safety_checker=False,
)
pipe.set_progress_bar_config(disable=True)
looked = 0
real = torch.nn.Module.modules


def counted(module):
    global looked
    for each in real(module):
        looked += 1
        yield each


def look(what):
    global looked
    looked = 0
    torch.nn.Module.modules = counted
    what()
    torch.nn.Module.modules = real
    return looked


def draw():
    pipe(prompt_embeds=torch.zeros(1, 4, 32), num_inference_steps=1, guidance_scale=1.0, output_type="latent")


def modules():
    return sum(1 for model in (unet, vae) for _ in model.modules())


found = [modules(), look(lambda: pipe.device), look(draw)]
unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
unet.disable_adapters()
found += [modules(), look(lambda: pipe.device), look(draw)]
print("modules, looked at for the device, looked at in a call; the same with a LoRA that is off:", found)
assert found == [398, 706, 1104, 878, 1666, 2544], found
PY
