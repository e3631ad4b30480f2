"""A LoRA on the text encoders beside the UNet's, and captions that are encoded in the step that needs them.

With it the embeddings that `lcm-kit encode` cached are of no use: every step encodes its captions anew, with
gradient (`Captions`). While B is zero they come out as they were cached.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lcm_kit import bases
from lcm_kit.adapter.adapted_unet import AdaptedUNet, add_text_lora
from lcm_kit.bases import BaseInfo
from lcm_kit.bases.condition import Condition, Index
from lcm_kit.bases.memory import LR_FACTOR
from lcm_kit.config.finetune import Finetune


@dataclass(frozen=True, eq=False)
class TextLora:
    """The text encoders of a base, float32, each with a LoRA."""

    family: Any  # module of lcm_kit.bases
    text: Any  # its Text
    encoders: dict[str, Any]  # by part, the same objects
    chunks: int = 1  # of a caption, at most

    def encode(self, captions: Sequence[str | None]) -> Condition:
        """The conditions of B captions, float32, without sizes; None is guidance's unconditional pass.

        Every caption goes through the encoders, also one that is left out: all processes then have
        gradients of the same weights.
        """
        told = [caption or "" for caption in captions]
        condition: Condition = self.family.encode_text(self.text, told, self.chunks)
        left_out = torch.tensor([caption is None for caption in captions])
        if not left_out.any():
            return condition
        return condition.replaced(left_out, self.family.empty_condition(self.text, 1))


@dataclass(frozen=True, eq=False)
class Captions(Condition):
    """Conditions that `kwargs` encodes, each time anew, in the precision and on the device of `embeds`.

    `embeds` holds nothing, [B, 0, 0]: the base's own embeddings would be wrong ones.
    """

    captions: tuple[str | None, ...] = ()  # B; None: the unconditional pass
    encode: Callable[[Sequence[str | None]], Condition] | None = None

    @classmethod
    def of(cls, captions: Sequence[str | None], text: TextLora, time_ids: Tensor | None = None) -> Captions:
        """Captions for `text` to encode; SDXL: with the sizes `time_ids` [B, 6]."""
        return cls(torch.empty(len(captions), 0, 0), None, time_ids, tuple(captions), text.encode)

    def kwargs(self) -> dict[str, Tensor | dict[str, Tensor]]:
        """As `Condition.kwargs`, with the gradient of the text encoders' LoRA."""
        assert self.encode is not None
        encoded = replace(self.encode(self.captions), time_ids=self.time_ids)
        return encoded.to(self.embeds.device, self.embeds.dtype).kwargs()

    def __getitem__(self, index: Index) -> Captions:
        """As of a `Condition`."""
        places = torch.arange(len(self))[index].reshape(-1).tolist()
        found = super().__getitem__(index)
        return replace(self, embeds=found.embeds, time_ids=found.time_ids, captions=self._at(places))

    def expand(self, n: int) -> Captions:
        """As of a `Condition`."""
        found = super().expand(n)
        return replace(self, embeds=found.embeds, time_ids=found.time_ids, captions=self._at([0] * n))

    def replaced(self, chosen: Tensor, other: Condition) -> Captions:
        """As of a `Condition`; `other` is of this kind too."""
        assert isinstance(other, Captions)
        pairs = zip(chosen.tolist(), self.captions, strict=True)
        return replace(self, captions=tuple(other.captions[0] if new else own for new, own in pairs))

    def _at(self, places: Sequence[int]) -> tuple[str | None, ...]:
        return tuple(self.captions[place] for place in places)


def load(base: BaseInfo, config: Finetune, device: torch.device) -> TextLora | None:
    """The text encoders of `base` with the LoRA of `config.text_encoder`, on `device`; None if it has none.

    They are float32 whatever the UNet's precision, as when captions are cached. Raises `UserError` as
    `bases.load`.
    """
    wanted = config.text_encoder
    if wanted.rank is None:
        return None
    family = bases.family_of(base)
    text, encoders = bases.load_text(base), {}
    for k, (part, (encoder, modules)) in enumerate(family.text_lora_targets(text).items(), start=1):
        encoder.to(device)
        if config.gradient_checkpointing:
            _checkpointed(encoder)
        alpha = float(wanted.rank) if wanted.alpha is None else wanted.alpha
        add_text_lora(encoder, modules, wanted.rank, alpha, seed=config.seed + k)
        encoders[part] = encoder
    return TextLora(family, text, encoders, config.data.chunks)


def _checkpointed(encoder: Any) -> None:
    """Recompute the blocks' activations in the backward. No dropout is turned on: only the blocks train."""
    encoder.gradient_checkpointing_enable({"use_reentrant": False})
    for module in encoder.modules():
        module.training = bool(getattr(module, "gradient_checkpointing", False))


def joined(adapted: AdaptedUNet, text: TextLora | None, config: Finetune) -> list[Any]:
    """Make the LoRAs of the UNet and of `text` one (`AdaptedUNet.join`); returns what the optimizer takes.

    The parameters, or two groups of them: those of text encoders have a rate of their own
    (`memory.set_rates`).
    """
    own = adapted.parameters()
    if text is None:
        return own
    adapted.join(text.encoders)
    lr = config.text_encoder.lr
    factor = 1.0 if lr is None else lr / config.optimizer.lr
    return [{"params": own}, {"params": adapted.parameters()[len(own) :], LR_FACTOR: factor}]
