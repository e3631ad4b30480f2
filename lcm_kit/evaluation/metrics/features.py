"""What pictures are compared by: the embedded probe, or a CLIP, SigLIP, DINOv2 or Inception model by name.

A name is `asset:probe`, the folder or hub id of a transformers model, or `inception`. The hub is asked by
huggingface_hub's own rules (HF_HUB_OFFLINE, HF_HOME, HF_TOKEN).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from lcm_kit.bases.tokens import straightened
from lcm_kit.errors import UserError, first_line
from lcm_kit.evaluation.metrics.preprocessing import preparation, pressed, seen

PROBE = "asset:probe"
_TEXT = ("clip", "siglip", "siglip2")
_TYPES = (*_TEXT, "dinov2", "dinov2_with_registers")
_INCEPTION = 299  # pixels of a side that its pictures are brought to
_INSTEAD = f"use the folder or hub id of a CLIP, SigLIP or DINOv2 model, or {PROBE}"


def whole(height: int, width: int) -> None:
    """What an extractor sees that takes pictures as they are."""


@dataclass(frozen=True)
class Extractor:
    """Features of pictures, and of texts where the model reads them; on the CPU, float32."""

    name: str
    images: Callable[[Tensor], Tensor]  # pixels [N, 3, H, W] in [-1, 1] -> [N, F]
    read: Callable[[Sequence[str]], Tensor] | None = None
    # what it sees of pictures of a height and a width, in words; None where that is all of them, as they are
    sees: Callable[[int, int], str | None] = whole

    def texts(self, prompts: Sequence[str]) -> Tensor | None:
        """[N, F]; None if the model reads no text."""
        return None if self.read is None else self.read(prompts)

    def adherence(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """[N]: `similarity` of features [N, F] to N prompts. Raises `UserError` if it reads no text."""
        if self.read is None:
            raise UserError(f"features {self.name!r} reads no text; name a CLIP or SigLIP model")
        return self.similarity(images, self.read(prompts))

    @staticmethod
    def similarity(images: Tensor, texts: Tensor) -> Tensor:
        """[N]: the CLIP score (Hessel et al. 2021, arXiv:2104.08718), 100 x cosine, not below 0."""
        return (100 * cosine_similarity(images, texts, dim=-1)).clamp(min=0)


def extractor(name: str, device: str = "cpu", revision: str | None = None) -> Extractor:
    """The extractor of that name, its model on `device`; `revision` is the hub's, for a hub id.

    Raises `UserError` if there is no such model, it is of another kind, or a library for it is missing.
    """
    folder = Path(os.path.expanduser(name))
    if revision is not None and (name in (PROBE, "inception") or folder.is_dir()):
        raise UserError(f"features {name!r} has no revisions, so {revision!r} means nothing; remove it")
    if name == PROBE:
        return Extractor(name, _probe(device))
    if name == "inception":
        return Extractor(name, _inception(device), sees=partial(pressed, (_INCEPTION, _INCEPTION)))
    if not folder.is_dir() and (name.startswith(("asset:", "/", ".", "~")) or name.count("/") > 1):
        raise UserError(f"features {name!r}: there is no such folder; check the path, or {_INSTEAD}")
    return _transformers(name, str(folder) if folder.is_dir() else name, device, revision)


def _probe(device: str) -> Callable[[Tensor], Tensor]:
    """Channel means [N, 32] of an early stage: why an early one, `Probe.features` says."""
    from lcm_kit.tiny.probe import load_probe

    probe = load_probe().to(device)

    @torch.no_grad()
    def images(pixels: Tensor) -> Tensor:
        return probe.features(pixels.to(device)).cpu()

    return images


# -- transformers --------------------------------------------------------------------------------------------


def _transformers(name: str, place: str, device: str, revision: str | None) -> Extractor:
    kind, model, config, tokenizer = _load(name, place, revision)
    try:
        prepare = preparation(kind, config)
    except ValueError as error:
        raise UserError(f"features {name!r}: {error}; {_INSTEAD}") from error
    model = model.to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def images(pixels: Tensor) -> Tensor:
        inputs = prepare(pixels.to(device))
        found = model.get_image_features(**inputs) if kind in _TEXT else model(**inputs)
        return _pooled(found).float().cpu()

    @torch.no_grad()
    def texts(prompts: Sequence[str]) -> Tensor:
        length = model.config.text_config.max_position_embeddings
        tokens = tokenizer(
            list(map(straightened, prompts)),
            padding="max_length",
            max_length=length,
            truncation=True,
            return_tensors="pt",
        )  # fmt: skip
        # SigLIP was trained on filled-up texts without a mask, CLIP looks no further than the text's end
        names = ("input_ids", "attention_mask") if kind == "clip" else ("input_ids",)
        return (
            _pooled(model.get_text_features(**{key: tokens[key].to(device) for key in names})).float().cpu()
        )

    return Extractor(name, images, texts if kind in _TEXT else None, partial(seen, kind, config))


def _load(name: str, place: str, revision: str | None) -> tuple[str, Any, dict[str, Any], Any]:
    """Model type, model in float32, its preprocessor_config.json, and its tokenizer or None."""
    from transformers import AutoConfig, AutoModel, AutoTokenizer
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        kind = AutoConfig.from_pretrained(place, revision=revision).model_type
        if kind in _TYPES:
            model, report = AutoModel.from_pretrained(
                place, revision=revision, dtype=torch.float32, use_safetensors=True, output_loading_info=True
            )
            if lost := sorted(report["missing_keys"]):  # which transformers fills with random numbers
                raise UserError(f"{len(lost)} of its tensors are not in its files, as {lost[0]}")
            config, _ = ImageProcessingMixin.get_image_processor_dict(place, revision=revision)
            tokenizer = AutoTokenizer.from_pretrained(place, revision=revision) if kind in _TEXT else None
            return kind, model, config, tokenizer
    except Exception as error:  # the name, the network, a broken file: of all kinds, none is our bug
        reason = first_line(error)
        raise UserError(
            f"features {name!r}: there is no such model folder or hub id, or it cannot be loaded ({reason}); "
            f"check the name, or use {PROBE}"
        ) from error
    raise UserError(f"features {name!r} is a {kind} model; give one of {', '.join(_TYPES)}, or {PROBE}")


def _pooled(output: Any) -> Tensor:
    """transformers 4 returns the features, transformers 5 an object around them."""
    return output if isinstance(output, Tensor) else output.pooler_output


# -- Inception -----------------------------------------------------------------------------------------------


def _inception(device: str) -> Callable[[Tensor], Tensor]:
    """Pooled features [N, 2048] of the Inception network that published FIDs are measured with."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except Exception as error:  # not there, or a torchvision that does not fit torch: RuntimeError
        raise UserError(
            "features inception needs torch-fidelity and a torchvision that fits torch; "
            f"pip install torch-fidelity, or {_INSTEAD}"
        ) from error
    try:
        model = FeatureExtractorInceptionV3("inception", ["2048"]).to(device).eval()
    except OSError as error:  # its weights come from the network, once
        raise UserError(
            f"features inception: its weights cannot be downloaded ({error}); check the connection, "
            f"or {_INSTEAD}"
        ) from error

    @torch.no_grad()
    def images(pixels: Tensor) -> Tensor:
        eight_bit = ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return model(eight_bit.to(device))[0].float().cpu()

    return images
