"""What is kept of every picture of a sweep, so that all that is measured later needs no pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lcm_kit import assets
from lcm_kit.config.brand import Brand
from lcm_kit.config.sweep import Compose, GuidanceSweep
from lcm_kit.console import working
from lcm_kit.data import records
from lcm_kit.errors import UserError
from lcm_kit.metrics.accuracy import ATTRIBUTES
from lcm_kit.metrics.features import PROBE, Extractor, extractor
from lcm_kit.metrics.judge import REFERENCE_SEED
from lcm_kit.metrics.saturation import chroma, clipped_shares
from lcm_kit.metrics.sharpness import laplacian_energy
from lcm_kit.results import Rows
from lcm_kit.tiny import world
from lcm_kit.tiny.probe import Probe, load_probe

RENDERS = 512  # real pictures of the embedded world behind the Frechet and kernel distances
_BATCH = 64


@dataclass(frozen=True)
class Looker:
    """Turns pictures into figures, a row a picture."""

    features: Extractor
    texts: Extractor | None  # that reads prompts; None: no prompt adherence, or the probe's
    probe: Probe | None  # with prompts of the embedded world

    @classmethod
    def of(
        cls, config: GuidanceSweep | Compose | Brand, prompts: Sequence[str], size: int, device: str
    ) -> Looker:
        """What `config` asks for. Raises `UserError` if an extractor is not there or reads no text.

        Pictures that may be in a brand's look are read by the probe that knows the brand looks.
        """
        ours = size == world.SIZE and all(map(world.parse, prompts))
        probe = assets.path("brand-probe" if isinstance(config, Brand | Compose) else "probe")
        if config.features == PROBE and size != world.SIZE:
            raise UserError(
                f"features {PROBE} reads pictures of {world.SIZE} pixels, and these have {size}; set "
                "features to the folder or hub id of a CLIP, SigLIP or DINOv2 model"
            )
        features = extractor(config.features, device)
        texts = features if config.text_features is None else extractor(config.text_features, device)
        if texts.texts(prompts[:1]) is None:
            if config.text_features is not None:
                raise UserError(
                    f"text_features {config.text_features!r} reads no text; name a CLIP or SigLIP model"
                )
            return cls(features, None, load_probe(probe) if ours else None)
        return cls(features, texts, None)

    @torch.no_grad()
    def __call__(self, pixels: Tensor, prompts: Sequence[str]) -> Rows:
        """Of pixels [B, 3, H, W] in [-1, 1]: `features` [B, F], `chroma`, `clipped`, `sharpness` [B], and
        `adherence` [B] where prompts are read: CLIP score, or 1 where the probe reads all that was asked.
        """
        table = {
            "features": self.features.images(pixels),
            "chroma": chroma(pixels),
            "clipped": clipped_shares(pixels),
            "sharpness": laplacian_energy(pixels),
        }
        if self.texts is not None:
            seen = table["features"] if self.texts is self.features else self.texts.images(pixels)
            asked = self.texts.texts(prompts)
            assert asked is not None  # `of` has looked
            table["adherence"] = self.texts.similarity(seen, asked)
        elif self.probe is not None:
            table["adherence"] = _right(self.probe, pixels, prompts)
        return {name: value.float().cpu() for name, value in table.items()}

    def kind(self) -> str:
        """What `adherence` is: `clip`, `attributes` or `none`."""
        return "clip" if self.texts is not None else "attributes" if self.probe is not None else "none"

    @torch.no_grad()
    def folder(self, path: str, size: int) -> Tensor:
        """Features [n, F] of the images in a folder or asset, cut square. Raises `UserError` for none."""
        files = records.pictures(assets.place(path), path)
        rows = []
        with working(f"measuring the {len(files)} pictures of {path}"):
            for first in range(0, len(files), _BATCH):
                pictures = [record.pixels(size) for record in files[first : first + _BATCH]]
                rows.append(self.features.images(torch.stack(pictures)).float().cpu())
        return torch.cat(rows)

    @torch.no_grad()
    def renders(self) -> Tensor:
        """Features [RENDERS, F] of held-out real pictures of the embedded world."""
        rng = np.random.default_rng(REFERENCE_SEED)
        drawn = [np.asarray(world.render(world.random_scene(rng))) for _ in range(RENDERS)]
        pixels = torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2) / 127.5 - 1
        return torch.cat([self.features.images(part).float().cpu() for part in pixels.split(_BATCH)])


def _right(probe: Any, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
    """[B]: 1 where object, colour and pattern are read as prompted."""
    pairs = zip(probe.read(pixels), map(world.parse, prompts), strict=True)
    return torch.tensor(
        [all(seen[name] == getattr(scene, name) for name in ATTRIBUTES) for seen, scene in pairs]
    )


def reference_features(
    config: GuidanceSweep, looker: Looker, prompts: Sequence[str], size: int
) -> Tensor | None:
    """Features of real pictures: those of `config.real`, renders where the prompts are of the embedded world,
    or None.
    """
    if config.real is not None:
        return looker.folder(config.real, size)
    ours = size == world.SIZE and all(map(world.parse, prompts))
    return looker.renders() if ours else None


def brand_features(
    config: GuidanceSweep | Compose, looker: Looker, size: int
) -> tuple[Tensor, Tensor] | None:
    """Features of `config.brand` and of its control; None unless both are named."""
    if not (config.brand and config.control):
        return None
    return looker.folder(config.brand, size), looker.folder(config.control, size)
