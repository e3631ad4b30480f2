"""What is kept of every picture of a sweep, so that all that is measured later needs no pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lcm_kit import assets
from lcm_kit.config.resolution import Resolution, height_width, shown
from lcm_kit.config.sweep import Compose, GuidanceSweep
from lcm_kit.console import say, working
from lcm_kit.data import records
from lcm_kit.errors import UserError
from lcm_kit.evaluation.kept import Rows
from lcm_kit.evaluation.metric_table import Column, columns_of
from lcm_kit.evaluation.metrics.accuracy import ATTRIBUTES, attributes_right
from lcm_kit.evaluation.metrics.features import PROBE, Extractor, extractor
from lcm_kit.evaluation.metrics.frechet import frechet
from lcm_kit.tiny import world
from lcm_kit.tiny.probe import Probe, load_probe

RENDERS = 512  # real pictures of the embedded world behind the Frechet and kernel distances
REFERENCE_SEED = 7_000_001  # of the real renders that pictures are compared with; no training draws them
FLOOR_SEED = 7_000_002  # of as many real renders as there are samples
_BATCH = 64


@dataclass(frozen=True)
class FeatureExtractor:
    """Turns pictures into figures, a row a picture."""

    features: Extractor | None  # None: no features, nor what is measured by them
    texts: Extractor | None  # that reads prompts; None: no prompt adherence, or the probe's
    probe: Probe | None  # with prompts of the embedded world
    columns: Mapping[str, Column]  # what the metrics keep of every picture

    @classmethod
    def of(
        cls,
        recipe: str,
        prompts: Sequence[str],
        resolution: Resolution,
        device: str,
        *,
        features: str | None,
        text_features: str | None = None,
        probe: str = "probe",
    ) -> FeatureExtractor:
        """What the evaluation `recipe` asks for; `features` None: none.

        `probe` is the asset that reads pictures of the embedded world: those that may be in a brand's style
        are read by the one that knows the brand styles. What models see of pictures that are no squares is
        said. Raises `UserError` if an extractor is not there, reads no text, or is the probe and pictures are
        not of its size.
        """
        ours, columns = of_the_world(prompts, resolution), columns_of(recipe)
        reader = load_probe(assets.path(probe)) if ours else None
        if features is None:
            return cls(None, None, reader, columns)
        if features == PROBE and resolution != world.SIZE:
            raise UserError(
                f"features {PROBE} reads pictures of {shown(world.SIZE)} pixels, and these have "
                f"{shown(resolution)}; set features to the folder or hub id of a CLIP, SigLIP or DINOv2 model"
            )
        images = extractor(features, device)
        texts = images if text_features is None else extractor(text_features, device)
        if texts.texts(prompts[:1]) is not None:
            found = cls(images, texts, None, columns)
        elif text_features is not None:
            raise UserError(f"text_features {text_features!r} reads no text; name a CLIP or SigLIP model")
        else:
            found = cls(images, None, reader, columns)
        if said := found.seen(resolution):
            say(said, err=True)
        return found

    @torch.no_grad()
    def __call__(self, pixels: Tensor, prompts: Sequence[str]) -> Rows:
        """Of pixels [B, 3, H, W] in [-1, 1]: the metrics' `columns` [B], `features` [B, F] where there are
        some, and `adherence` [B] where prompts are read: CLIP score, or 1 where the probe reads all that was
        asked, and then by attribute `object_right`, `colour_right` and `pattern_right` too.
        """
        table = {name: column(pixels) for name, column in self.columns.items()}
        if self.features is not None:
            table["features"] = self.features.images(pixels)
        if self.texts is not None:
            seen = table["features"] if self.texts is self.features else self.texts.images(pixels)
            asked = self.texts.texts(prompts)
            assert asked is not None  # `of` has looked
            table["adherence"] = self.texts.similarity(seen, asked)
        elif self.probe is not None:
            scenes = [scene for scene in map(world.parse, prompts) if scene]
            right = attributes_right(self.probe, pixels, scenes)
            table["adherence"] = right.all(1)
            table |= {f"{name}_right": right[:, k] for k, name in enumerate(ATTRIBUTES)}
        return {name: value.float().cpu() for name, value in table.items()}

    def reads(self) -> list[Any]:
        """What the rows follow from besides pictures and prompts, as JSON."""
        names = [None if each is None else each.name for each in (self.features, self.texts)]
        return [*names, self.kind(), sorted(self.columns)]

    def kind(self) -> str:
        """What `adherence` is: `clip`, `attributes` or `none`."""
        return "clip" if self.texts is not None else "attributes" if self.probe is not None else "none"

    def seen(self, resolution: Resolution) -> str | None:
        """A sentence on what the models see of pictures that are no squares; None where that is all of them,
        and of squares.
        """
        if isinstance(resolution, int):
            return None
        models = {each.name: each for each in (self.features, self.texts) if each is not None}
        told = [
            f"{name} sees {part}"
            for name, each in models.items()
            if (part := each.sees(*height_width(resolution)))
        ]
        return f"of pictures of {shown(resolution)} pixels {' and '.join(told)}" if told else None

    @torch.no_grad()
    def folder(self, path: str, resolution: Resolution) -> Tensor:
        """Features [n, F] of the images in a folder or asset, cut to that shape in their middle.

        Raises `UserError` for none.
        """
        assert self.features is not None  # only evaluations with features name folders
        files = records.pictures(assets.place(path), path)
        rows = []
        with working(f"measuring the {len(files)} pictures of {path}"):
            for first in range(0, len(files), _BATCH):
                pictures = [record.pixels(resolution) for record in files[first : first + _BATCH]]
                rows.append(self.features.images(torch.stack(pictures)).float().cpu())
        return torch.cat(rows)

    @torch.no_grad()
    def renders(self, count: int = RENDERS, seed: int = REFERENCE_SEED) -> Tensor:
        """Features [count, F] of held-out real pictures of the embedded world."""
        assert self.features is not None  # the probe's, where pictures are of the embedded world
        rng = np.random.default_rng(seed)
        drawn = [np.asarray(world.render(world.random_scene(rng))) for _ in range(count)]
        pixels = torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2) / 127.5 - 1
        return torch.cat([self.features.images(part).float().cpu() for part in pixels.split(_BATCH)])

    def floor(self, count: int, real: Tensor) -> float:
        """The Frechet distance of `count` other real renders to `real` [M, F]: what a perfect sampler would
        get from this estimate, which is biased upwards by few samples.
        """
        return frechet(self.renders(count, FLOOR_SEED), real)


def of_the_world(prompts: Sequence[str], resolution: Resolution) -> bool:
    """Whether prompts and pictures are of the embedded world, whose probe can read them."""
    return resolution == world.SIZE and all(map(world.parse, prompts))


def reference_features(
    config: GuidanceSweep, looker: FeatureExtractor, prompts: Sequence[str], resolution: Resolution
) -> Tensor | None:
    """Features of real pictures: those of `config.real`, renders where the prompts are of the embedded world,
    or None.
    """
    if config.real is not None:
        return looker.folder(config.real, resolution)
    return looker.renders() if of_the_world(prompts, resolution) else None


def brand_features(
    config: GuidanceSweep | Compose, looker: FeatureExtractor, resolution: Resolution
) -> tuple[Tensor, Tensor] | None:
    """Features of `config.brand` and of its control; None unless both are named."""
    if not (config.brand and config.control):
        return None
    return looker.folder(config.brand, resolution), looker.folder(config.control, resolution)
