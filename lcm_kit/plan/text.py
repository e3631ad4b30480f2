"""The text encoders of a base on the meta device, with the LoRA that fine-tuning trains on them."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn import Parameter

from lcm_kit.adapter.adapted_unet import add_text_lora
from lcm_kit.bases import Code, code_of
from lcm_kit.bases.condition import Condition
from lcm_kit.config.finetune import Finetune
from lcm_kit.config.schema import Training
from lcm_kit.families import PARTS
from lcm_kit.plan.base_profile import BaseProfile
from lcm_kit.plan.tracker import Kernels, checkpoint

_HEAD = 64  # channels of an attention head in all published encoders
_CAPTION = "a"


def rank_of(config: Training) -> int | None:
    """Of the text encoders' LoRA; None where they are not trained."""
    return config.text_encoder.rank if isinstance(config, Finetune) else None


@dataclass
class Captions:
    """Text encoders, frozen but for their LoRA."""

    family: Code
    text: Any  # its Text
    encoders: list[Any]
    lora: list[Parameter]

    @classmethod
    def build(cls, subject: BaseProfile, rank: int) -> Captions:
        """Those of the base, float32."""
        family = code_of(subject.structure.family)
        text = _text(subject, family)
        lora, encoders = [], []
        for part, (encoder, modules) in family.text_lora_targets(text).items():
            with torch.device("meta"):
                lora += add_text_lora(encoder, modules, rank, float(rank), seed=len(part))
            encoders.append(encoder)
        return cls(family, text, encoders, lora)

    def parameters(self) -> list[Parameter]:
        """All of them."""
        return [p for encoder in self.encoders for p in encoder.parameters()]

    def encode(self, n: int, *, checkpointing: bool) -> Condition:
        """The conditions of n captions, as a step encodes them: in float32, never under autocast."""
        for encoder in self.encoders:
            encoder.gradient_checkpointing_enable({"use_reentrant": False})
            for module in encoder.modules():
                module.training = checkpointing and bool(getattr(module, "gradient_checkpointing", False))
                if hasattr(module, "_gradient_checkpointing_func"):
                    module._gradient_checkpointing_func = checkpoint
        with Kernels():
            return self.family.encode_text(self.text, [_CAPTION] * n)


def _text(subject: BaseProfile, family: Code) -> Any:
    def tokenizer(captions: list[str], **_: Any) -> Any:
        ids = torch.zeros(len(captions), subject.tokens, dtype=torch.int64, device="meta")
        return SimpleNamespace(input_ids=ids, attention_mask=None)

    tokenizer.model_max_length = subject.tokens  # type: ignore[attr-defined]
    parts = subject.structure.family.text_parts
    with torch.device("meta"):
        made = [PARTS[part].kind()(_config(subject, f"{part}.")).eval() for part in parts]
    return family.text_of([tokenizer] * len(parts), made, False)


def _config(subject: BaseProfile, part: str) -> Any:
    """CLIP's, from the shapes of its layers."""
    from transformers import CLIPTextConfig

    shapes = {k: shape for k, shape in subject.structure.modules.items() if k.startswith(part)}
    width = next(shape[0] for k, shape in shapes.items() if k.endswith("q_proj"))
    hidden = next(shape[0] for k, shape in shapes.items() if k.endswith("fc1"))
    return CLIPTextConfig(
        vocab_size=subject.words, hidden_size=width, intermediate_size=hidden,
        num_hidden_layers=sum(k.endswith("q_proj") for k in shapes),
        num_attention_heads=max(1, width // _HEAD), max_position_embeddings=subject.tokens,
        projection_dim=subject.pooled or width,
    )  # fmt: skip
