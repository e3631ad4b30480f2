"""What the UNet is told besides x_t and t: text embeddings and, for SDXL, pooled text and sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from lcm_kit.core.transfer import sent

Index = int | slice | Tensor | Sequence[int]


class Framing(NamedTuple):
    """How a square was cut from a picture, in pixels; (height, width) and (top, left) in that order."""

    original: tuple[int, int]  # the picture as it came
    corner: tuple[int, int]  # of the crop, in the resized picture
    target: tuple[int, int]  # the square


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """Embeddings [n, L, D] of several texts as one [sum n, M, D]: M is the least common multiple of the L.

    Each text is repeated as a whole, which cross-attention does not see: every key and value is there as
    often as the others of its text, so that the weights of a softmax over them add up to the same.
    """
    return torch.cat(of_one_length(tensors))


def of_one_length(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Each of the embeddings [n, L, D] repeated to the length that `joined` gives them."""
    length = math.lcm(*(tensor.shape[1] for tensor in tensors))
    return [_repeated(tensor, length) for tensor in tensors]


def _repeated(tensor: Tensor, length: int) -> Tensor:
    own = tensor.shape[1]
    return tensor if own == length else tensor.repeat(1, length // own, 1)


@dataclass(frozen=True)
class Condition:
    """The conditions of B samples. All tensors share the batch dimension."""

    embeds: Tensor  # [B, L, D]; L is that of a chunk of text times the number of chunks
    pooled: Tensor | None = None  # [B, P], SDXL
    time_ids: Tensor | None = None  # [B, 6], SDXL: original size, crop corner, target size in pixels

    def __len__(self) -> int:
        """B."""
        return len(self.embeds)

    def __getitem__(self, index: Index) -> Condition:
        """The samples at `index`; a single integer keeps the batch dimension (B = 1)."""
        if isinstance(index, int):
            index = [index]
        chosen = index if isinstance(index, slice) else sent(torch.as_tensor(index), self.embeds.device)
        return self._map(lambda tensor: tensor[chosen])

    def kwargs(self) -> dict[str, Tensor | dict[str, Tensor]]:
        """The keyword arguments of diffusers' `UNet2DConditionModel.forward`."""
        found: dict[str, Tensor | dict[str, Tensor]] = {"encoder_hidden_states": self.embeds}
        if self.pooled is not None and self.time_ids is not None:
            found["added_cond_kwargs"] = {"text_embeds": self.pooled, "time_ids": self.time_ids}
        return found

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Condition:
        """The same conditions on another device (as `sent`) or in another dtype."""
        return self._map(lambda tensor: sent(tensor, device).to(dtype=dtype))

    def expand(self, n: int) -> Condition:
        """One condition (B = 1) for n samples, without a copy."""
        return self._map(lambda tensor: tensor.expand(n, *tensor.shape[1:]))

    def sized_as(self, other: Condition) -> Condition:
        """The same text with the sizes of `other`: what guidance's unconditional pass is told for it."""
        return self if other.time_ids is None else replace(self, time_ids=other.time_ids)

    def replaced(self, chosen: Tensor, other: Condition) -> Condition:
        """The text of `other` (B = 1) where `chosen` bool [B] is true; sizes stay those of each sample.

        Texts of other lengths are repeated as in `joined`.
        """

        def pick(own: Tensor, new: Tensor) -> Tensor:
            return torch.where(sent(chosen, own.device).view(-1, *[1] * (own.ndim - 1)), new, own)

        pooled = self.pooled
        if pooled is not None and other.pooled is not None:
            pooled = pick(pooled, other.pooled)
        return replace(self, embeds=pick(*of_one_length([self.embeds, other.embeds])), pooled=pooled)

    @staticmethod
    def cat(conditions: Sequence[Condition]) -> Condition:
        """The samples of all `conditions`, in order; texts of several lengths as `joined` has them."""

        def join(name: str) -> Tensor | None:
            parts = [getattr(condition, name) for condition in conditions]
            return None if parts[0] is None else torch.cat(parts)

        return Condition(joined([c.embeds for c in conditions]), join("pooled"), join("time_ids"))

    def _map(self, change: Callable[[Tensor], Tensor]) -> Condition:
        pooled = None if self.pooled is None else change(self.pooled)
        time_ids = None if self.time_ids is None else change(self.time_ids)
        return replace(self, embeds=change(self.embeds), pooled=pooled, time_ids=time_ids)
