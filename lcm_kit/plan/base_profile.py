"""Which base a config means, and the structure of it, whether or not its files are at hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from lcm_kit import assets
from lcm_kit.bases.source import read_json
from lcm_kit.config.resolution import Resolution, height_width
from lcm_kit.config.schema import Base
from lcm_kit.errors import UserError
from lcm_kit.families import Family, by_repository, generation_of, listed, names
from lcm_kit.lora.structure import Structure, known, of_folder

# The VAE of all published bases
_VAE = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip
_WORDS = 49408  # of CLIP's vocabulary
_BLOCKS = 4 * (0,)  # of a UNet, where a configuration does not say
_LATENT = 4  # channels, where a configuration does not say


@dataclass(frozen=True)
class BaseProfile:
    """The base that is planned for."""

    structure: Structure
    tokens: int = 77  # L of the text embeddings
    pooled: int = 0  # P of SDXL's pooled embedding; 0: there is none
    note: str | None = None  # what was taken for granted, as a sentence
    vae_config: Mapping[str, Any] = field(default_factory=lambda: _VAE)
    words: int = _WORDS  # of the text encoders' vocabulary
    folder: Path | None = None  # of the base with its weights; None: they are not at hand
    stored: torch.dtype | None = None  # of the UNet's weights in their file, as far as one can tell

    @property
    def unet_config(self) -> Mapping[str, Any]:
        """The UNet's."""
        return self.structure.unet_config

    @property
    def channels(self) -> int:
        """C of a latent."""
        return int(self.unet_config.get("in_channels", _LATENT))

    @property
    def family(self) -> Family:
        """What it is one of."""
        return self.structure.family

    @property
    def factor(self) -> int:
        """Pixels along one side of a latent."""
        return self.structure.factor

    @property
    def multiple(self) -> int:
        """Pixels that both sides of a picture are best a multiple of: its UNet halves latents."""
        blocks = self.unet_config.get("block_out_channels", _BLOCKS)
        return int(self.factor * 2 ** (len(blocks) - 1))

    def sides(self, resolution: Resolution) -> tuple[int, int]:
        """Height and width of a picture's latent."""
        height, width = height_width(resolution)
        return height // self.factor, width // self.factor

    def latent(self, resolution: Resolution) -> int:
        """Numbers of a picture's latent."""
        height, width = self.sides(resolution)
        return self.channels * height * width

    @property
    def text(self) -> int:
        """Weights of the text encoders: embeddings, matrices, biases, two norms a layer and a last one."""
        total = 0
        for part in ("text_encoder.", "text_encoder_2."):
            shapes = {k: shape for k, shape in self.structure.modules.items() if k.startswith(part)}
            width = next((shape[0] for k, shape in shapes.items() if k.endswith("q_proj")), 0)
            layers = sum(k.endswith("q_proj") for k in shapes)
            total += sum(rows * (columns + 1) for rows, columns in shapes.values())
            total += width * (self.words + self.tokens + 4 * layers + 2 * bool(layers))
        return total + self.pooled * width


def find(base: Base, structure: str | None = None) -> BaseProfile:
    """The base of a config, or the published `structure`, by its name, in its place.

    Of a hub id at most the configuration files are downloaded; where they cannot be had, and no structure is
    given, it is guessed from the name, which the note says. Raises `UserError` for a path with nothing there.
    """
    found = published(structure) if structure else _find(base)
    if found.stored is None:
        return replace(found, stored=torch.float16 if base.variant == "fp16" else torch.float32)
    return found


def _find(base: Base) -> BaseProfile:
    path = assets.place(base.path)
    if path.is_file():
        return _single_file(path)
    if path.is_dir() or base.path.startswith(("asset:", "/", ".", "~")) or base.path.count("/") > 1:
        return _of_folder(path, base.path)
    folder = _configuration(base)
    if folder is not None:
        return _of_folder(folder, base.path)
    guess = published(by_repository(base.path).name)
    note = (
        f"base {base.path} is not at hand: planned as {guess.structure.label}, by its name; "
        f"--structure ({', '.join(names())}) says otherwise"
    )
    return replace(guess, note=note)


def published(name: str) -> BaseProfile:
    """SD1.x, SD2.x, SDXL or SSD-1B as published. Raises `UserError` for another name."""
    return BaseProfile(known(name), pooled=generation_of(name).pooled)


def _single_file(path: Path) -> BaseProfile:
    from lcm_kit.bases.checkpoint import contents_of

    return published(contents_of(path).generation.name)


def _of_folder(folder: Path, path: str) -> BaseProfile:
    if not folder.is_dir():
        raise UserError(f"base {path!r}: there is no such folder; check base.path, or give --structure")
    found = of_folder(folder, path)
    text, second, vae = (_json(folder / part, path) for part in ("text_encoder", "text_encoder_2", "vae"))
    channels, latent = found.unet_config.get("in_channels", _LATENT), vae.get("latent_channels", _LATENT)
    if channels != latent:
        raise UserError(
            f"base {path!r}: its UNet takes {channels} channels, its VAE gives {latent}; inpainting and "
            "depth bases are not supported, give the plain one"
        )
    return BaseProfile(
        found,
        text.get("max_position_embeddings", 77),
        second.get("projection_dim", found.generation.pooled) if found.family.added_condition else 0,
        vae_config=vae,
        words=text.get("vocab_size", _WORDS),
        folder=folder if all(any((folder / p).glob("*.safetensors")) for p in ("unet", "vae")) else None,
        stored=_stored(folder / "unet"),
    )


def _stored(folder: Path) -> torch.dtype | None:
    """The dtype of the weights in a folder if there is one file of them; None if one cannot tell."""
    files = list(folder.glob("*.safetensors"))
    if len(files) != 1:
        return None
    with safe_open(files[0], "pt") as file:
        return file.get_tensor(next(iter(file.keys()))).dtype


def _json(folder: Path, base: str) -> dict[str, Any]:
    file = folder / "config.json"
    return read_json(file, base) if file.is_file() else {}


def _configuration(base: Base) -> Path | None:
    """The folder of a hub id's configuration files; None where they cannot be had."""
    from huggingface_hub import snapshot_download

    wanted = ["model_index.json", "*/config.json", "scheduler/scheduler_config.json"]
    try:
        folder = Path(snapshot_download(base.path, revision=base.revision, allow_patterns=wanted))
    except Exception:  # the name, the network, permissions: the hub raises of all kinds
        return None
    index = folder / "model_index.json"
    if index.is_file() and "unet" not in read_json(index, base.path):
        raise UserError(f"base {base.path!r} has no UNet; give an {listed()} base")
    parts = ("unet/config.json", "vae/config.json", "scheduler/scheduler_config.json")
    # offline, a cache may hold some of the files
    return folder if index.is_file() and all((folder / part).is_file() for part in parts) else None
