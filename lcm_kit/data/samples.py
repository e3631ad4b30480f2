"""The teacher's own samples as a cache to train on: no images needed, only prompts.

The latents are what `lcm_kit.sample` draws with the base and `teacher.adapters`, never decoded; the folder is
a cache like that of images. Sample i is a function of what draws it, its prompt and (data.samples.seed, i).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from torch import Tensor

from lcm_kit import sample
from lcm_kit.adapter import styles
from lcm_kit.adapter.adapted_unet import AdaptedUNet
from lcm_kit.bases import BaseInfo, load_tokenizers
from lcm_kit.config.resolution import height_width
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

_ALL = 1000  # chunks of a prompt that are read: what is drawn is not cut
# By its name in the manifest, which the hashes of shards are made from: a sampler was called solver once
_DRAWN_BY = {"solver": "sampler", "steps": "steps", "guidance_scale": "guidance_scale", "seed": "seed"}


def folder_of(data: Data) -> Path:
    """Where the samples are cached: beside the images' cache, so that neither takes the other's place."""
    return Path(data.cache) / "teacher"


def prompts_of(data: Data) -> list[str]:
    """The prompt of every sample. Raises `UserError` if there is none."""
    return list(islice(cycle(prompts(data.samples.prompts)), data.samples.count))


def settings(config: Distill, base: BaseInfo) -> dict[str, Any]:
    """All that the samples are made from, as the manifest keeps it.

    Raises `UserError` for missing prompts and adapters.
    """
    made_by = config.data.samples
    adapters = styles.teacher_loras(config.teacher)
    return {
        **shards.of_base(base, without=("vae",)),
        "teacher.adapters": [{"sha256": entry.sha256, "weight": entry.weight} for entry in adapters],
        "prompts": shards.hash_of(prompts_of(config.data)),
        **{f"data.samples.{name}": getattr(made_by, key) for name, key in _DRAWN_BY.items()},
        "data.resolution": config.data.resolution,
        **drawn_sizes.setting(made_by.resolutions),
    }


def encode(config: Distill, progress: bool = True, share: Share = ALONE) -> EncodeReport:
    """Bring the cache of the teacher's samples up to date with the base, its adapters and the prompts.

    As `encoding.bring_up_to_date`. Raises `UserError` if the base, an adapter or the prompts cannot be used.
    """
    base, data = usable_base(config), config.data

    def survey(old: Mapping[str, Any] | None, bar: Progress) -> Contents:
        made_by, load = settings(config, base), partial(_load, config, base)
        entries = _entries(data, base)
        said = drawn_sizes.remarks((entry.size for entry in entries), data)
        return Contents(base, data, made_by, entries, load, "drawing", remarks=said)

    return bring_up_to_date(
        folder_of(data), survey, progress, share, what="samples of the teacher", done="drawn"
    )


def require_inputs(config: Distill) -> None:
    """Raise `UserError` now for what `encode` would refuse: before images are encoded, which takes hours."""
    base = usable_base(config)
    settings(config, base)
    for entry in config.teacher.adapters:
        styles.largest_rank("teacher.adapters", entry.path, base)


def open_cache(config: Distill, base: BaseInfo) -> Cache:
    """The finished cache of the teacher's samples. Raises `UserError` as `Cache.open`."""
    return Cache.open(folder_of(config.data), base=base, data=config.data, settings=settings(config, base))


def _entries(data: Data, base: BaseInfo) -> list[Entry]:
    """One row a sample; the place of its noise stands for an image file."""
    wanted, known = prompts_of(data), len(prompts(data.samples.prompts))
    texts = hashes_of(load_tokenizers(base), [((prompt, 1.0),) for prompt in wanted], _ALL)
    return [
        Entry(f"teacher/{i:05d}", prompt, f"noise {i}", text, size=drawn_sizes.of_entry(i, known, data))
        for i, (prompt, text) in enumerate(zip(wanted, texts, strict=True))
    ]


def _load(config: Distill, base: BaseInfo, missing: bool) -> RowMaker:
    pipe = teacher_pipeline(config, base) if missing else None  # first: it may be refused
    encoder = Encoder.load(base, sample.placement()["device"], vae=False, chunks=None)
    sides = height_width(drawn_sizes.largest(config.data, config.data.samples.resolutions))
    batches = Batches.of_pictures(config.data.batch_size, *sides, sample.placement()["device"])
    return RowMaker(encoder, partial(_drawn, pipe, encoder, config.data, batches), _not_finite)


def _not_finite(broken: Sequence[Entry]) -> str:
    others = f" and {len(broken) - 1} more" if broken[1:] else ""
    return (
        f"the teacher draws latents that are not finite for {broken[0].caption!r} ({broken[0].id}{others}); "
        "lower data.samples.guidance_scale or the weights of teacher.adapters"
    )


def teacher_pipeline(config: Distill, base: BaseInfo) -> Any:
    """The base's pipeline with `teacher.adapters` on its UNet, where and in what precision samples are drawn.

    Raises `UserError` for adapters that do not fit.
    """
    pipe = sample.pipeline(
        config.base.path, revision=config.base.revision, variant=config.base.variant, **sample.placement()
    )
    styles.add_teacher_adapters(AdaptedUNet(pipe.unet), config.teacher, base)
    return pipe


def _drawn(
    pipe: Any, encoder: Encoder, data: Data, batches: Batches, entries: Sequence[Entry]
) -> EncodedBatches:
    return batches.run(entries, partial(_draw, pipe, encoder, data))


def _draw(pipe: Any, encoder: Encoder, data: Data, at: int, entries: Sequence[Entry]) -> Mapping[str, Tensor]:
    """Latents and conditions of a batch, all of one size, by their names in a shard."""
    captions, drawn_by = [entry.caption for entry in entries], data.samples
    size = entries[0].size or data.resolution
    latents = sample.latents(
        pipe, captions, sampler=drawn_by.sampler, steps=drawn_by.steps,
        guidance_scale=drawn_by.guidance_scale, seed=drawn_by.seed, size=height_width(size),
        first=[int(entry.id.rpartition("/")[2]) for entry in entries],
    )  # fmt: skip
    return {"latents": latents, **encoder.of_whole_pictures(captions, size)}
