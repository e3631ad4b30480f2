"""The parts of tiny-sd before training: a real Stable Diffusion pipeline in small.

Latents are [B, LATENT, 16, 16] for [B, 3, 64, 64] pixels (f = 4); text is at most `TOKENS` tokens of `WIDTH`
channels.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from lcm_kit import assets
from lcm_kit.core.schedule import SD_BETAS
from lcm_kit.errors import UserError, first_line

TOKENS, WIDTH = 32, 128
LATENT = 24  # channels: principal.py says why
START, END = "<|startoftext|>", "<|endoftext|>"


def build_vae() -> AutoencoderKL:
    """A VAE of f = 4, fully convolutional: it may be trained on crops."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 64),
        layers_per_block=1,
        latent_channels=LATENT,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
    )


def build_unet() -> UNet2DConditionModel:
    """A UNet of 5.3 M parameters, 0.44 GFLOP a forward: SD's block types, attention at 8x8 and 4x4."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=LATENT,
        out_channels=LATENT,
        block_out_channels=(48, 96, 128),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=WIDTH,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )


def build_scheduler(prediction_type: str) -> DDIMScheduler:
    """Stable Diffusion's noise schedule."""
    return DDIMScheduler(
        **SD_BETAS,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )


def build_tokenizer(captions: Iterable[str], folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer with merges learned from `captions`.

    It is byte-level BPE, so any other text has tokens too. Writes vocab.json and merges.txt into `folder`.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Punctuation(),
            pre_tokenizers.ByteLevel(False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=4096, end_of_word_suffix="</w>", initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(captions, trainer)
    merges = [m if isinstance(m, str) else " ".join(m) for m in json.loads(bpe.to_str())["model"]["merges"]]
    tokens = [*alphabet, *(c + "</w>" for c in alphabet), *(m.replace(" ", "") for m in merges), START, END]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=TOKENS)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A CLIP text encoder of two layers, trained together with the UNet."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


class Parts(NamedTuple):
    """What a pipeline of these models is made of, in float32."""

    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel
    tokenizer: CLIPTokenizer


def parts_of(place: str) -> Parts:
    """New models with the weights of the pipeline in the folder `place`, or of an asset.

    New ones, because what is loaded remembers where it lay, and writes that wherever it is saved. Raises
    `UserError` if there is no such pipeline, or one of other shapes.
    """
    folder = assets.place(place)
    if not (folder / "model_index.json").is_file():
        raise UserError(f"start {place!r}: there is no pipeline; name the folder of one, or asset:tiny-sd")
    try:
        found = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32, safety_checker=None)
        vae, unet, text = build_vae(), build_unet(), build_text_encoder(found.tokenizer)
        vae.register_to_config(scaling_factor=found.vae.config.scaling_factor)
        pairs = ((vae, found.vae), (unet, found.unet), (text, found.text_encoder))
        for new, old in pairs:
            new.load_state_dict(old.state_dict())
    except Exception as error:  # diffusers', transformers' or safetensors' own
        raise UserError(
            f"start {place!r}: this is no pipeline of `lcm-kit train pretrain/tiny_sd` "
            f"({first_line(error)}); name one, or asset:tiny-sd"
        ) from error
    return Parts(vae, text, unet, found.tokenizer)


def token_ids(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """[N, TOKENS] int64, padded and cut as the pipeline does it."""
    return tokenizer(
        captions, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
    ).input_ids
