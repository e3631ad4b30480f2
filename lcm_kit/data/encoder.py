"""The base's VAE and text encoders, which make latents and conditions of pictures and captions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lcm_kit import bases
from lcm_kit.bases import BaseInfo, inspect_base
from lcm_kit.bases.condition import Condition, Framing
from lcm_kit.bases.tokens import counts, straightened
from lcm_kit.config.resolution import Resolution, height_width
from lcm_kit.config.schema import Training
from lcm_kit.core.prediction import check as check_prediction
from lcm_kit.core.schedule import Schedule
from lcm_kit.data import drawn_sizes, vae_precision
from lcm_kit.data.vae_precision import FULL
from lcm_kit.drawing.vae import ProvenVae
from lcm_kit.io.files import sha256_bytes

CONDITION = ("embeds", "pooled", "time_ids")  # the tensors of a condition, as a shard names them


def usable_base(config: Training) -> BaseInfo:
    """The base of `config`. Raises `UserError` if it cannot be trained, or not at its sizes."""
    base = inspect_base(config.base.path, revision=config.base.revision, variant=config.base.variant)
    check_prediction(Schedule.from_config(base.scheduler_config), base.prediction_type)
    drawn_sizes.require(config, base)
    return base


@dataclass(frozen=True)
class Encoder:
    """The VAE, in the precision that is asked for, and the text encoders of a base, in float32."""

    family: bases.Code
    vae: ProvenVae | None  # None where only captions are encoded
    text: Any
    chunks: int | None = 1  # of a caption, at most; None: all that it takes

    @classmethod
    def load(
        cls, base: BaseInfo, device: str, vae: bool = True, precision: str = FULL, chunks: int | None = 1
    ) -> Encoder:
        """The VAE, unless captions are all there is to encode, and the text encoders of `base`.

        `precision`: the VAE's, of `vae_precision`; `chunks`: as of `encode_text`.
        """
        family = bases.family_of(base)
        text = bases.load_text(base)
        for part in text:
            if isinstance(part, torch.nn.Module):
                part.to(device)
        return cls(family, vae_precision.load(base, precision, device) if vae else None, text, chunks)

    def empty(self) -> Condition:
        """The condition of an unconditional pass."""
        return self.family.empty_condition(self.text, 1)

    def condition(self, captions: Sequence[str], framings: Sequence[Framing]) -> Condition:
        """The conditions of captions, and of how their pictures were cut.

        Of several lengths they are joined (`condition.joined`): each repeated as a whole to the same one.
        """
        told = self.family.encode_text(self.text, captions, self.chunks)
        return replace(told, time_ids=self.family.sizes(framings))

    def of_whole_pictures(self, captions: Sequence[str], resolution: Resolution) -> dict[str, Tensor]:
        """`tensors_of` the conditions of pictures that are drawn at this size, of which nothing is cut."""
        sides = height_width(resolution)
        return tensors_of(self.condition(captions, [Framing(sides, (0, 0), sides)] * len(captions)))


def hashes_of(
    tokenizers: Sequence[Any], texts: Sequence[Sequence[tuple[str, float]]], chunks: int
) -> list[str]:
    """What each row's embeddings are made from besides the base: its captions, their weights, their chunks.

    `tokenizers`: those of the base (`bases.load_tokenizers`). Of one caption of one chunk that is the hash
    of its text.
    """
    each = [[straightened(text) for text, _ in row] for row in texts]  # what tokenizers see of it
    counted = iter(counts(tokenizers, [text for row in each for text in row], chunks))
    found = []
    for row, told in zip(texts, each, strict=True):
        lengths = [next(counted) for _ in told]
        plain = len(told) == 1 and lengths == [1]
        whole = told[0] if plain else json.dumps([told, [weight for _, weight in row], lengths])
        found.append(sha256_bytes(whole.encode()))
    return found


def tensors_of(condition: Condition) -> dict[str, Tensor]:
    """The tensors of a condition by name, float32 on the CPU."""
    tensors = {name: getattr(condition, name) for name in CONDITION}
    return {name: tensor.float().cpu() for name, tensor in tensors.items() if tensor is not None}
