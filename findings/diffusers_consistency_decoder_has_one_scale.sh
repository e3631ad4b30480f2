#!/usr/bin/env bash
# diffusers 0.42.1: ConsistencyDecoderVAE takes `latent_channels` and `scaling_factor` in its config, and its decoder
# can honour neither. With 8 latent channels it is built, saves, loads and encodes, and decode raises: the four means
# and deviations that it takes off the latents are in the code. And a scaling factor does nothing where pipelines
# divide by it first: latents over 0.18215 and over 0.5, each with its own config, decode to the same picture, since
# decode multiplies again and then takes off the same four means. With torch 2.13.0.
# A good guess: what is in the config and was good for building and encoding is good for decoding.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet diffusers==0.42.1 torch==2.13.0 transformers==5.24.0
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
venv/bin/python - <<'PY'
import torch
from diffusers import ConsistencyDecoderVAE


def build(latents, scale=0.18215):
    torch.manual_seed(0)
    return ConsistencyDecoderVAE(
        scaling_factor=scale, latent_channels=latents, encoder_out_channels=latents, decoder_in_channels=3 + latents,
        encoder_block_out_channels=(32, 32), encoder_down_block_types=("DownEncoderBlock2D",) * 2,
        encoder_layers_per_block=1, decoder_block_out_channels=(32, 32), decoder_layers_per_block=1,
        decoder_down_block_types=("ResnetDownsampleBlock2D",) * 2,
        decoder_up_block_types=("ResnetUpsampleBlock2D",) * 2,
    )


def decode(vae, latents):
    return vae.decode(latents, generator=torch.Generator().manual_seed(0)).sample


with torch.no_grad():
    pictures = torch.zeros(1, 3, 16, 16)
    for channels in (4, 8):
        build(channels).save_pretrained("vae")
        vae = ConsistencyDecoderVAE.from_pretrained("vae")
        latents = vae.encode(pictures).latent_dist.mode()
        assert vae.config.latent_channels == channels and latents.shape == (1, channels, 8, 8)
        try:
            shape = tuple(decode(vae, latents).shape)
        except RuntimeError as error:
            shape = str(error)
        print(f"{channels} latent channels, decoded:", shape)
        assert shape == (1, 3, 16, 16) if channels == 4 else "(8) must match" in shape and "(4)" in shape, shape
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    first, second = (decode(build(4, scale), latents / scale) for scale in (0.18215, 0.5))
    other = decode(build(4), latents)
    same, apart = (float((first - each).abs().max()) for each in (second, other))
    print(f"two scaling factors, each with its own latents: {same:.1e} apart; with other latents: {apart:.2f}")
    assert same < 1e-5 and apart > 0.01, (same, apart)
PY
