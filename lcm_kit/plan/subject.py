"""Which base a config means, and the structure of it, whether or not its files are at hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lcm_kit import assets
from lcm_kit.config.schema import Base
from lcm_kit.errors import UserError
from lcm_kit.export.structure import Structure, empty_unet, known, of_folder

PUBLISHED = ("sd1", "sd2", "sdxl", "ssd1b")
# What SSD-1B's UNet has instead of SDXL's (segmind/SSD-1B, unet/config.json)
_SSD1B = {
    "transformer_layers_per_block": (1, [2, 2], [4, 4]),
    "mid_block_type": "UNetMidBlock2D",
    "reverse_transformer_layers_per_block": ([4, 4, 10], [2, 1, 1], 1),
}
_HINTS = {"ssd1b": ("ssd-1b", "ssd1b"), "sdxl": ("xl",), "sd2": ("-2-", "-2", "sd2", "sd-2", "v2")}


@dataclass(frozen=True)
class Subject:
    """The base that is planned for."""

    structure: Structure
    tokens: int = 77  # L of the text embeddings
    pooled: int = 0  # P of SDXL's pooled embedding; 0: there is none
    note: str | None = None  # what was taken for granted, as a sentence

    @property
    def unet_config(self) -> Mapping[str, Any]:
        """The UNet's."""
        return self.structure.unet_config


def find(base: Base, structure: str | None = None) -> Subject:
    """The base of a config, or the published `structure` (of `PUBLISHED`) in its place.

    Of a hub id at most the configuration files are downloaded; where they cannot be had, and no structure is
    given, it is guessed from the name, which the note says. Raises `UserError` for a path with nothing there.
    """
    if structure is not None:
        return published(structure)
    path = Path(assets.resolve(base.path)).expanduser()
    if path.is_file():
        return _single_file(path)
    if path.is_dir() or base.path.startswith(("asset:", "/", ".", "~")) or base.path.count("/") > 1:
        return _of_folder(path, base.path)
    try:
        return _of_folder(_configuration(base), base.path)
    except Exception:  # the hub raises of all kinds; an incomplete cache is a UserError
        guess = _guess(base.path)
        label = published(guess).structure.label
        note = f"base {base.path} is not at hand: planned as {label} by its name; --structure says otherwise"
        return replace(published(guess), note=note)


def published(name: str) -> Subject:
    """SD1.x, SD2.x, SDXL or SSD-1B as published. Raises `UserError` for another name."""
    if name not in PUBLISHED:
        raise UserError(f"structure {name!r} is not known here; choose one of {', '.join(PUBLISHED)}")
    if name == "ssd1b":
        return Subject(_ssd1b(), pooled=1280)
    return Subject(known(name), pooled=1280 * (name == "sdxl"))


def _ssd1b() -> Structure:
    from torch.nn import Conv2d, Linear

    config = {**known("sdxl").unet_config, **_SSD1B}
    named = empty_unet(config).named_modules()
    modules = {f"unet.{n}": tuple(m.weight.shape) for n, m in named if isinstance(m, Linear | Conv2d)}
    return Structure("SSD-1B", "sdxl", modules, config)


def _single_file(path: Path) -> Subject:
    from lcm_kit.families.checkpoint import FAMILIES, contents_of

    family = contents_of(path).family
    return published(next(key for key, value in FAMILIES.items() if value is family))


def _of_folder(folder: Path, path: str) -> Subject:
    if not folder.is_dir():
        raise UserError(f"base {path!r}: there is no such folder; check base.path, or give --structure")
    found = of_folder(folder, path)
    text, second = _json(folder / "text_encoder"), _json(folder / "text_encoder_2")
    pooled = second.get("projection_dim", 1280) if found.family == "sdxl" else 0
    return Subject(found, text.get("max_position_embeddings", 77), pooled)


def _json(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _configuration(base: Base) -> Path:
    from huggingface_hub import snapshot_download

    wanted = ["model_index.json", "*/config.json", "scheduler/scheduler_config.json"]
    return Path(snapshot_download(base.path, revision=base.revision, allow_patterns=wanted))


def _guess(path: str) -> str:
    name = path.lower()
    return next((key for key, hints in _HINTS.items() if any(hint in name for hint in hints)), "sd1")
