"""What decodes in the VAE's place: diffusers' AutoencoderTiny, or its ConsistencyDecoderVAE.

The first decodes in a small part of the VAE's time: colours and shapes, not all fine detail. The second draws
the picture in two steps of a UNet of its own, in many times the VAE's time. What either decoded is always
named with it, and its figures stand beside none of the VAE's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lcm_kit.assets import place
from lcm_kit.bases import BaseInfo
from lcm_kit.bases.headers import read_header
from lcm_kit.bases.source import file_hash, read_json
from lcm_kit.bases.weights import hushed
from lcm_kit.drawing import consistency_decoder
from lcm_kit.errors import UserError, first_line
from lcm_kit.io.files import sha256_bytes

PREVIEW, CONSISTENCY = "AutoencoderTiny", "ConsistencyDecoderVAE"
_CONFIG, _WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class Decoder:
    """Where another decoder than the base's lies, its class in diffusers, and its hash."""

    folder: Path
    kind: str
    name: str
    sha256: str  # of its configuration and weights

    def __str__(self) -> str:
        """As it is named wherever it was used."""
        return f"{self.kind} {self.name} ({self.sha256[:8]})"

    @property
    def means(self) -> str:
        """What its pictures are beside those of the base's VAE."""
        if self.kind == CONSISTENCY:
            return "fine detail is drawn anew, from noise of its own, and is not what the base's VAE draws"
        return "previews, without the fine detail that the base's VAE draws"

    @property
    def config(self) -> dict[str, Any]:
        """Its own configuration."""
        return read_json(self.folder / _CONFIG, self.name)


def find(path: str, base: BaseInfo) -> Decoder:
    """The decoder `path` (a folder, a hub id or asset:NAME), for latents of `base`; no weights are loaded.

    Raises `UserError` if there is none, or it is for latents of other channels, size or scale than those of
    `base`.
    """
    folder, kind, config = _located(path)
    if not (folder / _WEIGHTS).is_file():
        raise UserError(f"decoder {path!r} has no {_WEIGHTS}; save it again with diffusers' save_pretrained")
    read_header(folder / _WEIGHTS, f"decoder {path!r}: {_WEIGHTS}")
    _require_fit(path, kind, config, base)
    plain = json.dumps({key: config[key] for key in sorted(config) if key[0] != "_"})
    digest = sha256_bytes(f"{plain}{file_hash(folder / _WEIGHTS)}".encode())
    return Decoder(folder, kind, _name(path), digest)


def said(path: str) -> str:
    """What is said of a decoder in the text of a picture's file. Raises `UserError` if there is none."""
    return f"{_located(path)[1]} {_name(path)}"


def _name(path: str) -> str:
    """An asset and a hub id by the whole of it, a folder by its own name."""
    folder = place(path)
    return folder.name if folder.is_dir() and not path.startswith("asset:") else path


def _located(path: str) -> tuple[Path, str, dict[str, Any]]:
    """Folder, class and configuration."""
    folder = place(path)
    if not folder.exists() and path.count("/") == 1 and not path.startswith(("/", ".", "~")):
        folder = _download(path)
    if not (folder / _CONFIG).is_file():
        raise UserError(
            f"decoder {path!r} is not a folder with a {_CONFIG}; give the folder of a diffusers {PREVIEW} or "
            f"{CONSISTENCY}, as its save_pretrained writes it"
        )
    config = read_json(folder / _CONFIG, path)
    kind = config.get("_class_name")
    if kind not in (PREVIEW, CONSISTENCY):
        raise UserError(
            f"decoder {path!r} is a {kind}, neither an {PREVIEW} nor a {CONSISTENCY}; give the folder of one"
        )
    return folder, kind, config


def _download(path: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=[_CONFIG, _WEIGHTS]))
    except Exception as error:  # the hub raises of all kinds, none is our bug
        raise UserError(
            f"decoder {path!r} is neither a folder nor a hub id that can be reached ({first_line(error)}); "
            "check the name and the connection"
        ) from error


# -- Whether it is for the base's latents --------------------------------------------------------------------


def _require_fit(path: str, kind: str, config: Mapping[str, Any], base: BaseInfo) -> None:
    """Its class's own defaults stand where its configuration does not say."""
    drawn = kind == CONSISTENCY
    channels = config.get("latent_channels", 4)
    if channels != base.latent_channels:
        raise UserError(
            f"decoder {path!r} decodes latents of {channels} channels, and those of {base.path!r} have "
            f"{base.latent_channels}; give one that was made for this base's VAE"
        )
    blocks = "encoder_block_out_channels" if drawn else "decoder_block_out_channels"
    doublings = len(config.get(blocks, (64,) * 4)) - 1
    factor = (2 if drawn else config.get("upsampling_scaling_factor", 2)) ** doublings
    if factor != base.factor:
        raise UserError(
            f"decoder {path!r} makes {factor} pixels of a latent's side, and the VAE of {base.path!r} "
            f"{base.factor}; give one that was made for this base's VAE"
        )
    if drawn:
        consistency_decoder.require_fit(path, config, base)
        return
    scale, shift = config.get("scaling_factor", 1.0), config.get("shift_factor", 0.0)
    if scale != 1.0 or shift != 0.0:
        raise UserError(
            f"decoder {path!r} takes latents at another scale (scaling_factor {scale}, shift_factor "
            f"{shift}); give one with 1 and 0, which decodes latents as the UNet sees them"
        )


# -- Loaded --------------------------------------------------------------------------------------------------


def load(found: Decoder, dtype: torch.dtype) -> Any:
    """diffusers' model, frozen, in eval mode. Raises `UserError` if its file is not its weights."""
    import diffusers

    try:
        with hushed():  # it warns of a key that its own save_pretrained writes
            model, report = getattr(diffusers, found.kind).from_pretrained(
                found.folder, dtype=dtype, use_safetensors=True, local_files_only=True,
                output_loading_info=True,
            )  # fmt: skip
    except (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"decoder {str(found.folder)!r} cannot be loaded ({first_line(error)}); save it again"
        ) from error
    odd = [*report["missing_keys"], *report["unexpected_keys"], *report.get("mismatched_keys", ())]
    if odd:
        raise UserError(
            f"decoder {str(found.folder)!r}: its weights are not those that its config.json describes "
            f"({odd[0]}, {len(odd)} in all); save it again"
        )
    if found.kind == CONSISTENCY:
        consistency_decoder.set_statistics(model, found.config)
    return model.eval().requires_grad_(False)
