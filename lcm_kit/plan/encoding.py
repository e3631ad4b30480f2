"""What `lcm-kit encode` holds, phase by phase: each of its loads the parts of the base that it needs."""

from __future__ import annotations

import torch

from lcm_kit.bases import decoded_at_once
from lcm_kit.config.finetune import Finetune
from lcm_kit.config.resolution import Resolution, height_width, of_sides
from lcm_kit.config.schema import Distill, Training
from lcm_kit.data import drawn_sizes
from lcm_kit.data.buckets import Shaper
from lcm_kit.data.prior import BATCH
from lcm_kit.drawing.batches import at_once
from lcm_kit.drawing.vae import PROOF
from lcm_kit.plan import work
from lcm_kit.plan.dry_run import MetaModel
from lcm_kit.plan.sizes import FLOAT, Parts, allowance, workspace

PICTURES, SAMPLES, PRIOR = "pictures", "the teacher's samples", "the prior's pictures"
PROMPTS = "prompts"
BY_BATCH = (PICTURES, SAMPLES)  # as many at once as `data.batch_size` says; the prior's have their own number


def decoder(stage: MetaModel, resolution: Resolution, count: int, dtype: torch.dtype) -> tuple[float, float]:
    """Bytes of the VAE of a pipeline in `dtype`, and of what it holds while `count` pictures are decoded.

    It begins in float32, with a picture's middle, and goes on in half precision if that proves near; of
    SDXL's, which says that it overflows in float16, that is not counted on (`lcm_kit.drawing.vae`).
    """
    half = dtype if dtype != torch.float16 or not stage.subject.pooled else torch.float32
    full = stage.pictures(resolution, torch.float32)
    weights = full.weights * FLOAT
    if not count:
        return weights, 0
    height, width = height_width(resolution)
    pictures, together = stage.pictures(resolution, half), min(count, decoded_at_once(height, width))
    done = (count - together) * 3 * height * width * half.itemsize
    going_on = pictures.decode.highest(together).at(together) + done
    proof = stage.pictures(of_sides(min(width, PROOF), min(height, PROOF)), torch.float32).decode
    return weights, max(going_on, proof.highest(1).at(1))


def phases(config: Training, stage: MetaModel, device: str) -> dict[str, Parts]:
    """Bytes of each phase by part. Pictures are encoded in float32, samples drawn as `sample.placement`.

    Raises `UserError` as `drawn_sizes.require_shapes`.
    """
    drawn_sizes.require_shapes(config, stage.subject)
    found: dict[str, Parts] = {}
    prior = isinstance(config, Finetune) and config.prior.prompts is not None
    if config.data.source == "prompts":  # a pass of a few captions is little beside the encoders
        found[PROMPTS] = {"text encoders": stage.subject.text * FLOAT, "workspaces": allowance(device)}
    if config.data.has_images:
        found[PICTURES] = _pictures(config, stage, device)
    if isinstance(config, Distill) and config.data.has_samples:
        guided = work.guided(config.data.samples.guidance_scale)
        count = min(_at_once(config, device), config.data.samples.count)
        size = drawn_sizes.largest(config.data, config.data.samples.resolutions)
        pipeline = drawn(size, stage, device, count * guided)
        # captions are encoded beside the pipeline, in float32, and its VAE is there without being asked
        found[SAMPLES] = {
            **pipeline, "teacher's adapters": FLOAT * stage.weights.style,
            "text encoders": pipeline["text encoders"] + FLOAT * stage.subject.text,
        }  # fmt: skip
    if isinstance(config, Finetune) and prior:
        count = min(BATCH, config.prior.count)
        guided = work.guided(config.prior.guidance_scale)
        size = drawn_sizes.largest(config.data, config.prior.resolutions)
        found[PRIOR] = drawn(size, stage, device, count * guided, decoded=count)
    return found


def _pictures(config: Training, stage: MetaModel, device: str) -> Parts:
    """Text encoders and VAE in float32, in which the VAE begins where it proves itself in half precision."""
    largest = of_sides(*Shaper.of(stage.subject, config.data).largest)
    pictures, batch = stage.pictures(largest, torch.float32), _at_once(config, device)
    return {
        "text encoders": stage.subject.text * FLOAT,
        "VAE": pictures.weights * FLOAT,
        "activations": round(pictures.encode.highest(batch).at(batch)),
        "workspaces": allowance(device),
    }


def _at_once(config: Training, device: str) -> int:
    """Pictures, or samples of the teacher, that `data.batch_size` asks for."""
    return at_once(config.data.batch_size, config.data.resolution, config.data.resolution, device)


def trained_at(config: Training, stage: MetaModel) -> Resolution:
    """The size of the most pixels among those that a step can be of."""
    data, drawn = config.data, []
    if data.source in ("images", "mix"):
        drawn.append(of_sides(*Shaper.of(stage.subject, data).largest))
    if data.source != "images":
        drawn.append(drawn_sizes.largest(data, data.samples.resolutions))
    return drawn_sizes.largest(data, drawn)


def drawing_dtype(device: str) -> torch.dtype:
    """Of a pipeline, as `sample.placement`."""
    return torch.float16 if device == "cuda" else torch.float32


def drawn(resolution: Resolution, stage: MetaModel, device: str, samples: int, decoded: int = 0) -> Parts:
    """The whole pipeline: `samples` a pass of the UNet, then so many pictures `decoded` by the VAE."""
    dtype = drawing_dtype(device)
    subject, weights = stage.subject, stage.weights
    drawing = stage.drawing(resolution, dtype).highest(samples).at(samples)
    vae, decoding = decoder(stage, resolution, decoded, dtype)
    stored = subject.stored
    # while it is loaded, a file of other numbers is there too
    file = weights.base * stored.itemsize if device == "cpu" and stored and stored != dtype else 0
    return {
        "UNet": weights.base * dtype.itemsize,
        "text encoders": subject.text * dtype.itemsize,
        "VAE": round(vae),
        "activations": round(max(drawing, decoding, file)),
        "workspaces": workspace(weights, dtype, device),
    }
