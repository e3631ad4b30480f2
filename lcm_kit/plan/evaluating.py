"""What an evaluation holds while it draws: the base's pipeline, one LoRA on it, and what looks at pictures.

An evaluation is a config of its own, so a training's plan says what it takes by batch size. What the LoRA
adds to a pass without gradient is next to nothing, and left out.
"""

from __future__ import annotations

from collections.abc import Mapping

from lcm_kit.config.resolution import Resolution
from lcm_kit.config.schema import Training
from lcm_kit.plan import encoding
from lcm_kit.plan.dry_run import MetaModel
from lcm_kit.plan.sizes import FLOAT, Parts
from lcm_kit.tiny import world

BATCHES = (1, 2, 4, 8, 16, 32)  # of the evaluations' `batch_size`; the last is their default
_GUIDED = 2  # passes for a step of a picture: the base and the style are drawn with guidance
# Weights of openai/clip-vit-large-patch14, in float32 beside the pipeline; the embedded world's probe is tiny
_CLIP = 427_616_513


def by_batch(config: Training, stage: MetaModel, device: str) -> Mapping[int, Parts]:
    """Bytes by part for each of `BATCHES`, pictures of the config's size."""
    return {batch: parts(config.data.resolution, stage, device, batch) for batch in BATCHES}


def parts(resolution: Resolution, stage: MetaModel, device: str, batch: int) -> Parts:
    """Bytes by part while `batch` pictures of this size are drawn at once."""
    drawn = encoding.drawn(resolution, stage, device, batch * _GUIDED, decoded=batch)
    reader = 0 if resolution == world.SIZE else FLOAT * _CLIP
    adapter = sum(stage.weights.lora) * encoding.drawing_dtype(device).itemsize
    return {**drawn, "adapter": adapter, "what looks at pictures": reader}
