#!/usr/bin/env bash
# diffusers 0.42.1: TCDScheduler.step renews a share of the noise in each step, eta, 0.3 by default. A pipeline passes
# its own eta, 0.0 by default, to any scheduler whose step takes one: so StableDiffusionPipeline with a TCDScheduler
# renews none unless its call says eta=0.3, and draws the same picture for every generator.
# A good guess: a scheduler that is put into a pipeline samples by its own defaults.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet diffusers==0.42.1 transformers==5.24.0 "torch>=2.6,<2.14" numpy
export HF_HUB_OFFLINE=1 HF_HOME="$folder/hub" OMP_NUM_THREADS=1
venv/bin/python - <<'PY'
import inspect

import torch
from diffusers import StableDiffusionPipeline, TCDScheduler, UNet2DConditionModel

torch.manual_seed(0)
unet = UNet2DConditionModel(
    sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=16, attention_head_dim=8,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
).eval()
pipe = StableDiffusionPipeline(None, None, None, unet, TCDScheduler(), None, None, requires_safety_checker=False)
pipe.set_progress_bar_config(disable=True)
pipe.vae_scale_factor = 8
start, text = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 16)


def draw(seed, **more):
    with torch.no_grad():
        return pipe(
            prompt_embeds=text, latents=start, num_inference_steps=4, guidance_scale=1.0, output_type="latent",
            generator=torch.Generator().manual_seed(seed), **more,
        ).images


own = inspect.signature(TCDScheduler.step).parameters["eta"].default
same = torch.equal(draw(1), draw(2))
other = (draw(1, eta=own) - draw(2, eta=own)).abs().max().item()
print(f"the scheduler's own eta: {own}; two generators: equal pictures {same}; with eta={own} they differ by {other:.2f}")
assert own == 0.3 and same and other > 0.01, "changed: the pipeline takes the scheduler's eta"
PY
