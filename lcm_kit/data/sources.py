"""What is distilled on: images, the teacher's samples, both, or prompts; encoded and opened alike."""

from __future__ import annotations

from collections.abc import Set
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from pathlib import Path

from lcm_kit.bases import BaseInfo
from lcm_kit.bases.condition import Condition
from lcm_kit.config.finetune import Finetune
from lcm_kit.config.load import load
from lcm_kit.config.schema import Data, Distill, Training
from lcm_kit.data import images, prior, prompts, samples, stream_images
from lcm_kit.data.batches import Mix
from lcm_kit.data.cache import Cache
from lcm_kit.data.joined import Joined
from lcm_kit.data.order import Run
from lcm_kit.data.parted import PartedCache
from lcm_kit.data.progress import EncodeReport
from lcm_kit.data.shards import GENERAL
from lcm_kit.data.split import Rows, chosen, own_images, split
from lcm_kit.data.stream_kinds import is_stream
from lcm_kit.errors import UserError
from lcm_kit.io import own_shapes
from lcm_kit.io.files import sha256_bytes
from lcm_kit.io.locks import held
from lcm_kit.io.urls import is_url
from lcm_kit.share import ALONE, Share


def encode(
    config: Training,
    progress: bool = True,
    share: Share = ALONE,
    elsewhere: stream_images.Elsewhere | None = None,
) -> list[EncodeReport]:
    """Bring every cache that `data.source` and `prior` ask for up to date.

    `elsewhere`: makes the parts of a stream, the only thing that another engine has workers for. Raises
    `UserError` as each of them does; for what the later ones lack before the first, which takes hours.
    """
    data, done = config.data, []
    if elsewhere is not None and not (data.has_images and is_stream(data)):
        raise UserError(
            f"data.path {data.path!r} with data.source {data.source} has no shards for the workers of "
            "another engine; give a stream (docs/scale.md), or leave --engine out"
        )
    beside = config if isinstance(config, Finetune) and config.prior.prompts is not None else None
    if beside:
        prior.require_prompts(beside)
    with lock_of(data):
        if not is_url(data.cache):
            share.require_shared(Path(data.cache))
        if data.source == "mix":
            samples.require_inputs(_distill(config))
        if data.has_images and is_stream(data):
            done.append(stream_images.encode(config, progress, share, elsewhere))
        elif data.has_images:
            done.append(images.encode(config, progress, share))
        if data.has_samples:
            done.append(samples.encode(_distill(config), progress, share))
        if data.source == "prompts":
            done.append(prompts.encode(_distill(config), progress, share))
    if beside:
        done.append(prior.encode(beside, progress, share))
    return done


def lock_of(data: Data) -> AbstractContextManager[object]:
    """Around what writes the cache of `data`. At an address there is no lock: two runs write the same."""
    if is_url(data.cache):
        if not is_stream(data):
            raise UserError(
                f"data.cache {data.cache!r} is an address, which is for streams (docs/scale.md), and "
                f"data.path {data.path!r} is none; encode into a folder of this machine"
            )
        return nullcontext()
    return held(Path(data.cache), "encode", needed=False)  # it may be done, and read-only


def open_images(data: Data, base: BaseInfo) -> Cache | PartedCache:
    """The finished cache of the images of `data.path`. Raises `UserError` as `Cache.open`."""
    if is_stream(data):
        return PartedCache.open(stream_images.folder_of(data), base=base, data=data)
    return Cache.open(Path(data.cache), base=base, data=data)


def _distill(config: Training) -> Distill:
    assert isinstance(config, Distill)  # no other recipe has a teacher; its schema says so
    return config


def open_cache(config: Distill, base: BaseInfo) -> Cache | PartedCache | MixedCache:
    """What `data.source` asks for, finished and made for this config. Raises `UserError` as `Cache.open`."""
    data = config.data
    if data.source == "teacher":
        return samples.open_cache(config, base)
    if data.source == "prompts":
        return prompts.open_cache(config, base)
    if is_stream(data):
        stream_images.require_possible(config)
    of_images = open_images(data, base)
    if data.source == "images":
        return of_images
    assert isinstance(of_images, Cache)  # `encode` makes no mix with a stream
    return MixedCache(of_images, samples.open_cache(config, base), data.samples.share)


def split_off(
    config: Distill, cache: Cache | PartedCache | MixedCache
) -> tuple[Cache | PartedCache | MixedCache | Rows, Rows]:
    """What is trained on, and the rows of `validation.held_out` to measure on: none is the whole cache.

    What the run of `data.leave_out` held out is not trained on. Raises `UserError` as `split`, and if that
    run is none.
    """
    of_images = cache.images if isinstance(cache, MixedCache) else cache
    assert isinstance(of_images, Cache | PartedCache)  # as `open_cache` gives it
    left_out: Set[str] = frozenset()
    if config.data.leave_out is not None and config.data.has_images and isinstance(of_images, Cache):
        left_out = chosen(own_images(of_images), *held_out_of(config.data.leave_out))
    if not config.validation.held_out and not left_out:
        return cache, Rows(of_images, ())
    trained, kept = split(of_images, config.validation.held_out, config.seed, left_out)
    return (replace(cache, images=trained) if isinstance(cache, MixedCache) else trained), kept


def held_out_of(run: str) -> tuple[float, int]:
    """The share of the pictures that the training of `run` held out, and its seed, which chose them.

    Raises `UserError` if it is no run.
    """
    file = Path(run) / "config.yaml"
    if not file.is_file():
        raise UserError(
            f"data.leave_out: {run} is not the folder of a run; give the style's, or null to train on all"
        )
    trained = load(file)
    if not isinstance(trained, Training):
        raise UserError(f"data.leave_out: {run} trained nothing ({trained.recipe}); give the style's run")
    return trained.validation.held_out, trained.seed


def mix_of(samples: Cache | PartedCache | MixedCache | Rows, data: Data) -> Mix | None:
    """How batches are drawn from what `data` is trained on; None: all records alike."""
    if isinstance(samples, MixedCache):
        return samples.mix
    if data.regularization_share is None:
        return None
    general = [id.startswith(GENERAL) for id in samples.ids]
    own = general.index(True)
    assert all(general[own:])  # records are in that order
    return Mix(own, Fraction(str(data.regularization_share)))


@dataclass(frozen=True)
class MixedCache(Joined):
    """Two caches as one: the rows of the images, then those of the teacher's samples."""

    images: Cache | Rows  # Rows: without what is left out, to draw batches from
    samples: Cache
    share: float  # of the batches that the samples have

    @cached_property  # asked for each sample of each step
    def ids(self) -> list[str]:
        """Names of the records, in order."""
        return [*self.images.ids, *self.samples.ids]

    @property
    def mix(self) -> Mix:
        """How batches are drawn from it: by the share as the config writes it, not its nearest binary."""
        return Mix(len(self.images), Fraction(str(self.share)))

    @property
    def rights(self) -> own_shapes.Rights | None:
        """What metadata says of the images."""
        assert isinstance(self.images, Cache)
        return self.images.rights

    @property
    def fingerprint(self) -> str:
        """Hash of all that both were made from."""
        assert isinstance(self.images, Cache)
        return sha256_bytes(f"{self.images.fingerprint} {self.samples.fingerprint}".encode())

    @property
    def runs(self) -> list[Run]:
        """The rows, in order, by shape."""
        return [*self.images.runs, *self.samples.runs]

    @property
    def several(self) -> bool:
        """Whether any row has several captions."""
        return self.images.several

    @cached_property
    def starts(self) -> list[int]:
        """As `Joined.starts`."""
        return [0, len(self.images), len(self.images) + len(self.samples)]

    def source(self, number: int) -> Cache | Rows:
        """As `Joined.source`."""
        return self.samples if number else self.images

    def empty(self, n: int = 1) -> Condition:
        """The condition of an unconditional pass, n times."""
        return self.samples.empty(n)
