"""What pictures are compared by: the embedded probe, or a CLIP, SigLIP, DINOv2 or Inception model by name.

A name is `asset:probe`, the folder or hub id of a transformers model, or `inception`. Pictures are prepared as
the model's own preprocessor_config.json says, in torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, interpolate

from lcm_kit.errors import UserError

PROBE = "asset:probe"
_TEXT = ("clip", "siglip", "siglip2")
_TYPES = (*_TEXT, "dinov2", "dinov2_with_registers")
_MODES = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # PIL's numbers of the filters


@dataclass(frozen=True)
class Extractor:
    """Features of pictures, and of texts where the model reads them."""

    name: str
    images: Callable[[Tensor], Tensor]  # pixels [N, 3, H, W] in [-1, 1] -> [N, F] float32
    read: Callable[[Sequence[str]], Tensor] | None = None

    def texts(self, prompts: Sequence[str]) -> Tensor | None:
        """[N, F] float32; None if the model reads no text."""
        return None if self.read is None else self.read(prompts)

    @staticmethod
    def similarity(images: Tensor, texts: Tensor) -> Tensor:
        """[N]: the CLIP score (Hessel et al. 2021, arXiv:2104.08718), 100 x cosine, not below 0."""
        return (100 * cosine_similarity(images, texts, dim=-1)).clamp(min=0)


def extractor(name: str, device: str = "cpu") -> Extractor:
    """The extractor of that name, its model on `device`.

    Raises `UserError` if there is no such model, it is of another kind, or a library for it is missing.
    """
    if name == PROBE:
        from lcm_kit.tiny.probe import load_probe

        return Extractor(name, torch.no_grad()(load_probe().features))
    if name == "inception":
        return Extractor(name, _inception(device))
    return _transformers(name, device)


# -- transformers --------------------------------------------------------------------------------------------


def _transformers(name: str, device: str) -> Extractor:
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    place = str(Path(name).expanduser()) if Path(name).expanduser().is_dir() else name
    try:
        kind = AutoConfig.from_pretrained(place).model_type
        if kind not in _TYPES:
            raise UserError(
                f"features {name!r} is a {kind} model; give one of {', '.join(_TYPES)}, or {PROBE}"
            )
        model = AutoModel.from_pretrained(place, dtype=torch.float32).to(device).eval()
        prepare = preparation(_preprocessor(place))
        tokenizer = AutoTokenizer.from_pretrained(place) if kind in _TEXT else None
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise UserError(
            f"features {name!r}: there is no such model folder or hub id, or it cannot be loaded ({reason}); "
            f"check the name, or use {PROBE}"
        ) from error

    @torch.no_grad()
    def images(pixels: Tensor) -> Tensor:
        inputs = prepare(pixels.float()).to(device)
        if kind in _TEXT:
            return _tensor(model.get_image_features(pixel_values=inputs)).float().cpu()
        return model(pixel_values=inputs).pooler_output.float().cpu()

    @torch.no_grad()
    def texts(prompts: Sequence[str]) -> Tensor:
        assert tokenizer is not None
        length = model.config.text_config.max_position_embeddings
        tokens = tokenizer(  # SigLIP was trained on texts that are filled up; CLIP masks what is
            list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).to(device)
        known = {"input_ids": tokens["input_ids"]}
        if kind == "clip":
            known["attention_mask"] = tokens["attention_mask"]
        return _tensor(model.get_text_features(**known)).float().cpu()

    return Extractor(name, images, texts if tokenizer is not None else None)


def _tensor(output: Any) -> Tensor:
    """transformers 4 returns the features, transformers 5 an object around them."""
    return output if isinstance(output, Tensor) else output.pooler_output


def _preprocessor(place: str) -> dict[str, Any]:
    from transformers.utils import cached_file

    file = cached_file(place, "preprocessor_config.json")
    return json.loads(Path(file).read_text(encoding="utf-8"))


def preparation(config: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """What a preprocessor_config.json asks for, as a function: square pixels in [-1, 1] -> the model's input.

    Resize (antialiased), centre crop, mean and standard deviation. Raises `ValueError` for an unknown filter.
    """
    size, crop = config.get("size", 224), config.get("crop_size", 224)
    side = size if isinstance(size, int) else size.get("shortest_edge", size.get("height"))
    inner = crop if isinstance(crop, int) else crop.get("height")
    resize, crops = config.get("do_resize", True), config.get("do_center_crop", False)
    number = config.get("resample", 3)
    if resize and number not in _MODES:
        raise ValueError(f"resample {number} of preprocessor_config.json is not known; 0, 2 and 3 are")
    normalise = config.get("do_normalize", True)
    mean = torch.tensor(config.get("image_mean", [0.5] * 3) if normalise else [0.0] * 3).view(3, 1, 1)
    std = torch.tensor(config.get("image_std", [0.5] * 3) if normalise else [1.0] * 3).view(3, 1, 1)

    def prepare(pixels: Tensor) -> Tensor:
        x = (pixels + 1) / 2
        if resize and x.shape[-1] != side:
            mode = _MODES[number]
            smooth = mode != "nearest"
            x = interpolate(
                x, (side, side), mode=mode, antialias=smooth, align_corners=False if smooth else None
            )
            x = (x.clamp(0, 1) * 255).round() / 255  # as PIL leaves it
        if crops:
            start = (x.shape[-1] - inner) // 2
            x = x[..., start : start + inner, start : start + inner]
        return (x - mean) / std

    return prepare


# -- Inception -----------------------------------------------------------------------------------------------


def _inception(device: str) -> Callable[[Tensor], Tensor]:
    """Pooled features [N, 2048] of the Inception network that published FIDs are measured with."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise UserError(
            "features inception needs torch-fidelity and a torchvision that fits torch; pip install torch-fidelity, "
            f"or use a CLIP or DINOv2 folder or {PROBE}"
        ) from error
    model = FeatureExtractorInceptionV3("inception", ["2048"]).to(device).eval()

    @torch.no_grad()
    def images(pixels: Tensor) -> Tensor:
        eight_bit = ((pixels + 1) * 127.5).round().to(torch.uint8)
        return model(eight_bit.to(device))[0].float().cpu()

    return images
