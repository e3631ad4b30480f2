#!/usr/bin/env bash
# An AutoencoderKL of 32 and 64 channels with its default norms (32 groups: one or two channels a group) gives nearly the
# same latents for a flat picture, for one half as bright and for its negative: away from the borders they differ by 4%
# and 12% of their size. With Stable Diffusion's widths (128 to 512 channels, the same 32 groups) it is 49% and 97%.
# Colour and brightness of flat areas are then left to what leaks from the borders, and a small VAE that is trained so
# returns shifted colours. Weights are random; the cause is the norm, which divides by the size of what it is given.
# diffusers 0.42.1, torch 2.13.0. A good guess: a VAE of the same class is the same thing in small.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet torch==2.13.0 diffusers==0.42.1 transformers==5.24.0 accelerate==1.15.0
export HF_HUB_OFFLINE=1 HF_HOME="$folder/hub" OMP_NUM_THREADS=1
venv/bin/python - <<'PY'
import torch
from diffusers import AutoencoderKL


@torch.no_grad()
def differences(widths: tuple[int, ...]) -> list[float]:
    """Of the latents' middle: a picture half as bright, and the negative, over the size of the picture's own."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=widths, layers_per_block=1, latent_channels=4, sample_size=64,
        down_block_types=("DownEncoderBlock2D",) * len(widths), up_block_types=("UpDecoderBlock2D",) * len(widths),
    ).eval()
    assert vae.config.norm_num_groups == 32
    colour = torch.rand(1, 3, 1, 1) * 2 - 1
    flat, half, negative = (
        vae.encode((factor * colour).expand(1, 3, 64, 64)).latent_dist.mean for factor in (1, 0.5, -1)
    )
    edge = flat.shape[-1] // 4
    middle = [each[..., edge:-edge, edge:-edge] for each in (flat, half, negative)]
    return [float((middle[0] - each).norm() / middle[0].norm()) for each in middle[1:]]


narrow, wide = differences((32, 64)), differences((128, 256, 512, 512))
print("32 and 64 channels: half as bright", narrow[0], "negative", narrow[1])
print("128 to 512 channels: half as bright", wide[0], "negative", wide[1])
assert narrow[0] < 0.08 and narrow[1] < 0.2, "changed"
assert wide[0] > 0.3 and wide[1] > 0.8, "changed"
PY
