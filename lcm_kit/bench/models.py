"""The models of a benchmark: random weights in the published structures, whole or at a share of their width.

At width 1 they have exactly as many weights as Stable Diffusion 1.5, 2.1 and XL: tests/recipes/test_speed.py
counts them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lcm_kit import assets
from lcm_kit.bases.condition import Condition
from lcm_kit.config.evaluation import Speed
from lcm_kit.config.resolution import height_width
from lcm_kit.errors import UserError
from lcm_kit.families import PARTS, generation_of

UNET = {"norm_num_groups": 32, "block_out_channels": (320, 640, 1280, 1280)}
VAE = {
    "block_out_channels": (128, 256, 512, 512), "norm_num_groups": 32, "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip
CLIP_KEYS = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
)  # as `Clip` has them
SCALED = {*CLIP_KEYS[1:], *UNET, "cross_attention_dim", "attention_head_dim"}  # the last is a number of heads


def settings(config: Speed) -> tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]:
    """The configurations of UNet, VAE and text encoders: those of `structure` at `width`."""
    if config.structure == "tiny":
        files = (assets.path("tiny-sd") / part / "config.json" for part in ("unet", "vae", "text_encoder"))
        unet, vae, text = (json.loads(file.read_text(encoding="utf-8")) for file in files)
        return unet, vae, [text]

    def share(value: Any) -> Any:
        return tuple(map(share, value)) if isinstance(value, tuple) else max(1, round(value * config.width))

    def scaled(of: dict[str, Any]) -> dict[str, Any]:
        return {key: share(value) if key in SCALED else value for key, value in of.items()}

    generation = generation_of(config.structure)
    texts = [scaled(dict(zip(CLIP_KEYS, clip[1:5], strict=True))) for clip in generation.text.values()]
    unet = scaled({**UNET, **generation.unet})
    if generation.pooled:  # it is told the pooled text and six sizes
        unet["projection_class_embeddings_input_dim"] = texts[1]["hidden_size"] + 6 * 256
    return unet, scaled(VAE), texts


def sizes(config: Speed) -> Tensor:
    """SDXL's time_ids [B, 6] of pictures that were not cropped."""
    h, w = height_width(config.resolution)
    return torch.tensor([[h, w, 0, 0, h, w]], dtype=torch.float32).repeat(config.batch_size, 1)


def cached(config: Speed) -> tuple[Tensor, Condition]:
    """One batch of random latents [B, C, h, w] and conditions in the CPU's memory, as a cache gives them."""
    (unet, vae, texts), n = settings(config), config.batch_size
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    sides = [side // factor for side in height_width(config.resolution)]
    tokens = texts[0].get("max_position_embeddings", 77)
    condition = Condition(torch.randn(n, tokens, unet["cross_attention_dim"]))
    if unet.get("addition_embed_type"):
        condition = replace(condition, pooled=torch.randn(n, texts[1]["hidden_size"]), time_ids=sizes(config))
    return torch.randn(n, unet.get("in_channels", 4), *sides), condition


@dataclass(frozen=True)
class Base:
    """Builds the models of one side, frozen, each from the same seed wherever it is built."""

    config: Speed
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the frozen models. Raises `UserError` for float16 on a CPU."""
        if self.config.precision == "float16" and self.device.type == "cpu":
            raise UserError("precision float16 does not train on a CPU; use auto, float32 or bfloat16")
        auto = torch.float16 if self.device.type == "cuda" else torch.float32
        return auto if self.config.precision == "auto" else getattr(torch, self.config.precision)

    def build(self, make: Callable[[Any], Any], of: Any) -> Any:
        """The model that `make` makes of its configuration, on the CPU: the same weights on every device."""
        torch.manual_seed(self.config.seed)
        with torch.device("meta" if self.device.type == "meta" else "cpu"):
            model = make(of)
        nn.Module.to(model, self.dtype)  # diffusers' own warns of layers in float32: there are none
        return model.eval().requires_grad_(False)

    def unet(self) -> Any:
        """The UNet."""
        from diffusers import UNet2DConditionModel

        return self.build(UNet2DConditionModel.from_config, settings(self.config)[0])

    def vae(self) -> Any:
        """The VAE."""
        from diffusers import AutoencoderKL

        return self.build(AutoencoderKL.from_config, settings(self.config)[1])

    def texts(self) -> list[Any]:
        """The text encoders."""
        from transformers import CLIPTextConfig

        kinds = (part.kind() for name, part in PARTS.items() if name.startswith("text_encoder"))
        return [
            self.build(kind, CLIPTextConfig(**{**of, "projection_dim": of["hidden_size"]}))
            for of, kind in zip(settings(self.config)[2], kinds, strict=False)
        ]

    @torch.no_grad()
    def encode(self, texts: list[Any], ids: Tensor) -> Condition:
        """The condition of token ids [B, L]."""
        if len(texts) == 1:
            return Condition(texts[0](ids)[0])
        outputs = [model(ids, output_hidden_states=True) for model in texts]
        embeds = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        return Condition(embeds, outputs[1].text_embeds, sizes(self.config).to(ids.device, self.dtype))
