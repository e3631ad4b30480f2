"""Prior preservation's pictures: what the base itself draws, made once and cached beside the brand's cache.

They are PNG files with captions in `<data.cache>-prior/pictures`, to be looked at, and a cache of them as of
any other folder of images. Picture i is a function of (base, prompt, prior.seed, i) and how it is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lcm_kit import sample
from lcm_kit.bases import BaseInfo
from lcm_kit.config.finetune import Finetune
from lcm_kit.config.resolution import Resolution, height_width
from lcm_kit.config.schema import Data
from lcm_kit.data import drawn_sizes, images, records
from lcm_kit.data.cache import Cache
from lcm_kit.data.encoder import usable_base
from lcm_kit.data.encoding import Advance, make_missing
from lcm_kit.data.folder_files import DRAWN
from lcm_kit.data.progress import EncodeReport, progress_bar
from lcm_kit.drawing.batches import Batches
from lcm_kit.errors import UserError
from lcm_kit.io import own_files, own_shapes
from lcm_kit.io.files import atomic_write, discard
from lcm_kit.io.locks import held
from lcm_kit.share import ALONE, Share

BATCH = 8  # pictures drawn at once


def data_of(config: Finetune) -> Data:
    """Where the pictures and their cache are, as the data of a config."""
    folder = Path(f"{config.data.cache}-prior")
    given, made = config.data, str(folder / "pictures")
    return Data(
        path=made, kind="folder", cache=str(folder), resolution=given.resolution, chunks=given.chunks,
        shapes=replace(given.shapes, crop="center", crops=1, small="upscale"),
        shard_size=given.shard_size, batch_size=given.batch_size, vae_precision=given.vae_precision,
    )  # fmt: skip


def encode(config: Finetune, progress: bool = True, share: Share = ALONE) -> EncodeReport:
    """Draw the pictures of `config.prior` that are not there yet and bring their cache up to date.

    Of several processes each draws and encodes its `share`. Raises `UserError` for missing prompts and as
    `images.encode`.
    """
    data = data_of(config)
    with held(Path(data.cache), "encode", needed=False):  # it may be done, and read-only
        draw(config, progress, share)
        return images.encode(replace(config, data=data), progress, share)


def require_prompts(config: Finetune) -> None:
    """Raise `UserError` now if the prompts that `encode` draws are missing or are none."""
    assert config.prior.prompts is not None
    records.prompts(config.prior.prompts)


def open_cache(config: Finetune, base: BaseInfo) -> Cache | None:
    """The cache of the base's own pictures; None if `config.prior` asks for none.

    Raises `UserError` if they are missing, too few or drawn from something else.
    """
    if config.prior.prompts is None:
        return None
    data = data_of(config)
    if _read(Path(data.path)) != _settings(config, base):
        raise UserError(
            f"the pictures of prior in {data.path!r} are not there or were drawn otherwise; run `lcm-kit "
            "encode` with this config first"
        )
    found = Cache.open(data.cache, base=base, data=data)
    if len(found) != config.prior.count:
        raise UserError(
            f"the cache {data.cache!r} has {len(found)} pictures and prior.count is {config.prior.count}; "
            "run `lcm-kit encode` with this config first"
        )
    return found


def draw(config: Finetune, progress: bool = True, share: Share = ALONE) -> None:
    """Draw what is missing of `config.prior.count` pictures; other pictures are removed."""
    base = usable_base(config)
    folder, settings = Path(data_of(config).path), _settings(config, base)
    lines, count, sizes = settings["prompts"], config.prior.count, config.prior.resolutions
    wanted = [
        PriorPicture(
            i, prompt, folder / f"{i:05d}.png", drawn_sizes.of_number(i, len(lines), config.data, sizes)
        )
        for i, prompt in enumerate(islice(cycle(lines), count))
    ]
    if share.first:
        _clear(folder, settings, {picture.file for picture in wanted})
    share.wait()
    of_a_size: dict[Resolution, list[PriorPicture]] = {}
    for picture in wanted:
        of_a_size.setdefault(picture.resolution, []).append(picture)
    batches = [
        pictures[first : first + BATCH]
        for pictures in of_a_size.values()
        for first in range(0, len(pictures), BATCH)
    ]
    missing = [batch for batch in batches if not all(picture.file.is_file() for picture in batch)]
    with progress_bar(progress and share.first, "pictures") as bar:
        make_missing(folder, missing, partial(_load, config), "drawing with the base", share, bar)


class PriorPicture(NamedTuple):
    """One that the base draws, from the noise of its number."""

    number: int
    prompt: str
    file: Path
    resolution: Resolution  # pixels


def _clear(folder: Path, settings: dict[str, Any], wanted: set[Path]) -> None:
    """Leave in `folder` only pictures that were drawn by `settings`, and that are wanted."""
    if _read(folder) != settings:
        discard(folder)
        own_files.write_json(folder / DRAWN, settings)
    for extra in (*folder.glob("*.png"), *folder.glob("*.txt")):
        if extra.with_suffix(".png") not in wanted:
            discard(extra)


def _load(
    config: Finetune, missing: Sequence[Sequence[PriorPicture]]
) -> Callable[[Sequence[PriorPicture], Advance], None]:
    pipe = sample.pipeline(
        config.base.path, revision=config.base.revision, variant=config.base.variant, **sample.placement()
    )
    sides = height_width(drawn_sizes.largest(config.data, config.prior.resolutions))
    return partial(_draw, pipe, config, Batches.of_pictures(BATCH, *sides, str(pipe.device)))


def _draw(
    pipe: Any, config: Finetune, batches: Batches, batch: Sequence[PriorPicture], advance: Advance
) -> None:
    """Draw pictures of one size; a caption is written before its picture."""

    def draw(_: int, part: Sequence[PriorPicture]) -> Tensor:
        return sample.sample(
            pipe, [picture.prompt for picture in part], sampler="ddim", steps=config.prior.steps,
            guidance_scale=config.prior.guidance_scale, seed=config.prior.seed,
            first=[picture.number for picture in part], size=height_width(part[0].resolution),
        )  # fmt: skip

    pixels = torch.cat([*batches.run(batch, draw)])
    broken = [at for at, drawn in zip(batch, pixels, strict=True) if not drawn.isfinite().all()]
    if broken:
        raise UserError(
            f"the base draws nothing finite for {broken[0].prompt!r}, picture {broken[0].number} of prior; "
            "lower prior.guidance_scale, or take another base"
        )
    for picture, image in zip(batch, sample.to_pil(pixels), strict=True):
        atomic_write(picture.file.with_suffix(".txt"), picture.prompt + "\n")
        sample.save_png(image, picture.file)
    advance(len(batch))


def _settings(config: Finetune, base: BaseInfo) -> dict[str, Any]:
    """All that picture i is made from."""
    assert config.prior.prompts is not None
    return {
        "base": base.base_hash,
        "prompts": records.prompts(config.prior.prompts),
        **{key: getattr(config.prior, key) for key in ("steps", "guidance_scale", "seed")},
        "resolution": config.data.resolution,
        **drawn_sizes.setting(config.prior.resolutions),
    }


def _read(folder: Path) -> own_shapes.Prior | None:
    """What the pictures in `folder` were drawn from; None where there are none, or it cannot be told."""
    try:
        return own_files.read_json(folder / DRAWN, own_shapes.Prior, "")
    except own_files.Damaged:
        return None  # `encode` draws them again
