"""What a base is: recognised from its folder, without its weights; and the models that all families share.

Spaces: pixels [B, 3, H, W] in [-1, 1]; raw latents as the VAE gives them; latents = (raw - shift) * scale,
[B, C, H/f, W/f], which is what the UNet sees
(`encode_images`). diffusers and transformers are imported on use: it
takes seconds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcm_kit.bases import configs, weights
from lcm_kit.bases.locate import locate
from lcm_kit.bases.source import STEMS, file_hash, read_json
from lcm_kit.bases.vocabulary import require_vocabulary
from lcm_kit.bases.weights import Place
from lcm_kit.config.resolution import Resolution, shown, width_height
from lcm_kit.errors import UserError
from lcm_kit.families import FAMILIES, Family, by_pipeline, listed
from lcm_kit.io import licenses
from lcm_kit.io.files import sha256_bytes

_DENOISERS = {"transformer": "a transformer", "prior": "a prior", "image_encoder": "an image_encoder"}
DECODED_PIXELS = 1024 * 1024  # of all pictures that a VAE decodes together
_KINDS = ("epsilon", "v_prediction", "sample")
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_LCM = (
    *_ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "conv_shortcut",
    "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
)  # fmt: skip
_TEXT = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")  # of each block of a text encoder


def lora_targets(kind: str) -> list[str]:
    """Name endings of the layers that a LoRA adapts: `lcm` (LCM-LoRA, arXiv:2311.05556) or `attention`."""
    return list({"lcm": _LCM, "attention": _ATTENTION}[kind])


def text_layers(encoder: Any, unseen: int = 0) -> list[str]:
    """The linear layers of a CLIP text encoder that LoRA files carry, but of its last `unseen` blocks."""
    endings = tuple(f".{name}" for name in _TEXT)
    skipped = range(encoder.config.num_hidden_layers - unseen, encoder.config.num_hidden_layers)
    places = tuple(f"encoder.layers.{k}." for k in skipped)
    names = [name for name, _ in encoder.named_modules() if name.endswith(endings)]
    return [name for name in names if not any(place in name for place in places)]


@dataclass(frozen=True)
class BaseInfo:
    """What a base says of itself on disk; no weights are loaded. Hashes are computed when asked for."""

    path: str  # as it was asked for: folder, hub id or asset:NAME
    folder: Path  # where it lies
    revision: str | None
    variant: str | None
    prediction_type: str  # epsilon, v_prediction or sample
    scheduler_config: Mapping[str, Any]
    latent_channels: int
    factor: int  # f: pixels along one side of a latent
    sample_size: int  # the UNet's own latent size; sample_size * factor pixels
    scaling_factor: float
    shift_factor: float
    multiple: int  # pixels that both sides of a picture are best a multiple of: its UNet halves latents
    width: int  # D of the text embeddings
    family: Family
    zeros_when_empty: bool = False  # the empty condition is zeros, not the encoded ""
    vae_overflows: bool = False  # in float16, as its configuration says
    latents_mean: tuple[float, ...] | None = None  # of raw latents, by channel, with latents_std
    latents_std: tuple[float, ...] | None = None

    @property
    def resolution(self) -> int:
        """Pixels along one side of the pictures that it was made for."""
        return self.sample_size * self.factor

    def require_resolution(self, asked: Resolution, key: str) -> None:
        """Raise `UserError` for a size of pictures that its VAE has no latents of; `key` asks for it."""
        odd = next((side for side in width_height(asked) if side % self.factor), None)
        if odd is not None:
            size = asked if isinstance(asked, int) else f"{shown(asked)}: {odd}"
            near = max(odd // self.factor, 1) * self.factor
            raise UserError(
                f"{key} {size} is not a multiple of {self.factor}, as the base's VAE needs; try {near}"
            )

    @property
    def place(self) -> Place:
        """Where its parts lie."""
        return Place(self.path, self.folder, self.variant)

    @property
    def parts(self) -> tuple[str, ...]:
        """The folders that make this base."""
        return self.family.parts

    def hash_of(self, part: str) -> str:
        """Content hash of one of `parts`: configuration and weight files (unchanged by a plain re-save)."""
        folder = self.folder / part
        if part.startswith("tokenizer"):
            files = sorted(p for p in folder.iterdir() if p.suffix in (".json", ".txt", ".model"))
            return sha256_bytes("".join(f"{p.name}:{file_hash(p)}\n" for p in files).encode())
        config = read_json(_config_file(folder), self.path)
        own = {key: config[key] for key in sorted(config) if key[0] != "_" and key != "transformers_version"}
        weights = [file_hash(file) for file in weight_files(self, part)] if part in STEMS else []
        return sha256_bytes(json.dumps([own, weights]).encode())

    @property
    def license(self) -> str | None:
        """The licence that its README.md declares, by its SPDX id if it has one; None: none."""
        return licenses.of_readme(self.folder)

    @property
    def base_hash(self) -> str:
        """Content hash of the whole base."""
        return sha256_bytes("".join(self.hash_of(part) for part in self.parts).encode())


def weight_files(base: BaseInfo, part: str) -> list[Path]:
    """The safetensors files of a part that has weights: `weights.weight_files`."""
    return weights.weight_files(base.place, part)


def inspect_base(path: str, *, revision: str | None = None, variant: str | None = None) -> BaseInfo:
    """Read a base's configuration and the headers of its weights, no tensor.

    `path` is a diffusers folder, a hub id or `asset:NAME`. Raises `UserError` if it is not found, not a
    pipeline folder, not of this family, or without whole safetensors weights or its vocabulary.
    """
    folder = locate(path, revision, variant)
    index = read_json(folder / "model_index.json", path)
    family = _family(folder, index, path)
    contents = {
        part: read_json(_config_file(folder / part), path)
        for part in family.parts
        if not part.startswith("tokenizer")
    }
    place = {"path": path, "folder": folder, "revision": revision, "variant": variant, "family": family}
    info = _describe(contents, index, **place)
    for part in info.parts:
        if part in STEMS:
            weights.entries(info.place, part)
        elif part.startswith("tokenizer"):
            encoder = _parsed(configs.Text, contents, part.replace("tokenizer", "text_encoder"), path)
            require_vocabulary(folder, part, path, index.get(part), encoder.vocab_size)
    return info


def require_fit(base: BaseInfo) -> None:
    """Raise `UserError` unless each part's files hold the tensors of its model; none is read (seconds)."""
    for part in base.parts:
        if part in STEMS:
            weights.require_fit(base.place, part)


def _config_file(folder: Path) -> Path:
    return folder / ("scheduler_config.json" if folder.name == "scheduler" else "config.json")


def _family(folder: Path, index: Mapping[str, Any], path: str) -> Family:
    """By what model_index.json says; all of its parts must be there."""
    parts = {part for part, kind in index.items() if isinstance(kind, list) and any(kind)}
    name = index.get("_class_name")
    if other := next((words for part, words in _DENOISERS.items() if part in parts), None):
        raise UserError(
            f"base {path!r} ({name}): its model_index.json names {other}; give an {listed()} base"
        )
    family = by_pipeline(name, parts)
    missing = [part for part in family.parts if not (folder / part).is_dir()]
    if missing:
        raise UserError(f"base {path!r} ({name}) has no {', '.join(missing)}; give an {listed()} base")
    return family


def _parsed(kind: Any, contents: Mapping[str, Mapping[str, Any]], part: str, path: str) -> Any:
    file = f"{part}/{_config_file(Path(part)).name}"
    return configs.parse(kind, contents[part], f"base {path!r}: {file}")


def _describe(contents: Mapping[str, Mapping[str, Any]], index: Mapping[str, Any], **place: Any) -> BaseInfo:
    path, family = place["path"], place["family"]
    unet, vae = (
        _parsed(k, contents, part, path) for k, part in ((configs.Teacher, "unet"), (configs.Vae, "vae"))
    )
    text = [
        _parsed(configs.Text, contents, part, path) for part in contents if part.startswith("text_encoder")
    ]
    pipeline = configs.parse(configs.Index, index, f"base {path!r}: model_index.json")
    scheduler = _parsed(configs.Scheduler, _with_class(contents, index), "scheduler", path)
    if unet.in_channels != vae.latent_channels:
        raise UserError(
            f"base {path!r}: its UNet takes {unet.in_channels} channels, its VAE gives "
            f"{vae.latent_channels}; inpainting and depth bases are not supported, give the plain one"
        )
    if unet.addition_embed_type != family.added_condition:
        kind = unet.addition_embed_type
        others = [other.title for other in FAMILIES.values() if other.added_condition == kind]
        raise UserError(
            f"base {path!r}: its parts in model_index.json are those of {family.title}, its UNet is one of "
            f"{' or '.join(others)}; give the whole folder of one base"
        )
    if scheduler.prediction_type not in _KINDS:
        raise UserError(
            f"base {path!r}: prediction_type {scheduler.prediction_type!r} is not supported, only "
            f"{', '.join(_KINDS)}"
        )
    if vae.latents_mean is not None and not family.latent_statistics:
        raise UserError(
            f"base {path!r}: vae/config.json has latents_mean, which no app applies to a base of "
            f"{family.title}; take it out, with latents_std, if the UNet was trained without"
        )
    return BaseInfo(
        prediction_type=scheduler.prediction_type,
        scheduler_config=contents["scheduler"],
        latent_channels=vae.latent_channels,
        factor=2 ** (len(vae.block_out_channels) - 1),
        sample_size=unet.sample_size,
        multiple=2 ** (len(vae.block_out_channels) + len(unet.block_out_channels) - 2),
        scaling_factor=vae.scaling_factor or 0.18215,
        shift_factor=vae.shift_factor or 0.0,
        width=sum(encoder.hidden_size for encoder in text),
        zeros_when_empty=family.zeros_when_empty and pipeline.force_zeros_for_empty_prompt,
        vae_overflows=family.vae_overflows and vae.force_upcast,
        latents_mean=None if vae.latents_mean is None else tuple(vae.latents_mean),
        latents_std=None if vae.latents_std is None else tuple(vae.latents_std),
        **place,
    )


def _with_class(
    contents: Mapping[str, Mapping[str, Any]], index: Mapping[str, Any]
) -> Mapping[str, Mapping[str, Any]]:
    """The scheduler's class is what model_index.json says, by which diffusers goes, or else its own file."""
    entry = index.get("scheduler")
    named = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
    return {"scheduler": {**contents["scheduler"], **({} if named is None else {"_class_name": named})}}


def load_part(base: BaseInfo, part: str, dtype: torch.dtype) -> Any:
    """One model of a base, frozen, in eval mode: `weights.load_model`."""
    return weights.load_model(base.place, part, dtype)


def load_unet(base: BaseInfo, dtype: torch.dtype = torch.float32) -> Any:
    """The base's `UNet2DConditionModel`, frozen, in eval mode."""
    return load_part(base, "unet", dtype)


def load_vae(base: BaseInfo, dtype: torch.dtype = torch.float32) -> Any:
    """The base's `AutoencoderKL`, frozen, in eval mode."""
    return load_part(base, "vae", dtype)


def _shift_and_scale(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """By channel [1, C, 1, 1] as `like`: shift_factor + latents_mean, scaling_factor / latents_std.

    As in StableDiffusionXLPipeline, which applies mean and deviation where a VAE's configuration has them.
    """
    config = vae.config

    def by_channel(values: Any) -> Tensor:
        return torch.as_tensor(values, dtype=like.dtype, device=like.device).view(1, -1, 1, 1)

    shift = by_channel(config.shift_factor or 0.0)
    scale = by_channel(config.scaling_factor)
    if getattr(config, "latents_mean", None) is not None:
        shift, scale = shift + by_channel(config.latents_mean), scale / by_channel(config.latents_std)
    return shift, scale


@torch.no_grad()
def encode_images(vae: Any, pixels: Tensor) -> Tensor:
    """Pixels [B, 3, H, W] to latents [B, C, H/f, W/f]: (posterior mean - shift) * scale."""
    raw = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mean
    shift, scale = _shift_and_scale(vae, raw)
    return (raw - shift) * scale


def decoded_at_once(height: int, width: int) -> int:
    """How many pictures of so many pixels `decode_latents` decodes together: 1 from 1024x1024 on.

    A VAE holds more than a UNet does, whatever that one's batch: 3 GiB for one picture of SDXL in float32.
    """
    return max(1, DECODED_PIXELS // (height * width))


@torch.no_grad()
def decode_latents(vae: Any, latents: Tensor) -> Tensor:
    """Latents [B, C, H/f, W/f] to pixels [B, 3, H, W], about [-1, 1], not clipped; some at a time."""
    own = latents.to(vae.device, vae.dtype)
    shift, scale = _shift_and_scale(vae, own)
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    parts = (own / scale + shift).split(decoded_at_once(*(factor * side for side in own.shape[2:])))
    return torch.cat([vae.decode(part).sample for part in parts])
