"""Prompts alone as a cache to train on, for methods that make their pictures themselves: nothing is drawn.

A row is the condition of a prompt. Its latents are zeros, of which batches take the shape of what is to be
drawn and nobody reads a number (`core.methods.Method.needs_pictures`); the folder is a cache like any other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcm_kit import sample
from lcm_kit.bases import BaseInfo, load_tokenizers
from lcm_kit.config.resolution import Resolution, height_width
from lcm_kit.config.schema import Data, Distill
from lcm_kit.console import Progress
from lcm_kit.data import drawn_sizes, shards
from lcm_kit.data.cache import Cache
from lcm_kit.data.encoder import Encoder, hashes_of, usable_base
from lcm_kit.data.encoding import Contents, EncodedBatches, RowMaker, bring_up_to_date
from lcm_kit.data.progress import EncodeReport
from lcm_kit.data.records import prompts
from lcm_kit.data.shards import Entry
from lcm_kit.drawing.batches import Batches
from lcm_kit.share import ALONE, Share

AT_ONCE = 8  # prompts a pass of the text encoders


def folder_of(data: Data) -> Path:
    """Where the prompts are cached: beside the caches of images and of samples, whose places it leaves."""
    return Path(data.cache) / "prompts"


def shape_of(base: BaseInfo, resolution: Resolution) -> tuple[int, int, int]:
    """(C, h, w) of the latents of a picture that is drawn."""
    height, width = height_width(resolution)
    return base.latent_channels, height // base.factor, width // base.factor


def settings(config: Distill, base: BaseInfo) -> dict[str, Any]:
    """All that the rows are made from, as the manifest keeps it: neither VAE nor UNet nor sampler.

    Raises `UserError` for missing prompts.
    """
    return {
        **shards.of_base(base, without=("vae", "unet", "scheduler")),
        "prompts": shards.hash_of(prompts(config.data.samples.prompts)),
        "data.resolution": config.data.resolution,
        "latents": list(shape_of(base, config.data.resolution)),
        **drawn_sizes.setting(config.data.samples.resolutions),
    }


def encode(config: Distill, progress: bool = True, share: Share = ALONE) -> EncodeReport:
    """Bring the cache of the prompts up to date with them and with the base's text encoders.

    As `encoding.bring_up_to_date`. Raises `UserError` if the base or the prompts cannot be used.
    """
    base, data = usable_base(config), config.data

    def survey(old: Mapping[str, Any] | None, bar: Progress) -> Contents:
        load, entries = partial(_load, data, base), _entries(data, base)
        said = drawn_sizes.remarks((entry.size for entry in entries), data)
        return Contents(base, data, settings(config, base), entries, load, "encoding", remarks=said)

    return bring_up_to_date(folder_of(data), survey, progress, share, what="prompts")


def open_cache(config: Distill, base: BaseInfo) -> Cache:
    """The finished cache of the prompts. Raises `UserError` as `Cache.open`."""
    return Cache.open(folder_of(config.data), base=base, data=config.data, settings=settings(config, base))


def _entries(data: Data, base: BaseInfo) -> list[Entry]:
    """One row a prompt: a prompt that is asked for again has noise of its own in any case."""
    found = prompts(data.samples.prompts)
    texts = hashes_of(load_tokenizers(base), [((prompt, 1.0),) for prompt in found], data.chunks)
    return [
        Entry(f"{shards.PROMPTS}{i:05d}", prompt, "", text, size=drawn_sizes.of_entry(i, len(found), data))
        for i, (prompt, text) in enumerate(zip(found, texts, strict=True))
    ]


def _load(data: Data, base: BaseInfo, missing: bool) -> RowMaker:
    encoder = Encoder.load(base, sample.placement()["device"], vae=False, chunks=data.chunks)
    batches = Batches(AT_ONCE, "encoding a prompt", "stop what else uses this device's memory")
    return RowMaker(encoder, partial(_encoded, encoder, base, data, batches), _not_finite, "embeds")


def _not_finite(broken: Sequence[Entry]) -> str:
    others = f" and {len(broken) - 1} more" if broken[1:] else ""
    return (
        f"the base's text encoders make numbers that are not finite of {broken[0].caption!r} "
        f"({broken[0].id}{others}); take another base, or leave these prompts out"
    )


def _encoded(
    encoder: Encoder, base: BaseInfo, data: Data, batches: Batches, entries: Sequence[Entry]
) -> EncodedBatches:
    def rows(_: int, some: Sequence[Entry]) -> dict[str, Tensor]:
        size = some[0].size or data.resolution
        conditions = encoder.of_whole_pictures([entry.caption for entry in some], size)
        return {"latents": torch.zeros(len(some), *shape_of(base, size)), **conditions}

    return batches.run(entries, rows)
