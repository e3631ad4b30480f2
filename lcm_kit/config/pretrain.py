"""The keys of `recipe: train/pretrain_tiny`."""

from __future__ import annotations

from typing import Literal

from pydantic.dataclasses import dataclass

from lcm_kit.config.data import STRICT, BatchSize, Fraction, Place, Positive, Rate, Seed


@dataclass(frozen=True, config=STRICT)
class PretrainTiny:
    """`recipe: train/pretrain_tiny`: draw the world, train the probe, the VAE, the text encoder, the UNet."""

    recipe: Literal["train/pretrain_tiny"]
    output: Place  # folder of the finished pipeline; `probe/` is written beside it
    # renders, latents and training state: the same command continues from here
    work: Place = "runs/pretrain_tiny"
    seed: Seed = 0
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    # a pipeline of this recipe's (a folder or an asset): its VAE and tokenizer stay as they are, its UNet and
    # text encoder go on from their weights, and no probe is trained; null: everything begins from nothing
    start: Place | None = None
    renders: Positive = 24000
    manners: Positive = 8000  # more renders, each in one of the manners that invented words call
    empty_words: Fraction = 0.1  # of the captions without a manner, how many end in a word that means nothing
    studio: Positive = 12000  # pictures in free palettes that the VAE is trained on beside the renders
    probe_steps: Positive = 1500
    probe_batch_size: BatchSize = 64
    vae_steps: Positive = 3200
    vae_batch_size: BatchSize = 24  # crops of 32x32 pixels
    vae_lr: Rate = 2e-3
    vae_noise: Fraction = 0.03  # on the latents that its decoder is trained on
    unet_steps: Positive = 6000
    unet_batch_size: BatchSize = 32
    unet_lr: Rate = 2e-3
    decay_steps: Positive = 1400  # linear fall of the rate to 0 over the last steps
    caption_dropout: Fraction = 0.1
    min_snr_gamma: Rate = 5.0  # arXiv:2303.09556
    ema: Fraction = 0.999
    checkpoint_every: Positive = 250
    prompts: Positive = 1536  # held-out captions, written to prompts.txt: no training picture has them
