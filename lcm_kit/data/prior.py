"""Prior preservation's pictures: what the base itself draws, made once and cached beside the brand's cache.

They are PNG files with captions in `<data.cache>-prior/pictures`, to be looked at, and a cache of them as of
any other folder of images. Picture i is a function of (base, prompt, prior.seed, i) and how it is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from lcm_kit import own_files, own_shapes, sample
from lcm_kit.config.finetune import Finetune
from lcm_kit.config.schema import Data
from lcm_kit.data import cache, records
from lcm_kit.data.cache import ALONE, Cache, EncodeReport
from lcm_kit.data.folder_files import DRAWN
from lcm_kit.data.progress import progress_bar
from lcm_kit.errors import UserError
from lcm_kit.families import BaseInfo, inspect_base
from lcm_kit.files import atomic_write, discard
from lcm_kit.locks import held
from lcm_kit.share import Share

BATCH = 8  # pictures drawn at once


def data_of(config: Finetune) -> Data:
    """Where the pictures and their cache are, as the data of a config."""
    folder = Path(f"{config.data.cache}-prior")
    given, made = config.data, str(folder / "pictures")
    return Data(
        path=made, kind="folder", cache=str(folder), resolution=given.resolution,
        shard_size=given.shard_size, batch_size=given.batch_size,
    )  # fmt: skip


def encode(config: Finetune, progress: bool = True, share: Share = ALONE) -> EncodeReport:
    """Draw the pictures of `config.prior` that are not there yet and bring their cache up to date.

    The first of several processes draws; all encode. Raises `UserError` for missing prompts and as
    `cache.encode`.
    """
    data = data_of(config)
    with held(Path(data.cache), "encode", needed=False):  # it may be done, and read-only
        if share.first:
            draw(config, progress)
        share.wait()
        return cache.encode(replace(config, data=data), progress, share)


def insist_on_prompts(config: Finetune) -> None:
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


def draw(config: Finetune, progress: bool = True) -> None:
    """Draw what is missing of `config.prior.count` pictures; other pictures are removed."""
    base = inspect_base(config.base.path, revision=config.base.revision, variant=config.base.variant)
    folder, settings = Path(data_of(config).path), _settings(config, base)
    if _read(folder) != settings:
        discard(folder)
        own_files.write_json(folder / DRAWN, settings)
    wanted = list(islice(cycle(settings["prompts"]), config.prior.count))
    files = [folder / f"{i:05d}.png" for i in range(len(wanted))]
    for extra in {*folder.glob("*.png")} - {*files}:
        discard(extra)
    starts = range(0, len(files), BATCH)
    missing = [k for k in starts if not all(file.is_file() for file in files[k : k + BATCH])]
    if missing:
        pipe = sample.pipeline(
            config.base.path, revision=config.base.revision, variant=config.base.variant, **sample.placement()
        )
        with progress_bar(progress, "batches") as bar:
            for k in bar.track(missing, description="drawing with the base"):
                _draw(pipe, config, wanted[k : k + BATCH], files[k : k + BATCH], k)


def _draw(pipe: Any, config: Finetune, prompts: Sequence[str], files: Sequence[Path], first: int) -> None:
    """Draw `prompts` from the noise of numbers `first` and up; a caption is written before its picture."""
    pixels = sample.sample(
        pipe, prompts, sampler="ddim", steps=config.prior.steps, guidance_scale=config.prior.guidance_scale,
        seed=config.prior.seed, first=first, size=config.data.resolution,
    )  # fmt: skip
    for prompt, file, picture in zip(prompts, files, sample.to_pil(pixels), strict=True):
        atomic_write(file.with_suffix(".txt"), prompt + "\n")
        sample.save_png(picture, file)


def _settings(config: Finetune, base: BaseInfo) -> dict[str, Any]:
    """All that picture i is made from."""
    assert config.prior.prompts is not None
    return {
        "base": base.base_hash,
        "prompts": records.prompts(config.prior.prompts),
        **{key: getattr(config.prior, key) for key in ("steps", "guidance_scale", "seed")},
        "resolution": config.data.resolution,
    }


def _read(folder: Path) -> own_shapes.Prior | None:
    """What the pictures in `folder` were drawn from; None where there are none, or it cannot be told."""
    try:
        return own_files.read_json(folder / DRAWN, own_shapes.Prior, "")
    except own_files.Damaged:
        return None  # `encode` draws them again
