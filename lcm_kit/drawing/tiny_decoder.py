"""A tiny decoder in the VAE's place: diffusers' AutoencoderTiny, for previews.

It decodes what was drawn in a small part of the VAE's time: colours and shapes, not all fine detail. What it
decoded is always named with it, and its figures stand beside none of the VAE's.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lcm_kit.bases import BaseInfo
from lcm_kit.bases.headers import read_header
from lcm_kit.bases.source import file_hash, read_json
from lcm_kit.bases.weights import hushed
from lcm_kit.errors import UserError, first_line
from lcm_kit.io.files import sha256_bytes

_WEIGHTS = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class TinyDecoder:
    """Where a tiny decoder lies, and its hash."""

    folder: Path
    sha256: str  # of its configuration and weights

    def __str__(self) -> str:
        """As it is named wherever it was used."""
        return f"{self.folder.name} ({self.sha256[:8]})"


def find(path: str, base: BaseInfo) -> TinyDecoder:
    """The tiny decoder in the folder `path`; no weights are loaded.

    Raises `UserError` if there is none, or it is for latents of other channels, size or scale than those of
    `base`.
    """
    folder = Path(path).expanduser()
    if not (folder / "config.json").is_file():
        raise UserError(
            f"decoder {path!r} is not a folder with a config.json; give the folder of a diffusers "
            "AutoencoderTiny, as its save_pretrained writes it"
        )
    config = read_json(folder / "config.json", path)
    kind = config.get("_class_name")
    if kind != "AutoencoderTiny":
        raise UserError(f"decoder {path!r} is a {kind}, not an AutoencoderTiny; give the folder of one")
    if not (folder / _WEIGHTS).is_file():
        raise UserError(f"decoder {path!r} has no {_WEIGHTS}; save it again with diffusers' save_pretrained")
    read_header(folder / _WEIGHTS, f"decoder {path!r}: {_WEIGHTS}")
    _require_fit(path, config, base)
    plain = json.dumps({key: config[key] for key in sorted(config) if key[0] != "_"})
    return TinyDecoder(folder, sha256_bytes(f"{plain}{file_hash(folder / _WEIGHTS)}".encode()))


def _require_fit(path: str, config: Any, base: BaseInfo) -> None:
    """Its own defaults stand where its configuration does not say."""
    channels = config.get("latent_channels", 4)
    if channels != base.latent_channels:
        raise UserError(
            f"decoder {path!r} decodes latents of {channels} channels, and those of {base.path!r} have "
            f"{base.latent_channels}; give one that was made for this base's VAE"
        )
    blocks = len(config.get("decoder_block_out_channels", (64,) * 4))
    factor = config.get("upsampling_scaling_factor", 2) ** (blocks - 1)
    if factor != base.factor:
        raise UserError(
            f"decoder {path!r} makes {factor} pixels of a latent's side, and the VAE of {base.path!r} "
            f"{base.factor}; give one that was made for this base's VAE"
        )
    scale, shift = config.get("scaling_factor", 1.0), config.get("shift_factor", 0.0)
    if scale != 1.0 or shift != 0.0:
        raise UserError(
            f"decoder {path!r} takes latents at another scale (scaling_factor {scale}, shift_factor "
            f"{shift}); give one with 1 and 0, which decodes latents as the UNet sees them"
        )


def load(found: TinyDecoder, dtype: torch.dtype) -> Any:
    """The AutoencoderTiny, frozen, in eval mode. Raises `UserError` if its file is not its weights."""
    from diffusers import AutoencoderTiny

    try:
        with hushed():  # it warns of a key that its own save_pretrained writes
            model, report = AutoencoderTiny.from_pretrained(
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
    return model.eval().requires_grad_(False)
