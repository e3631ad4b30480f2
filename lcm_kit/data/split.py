"""Records that are kept out of training, so that the loss on them tells what was learned by heart."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING

from torch import Tensor

from lcm_kit.bases.condition import Condition
from lcm_kit.config.schema import Distill
from lcm_kit.data.order import Run
from lcm_kit.data.parted import AllBut, PartedCache
from lcm_kit.data.shards import GENERAL, MIRRORED
from lcm_kit.data.told import Told, picked
from lcm_kit.errors import UserError
from lcm_kit.io.files import sha256_bytes

if TYPE_CHECKING:
    from lcm_kit.data.cache import Cache


@dataclass(frozen=True)
class Rows:
    """Some rows of a cache, to draw batches from as from the whole."""

    cache: Cache | PartedCache
    rows: Sequence[int]

    def __len__(self) -> int:
        """Rows."""
        return len(self.rows)

    @cached_property  # asked for each sample of each step
    def ids(self) -> Sequence[str]:
        """Names of the records, in order."""
        return picked(self.cache.ids, self.rows)

    @cached_property
    def runs(self) -> list[Run]:
        """The rows, in order, by shape."""
        if isinstance(self.rows, AllBut):
            return list(self._left_of_runs(self.rows.without))
        places = [(run.shape, run.repeats) for run in self.cache.runs for _ in range(run.rows)]
        return [
            Run(len(list(same)), shape, repeats)
            for (shape, repeats), same in groupby(places[row] for row in self.rows)
        ]

    def _left_of_runs(self, without: Sequence[int]) -> Iterator[Run]:
        first = 0
        for run in self.cache.runs:
            last = first + run.rows
            yield run._replace(rows=run.rows - bisect_left(without, last) + bisect_left(without, first))
            first = last

    @property
    def several(self) -> bool:
        """Whether any row has several captions."""
        return self.cache.several

    def latents(self, index: Sequence[int]) -> Tensor:
        """Latents [n, C, h, w], float32, of the rows at `index` among these, which have one shape."""
        return self.cache.latents([self.rows[i] for i in index])

    def weights(self, index: Sequence[int]) -> Tensor | None:
        """How much their cells count, as `Cache.weights`."""
        return self.cache.weights([self.rows[i] for i in index])

    def condition(self, index: Sequence[int], chances: Sequence[float] | None = None) -> Condition:
        """Conditions, float32, of the rows at `index` among these, as `Cache.condition`."""
        return self.cache.condition([self.rows[i] for i in index], chances)


def chosen(images: Set[str], share: float, seed: int) -> set[str]:
    """Which of `images` (sha256 of each file) are held out: a share of them, at least one if above 0."""
    count = max(1, round(share * len(images))) if share else 0
    return set(sorted(images, key=lambda image: sha256_bytes(f"{seed}/{image}".encode()))[:count])


def own_images(cache: Cache) -> set[str]:
    """The pictures of `data.path` in `cache`, without the general ones: sha256 of each file."""
    return {image for id, image in zip(cache.ids, cache.images, strict=True) if not id.startswith(GENERAL)}


def split(
    cache: Cache | PartedCache, share: float, seed: int, left_out: Set[str] = frozenset()
) -> tuple[Rows, Rows]:
    """The rows to train on, and those of the `share` of pictures to measure on: a function of the seed.

    `left_out`: pictures (sha256 of each file) that are not trained on in any case.

    Whole pictures are held out: no row that is trained on shows one of them, under another name or mirrored.
    Only pictures of `data.path` are chosen, at least one if `share` is above 0, and without mirror images. A
    picture's place in the draw depends on its content alone, so that a set that grows keeps most of its
    choice. Of a stream, whose pictures are never all known at once, the share is of the pictures of its
    first part, and rows of that part alone are left out. Raises `UserError` if nothing would be left to
    train on.
    """
    if isinstance(cache, PartedCache):
        return _split_first(cache, share, seed)
    own = own_images(cache)
    held = chosen(own, share, seed)
    kept_out = held | (left_out & own)
    if kept_out == own:
        keys = f"validation.held_out {share}" + " with data.leave_out" * bool(left_out & own)
        raise UserError(
            f"{keys} keeps {len(own)} of {len(own)} pictures out of training, which leaves none; set it to "
            "0, or add pictures"
        )
    places = range(len(cache.ids))
    trained = [i for i in places if cache.images[i] not in kept_out]
    measured = [
        i
        for i in places
        if cache.images[i] in held
        and not cache.ids[i].startswith(GENERAL)
        and not cache.ids[i].endswith(MIRRORED)
    ]
    return Rows(cache, trained), Rows(cache, measured)


def _split_first(cache: PartedCache, share: float, seed: int) -> tuple[Rows, Rows]:
    if not share:
        return Rows(cache, AllBut(len(cache), ())), Rows(cache, ())
    images = [cache.images[row] for row in cache.first]
    held = chosen(set(images), share, seed)
    out = [row for row in cache.first if images[row] in held]
    if len(out) == len(cache):
        raise UserError(
            f"validation.held_out {share} keeps all pictures of the stream's only part out of training, "
            "which leaves none; set it to 0, or add pictures"
        )
    measured = [row for row in out if not cache.ids[row].endswith(MIRRORED)]
    return Rows(cache, AllBut(len(cache), tuple(out))), Rows(cache, measured)


def taught_by_plain_base(config: Distill, ids: Sequence[str]) -> list[bool]:
    """Which records the base alone teaches: those of data.regularization (`teacher.regularization`)."""
    alone = config.teacher.regularization == "base" and not config.teacher.in_student
    if not alone or not config.teacher.adapters or isinstance(ids, Told):  # a stream has no general pictures
        return [False] * len(ids)
    return [id.startswith(GENERAL) for id in ids]


def two_teachers(config: Distill) -> bool:
    """Whether the base alone teaches some of the records."""
    return config.data.regularization is not None and any(taught_by_plain_base(config, [GENERAL]))
