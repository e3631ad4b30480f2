"""Pictures as a transformers model wants them: its preprocessor_config.json, done in torch on any device.

transformers' own processors need torchvision, or go through PIL picture by picture. This follows PIL's
steps: 8 bits, across first, then down, rounded after each. On pure noise up to 4% of the values differ, by a
level of 255, two at most: ties. (Pillow 13 takes some tall pictures of less than 100 pixels down first: there
noise differs by a few levels, by 0.25 on average.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

_FILTERS = {2: "bilinear", 3: "bicubic"}  # PIL's numbers
_CLIP = {"image_mean": (0.48145466, 0.4578275, 0.40821073), "image_std": (0.26862954, 0.26130258, 0.27577711)}
_HALF = {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5)}
_CUT = {"size": {"shortest_edge": 224}, "crop_size": 224, "do_center_crop": True, "resample": 3, **_CLIP}
# What transformers takes for keys that a file does not have, by model type
_DEFAULTS: dict[str, dict[str, Any]] = {
    "clip": _CUT,
    "dinov2": _CUT,
    "dinov2_with_registers": _CUT,
    "siglip": {"size": {"height": 224, "width": 224}, "resample": 3, **_HALF},
    "siglip2": {"resample": 2, "patch_size": 16, "max_num_patches": 256, **_HALF},
}


_ALWAYS: dict[str, Any] = {
    "do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
}  # fmt: skip
_ALL = 0.95  # of a picture, or of its ratio of the sides: as good as all of it


def preparation(kind: str, config: Mapping[str, Any]) -> Callable[[Tensor], dict[str, Tensor]]:
    """What a model of type `kind` is given: pixels [N, 3, H, W] in [-1, 1] -> its inputs by name.

    Resize, centre crop, scale, mean and standard deviation, as `config` (preprocessor_config.json) asks; for
    siglip2 also the cut into patches. Raises `ValueError` for a filter that torch does not have.
    """
    c = _whole(kind, config)
    if c["do_resize"] and c["resample"] not in _FILTERS:
        raise ValueError(f"resample {c['resample']} of preprocessor_config.json is unknown; 2 and 3 are")

    def prepare(pixels: Tensor) -> dict[str, Tensor]:
        x = ((pixels.float() + 1) * 127.5).round().clamp(0, 255)
        if c["do_resize"]:
            x = resize(x, target(kind, c, *x.shape[2:]), _FILTERS[c["resample"]])
        if c.get("do_center_crop"):
            x = centre_crop(x, *_sides(c["crop_size"]))
        if c["do_rescale"]:
            x = x * c["rescale_factor"]
        if c["do_normalize"]:
            mean, std = (x.new_tensor(c[name]).view(3, 1, 1) for name in ("image_mean", "image_std"))
            x = (x - mean) / std
        if kind == "siglip2":
            return patches(x, c["patch_size"], c["max_num_patches"])
        return {"pixel_values": x}

    return prepare


def _whole(kind: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with what transformers takes for the keys that it does not have."""
    given = {key: value for key, value in config.items() if value is not None}
    return {**_ALWAYS, **_DEFAULTS[kind], **given}


def seen(kind: str, config: Mapping[str, Any], height: int, width: int) -> str | None:
    """In words what a model sees of pictures of `height` x `width`: a part, or all of it out of shape.

    None where that is all of them in their shape, to within 5%, or of siglip2 to whole patches.
    """
    if kind == "siglip2":
        return None
    c = _whole(kind, config)
    sides = target(kind, c, height, width) if c["do_resize"] else (height, width)
    kept = _sides(c["crop_size"]) if c.get("do_center_crop") else sides
    down, across = (min(1.0, kept[k] / sides[k]) for k in range(2))
    if down * across < _ALL:
        return f"the middle {round(width * across)} × {round(height * down)}"
    return pressed(sides, height, width)


def pressed(sides: tuple[int, int], height: int, width: int) -> str | None:
    """In words that pictures of `height` x `width` are resized to `sides`, where that changes their shape."""
    by = sides[1] * height / (sides[0] * width)
    return None if _ALL <= by <= 1 / _ALL else f"them pressed to {sides[1]} × {sides[0]}"


def target(kind: str, config: Mapping[str, Any], height: int, width: int) -> tuple[int, int]:
    """The height and width that a picture of `height` x `width` is resized to."""
    if kind == "siglip2":
        return most_patches(height, width, config["patch_size"], config["max_num_patches"])
    size = config["size"]
    if isinstance(size, int):  # files of old versions: the shorter edge for CLIP, both for SigLIP
        size = {"height": size, "width": size} if kind == "siglip" else {"shortest_edge": size}
    if "shortest_edge" not in size:
        return _sides(size)
    edge, short = size["shortest_edge"], min(height, width)
    return int(edge * height / short), int(edge * width / short)


def most_patches(height: int, width: int, patch: int, most: int) -> tuple[int, int]:
    """Sides in whole patches, at most `most` of them, at the largest scale of the picture that allows it."""

    def sides(scale: float) -> tuple[int, int]:
        return tuple(max(1, math.ceil(side * scale / patch)) * patch for side in (height, width))  # type: ignore[return-value]

    low, high = 1e-6, 100.0
    while high - low >= 1e-5:  # as transformers does it, to the same last step
        scale = (low + high) / 2
        h, w = sides(scale)
        low, high = (scale, high) if h * w <= most * patch**2 else (low, scale)
    return sides(low)


def resize(x: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """[N, 3, H, W] in whole levels 0 .. 255 -> `size`, as PIL does: across, then down, rounded after each."""
    for step in ((x.shape[2], size[1]), size):
        if x.shape[2:] != step:
            x = interpolate(x, step, mode=mode, antialias=True, align_corners=False)
            x = (x + 0.5).floor().clamp(0, 255)  # a half goes up
    return x


def centre_crop(x: Tensor, height: int, width: int) -> Tensor:
    """The middle of [N, 3, H, W]; black around it where it is smaller."""
    missing = [max(0, want - have) for want, have in ((width, x.shape[3]), (height, x.shape[2]))]
    before = [math.ceil(each / 2) for each in missing]
    x = pad(x, (before[0], missing[0] - before[0], before[1], missing[1] - before[1]))
    top, left = (x.shape[2] - height) // 2, (x.shape[3] - width) // 2
    return x[..., top : top + height, left : left + width]


def patches(x: Tensor, patch: int, most: int) -> dict[str, Tensor]:
    """SigLIP 2's inputs of variable shape: rows of patches, filled up with zeros, mask and grid."""
    n, _, height, width = x.shape
    down, across = height // patch, width // patch
    rows = x.unflatten(3, (across, patch)).unflatten(2, (down, patch)).permute(0, 2, 4, 3, 5, 1).flatten(3)
    rows = rows.flatten(1, 2)
    mask = torch.zeros(n, most, dtype=torch.int32, device=x.device)
    mask[:, : down * across] = 1
    grid = torch.tensor([[down, across]], device=x.device).expand(n, 2)
    filled = pad(rows, (0, 0, 0, most - down * across))
    return {"pixel_values": filled, "pixel_attention_mask": mask, "spatial_shapes": grid}


def _sides(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size["height"], size["width"])
