"""The measures that need the embedded world: its probe reads each picture and gives the Frechet features."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lcm_kit.metrics.accuracy import ATTRIBUTES, attribute_accuracy
from lcm_kit.metrics.frechet import frechet
from lcm_kit.tiny import world
from lcm_kit.tiny.probe import Probe, load_probe

REFERENCE_SEED = 7_000_001  # of the real renders that pictures are compared with; no training draws them
FLOOR_SEED = 7_000_002  # of as many real renders as there are samples
# What stands in results.json where there is no judge.
ABSENT: dict[str, float | None] = dict.fromkeys(
    (
        "attribute_accuracy",
        "attribute_accuracy_stderr",
        *(f"{name}_accuracy" for name in ATTRIBUTES),
        "frechet",
    )
)


class Judge:
    """Accuracy and Frechet distance of pictures of `scenes`.

    `floor` is the Frechet distance of as many real renders: what a perfect sampler would get from this
    estimate, which is biased upwards by few samples.
    """

    def __init__(self, probe: Probe, scenes: Sequence[world.Scene], references: int) -> None:
        """Render `references` held-out pictures to compare with."""
        self.probe, self.scenes = probe, scenes
        self.reference = self._renders(references, REFERENCE_SEED)
        self.floor = frechet(self._renders(len(scenes), FLOOR_SEED), self.reference)

    @torch.no_grad()
    def _renders(self, count: int, seed: int) -> Tensor:
        """Features [count, F] of random real pictures."""
        rng = np.random.default_rng(seed)
        pictures = np.stack([np.asarray(world.render(world.random_scene(rng))) for _ in range(count)])
        return self.probe.features(torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, float | None]:
        """The figures named in `ABSENT`, of pictures [N, 3, 64, 64] in [-1, 1], one for each scene."""
        distance = frechet(self.probe.features(images), self.reference)
        return {**attribute_accuracy(self.probe, images, self.scenes), "frechet": distance}


def judge_for(prompts: Sequence[str], size: int, references: int) -> Judge | None:
    """The judge, or None where the prompts or the pictures (`size` pixels) are not of the embedded world."""
    scenes = [scene for scene in map(world.parse, prompts) if scene]
    ours = len(scenes) == len(prompts) > 1 and size == world.SIZE
    return Judge(load_probe(), scenes, references) if ours else None
