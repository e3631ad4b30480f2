"""What is to be encoded: every record looked at once, by its header where its content is known already."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from PIL import Image

from lcm_kit.bases import BaseInfo, load_tokenizers
from lcm_kit.config.schema import Data
from lcm_kit.console import Progress
from lcm_kit.data import masks, rights
from lcm_kit.data.buckets import Cut, Shaper, Size, cut
from lcm_kit.data.caption_files import Bad
from lcm_kit.data.encoder import hashes_of
from lcm_kit.data.image_files import of_image, try_to_read
from lcm_kit.data.progress import listing
from lcm_kit.data.records import Record, open_records
from lcm_kit.data.shards import GENERAL, Entry
from lcm_kit.data.transforms import upright_size
from lcm_kit.errors import UserError
from lcm_kit.io import own_shapes
from lcm_kit.io.files import sha256_bytes


@dataclass(frozen=True)
class Seen:
    """What was found of a record's picture."""

    image: str  # SHA-256 of the file
    cut: Cut  # in the middle: where else it is cropped is known when its pixels are
    weights: str = ""  # `Entry.weights`


@dataclass(frozen=True)
class Survey:
    """The records of a source that can be encoded, in order, and the others with the reason."""

    records: dict[str, Record]
    seen: dict[str, Seen]
    entries: list[Entry] = field(repr=False)
    bad: list[Bad]
    dropped: list[Bad] = field(default_factory=list)  # as the config says: nothing is wrong with them
    rights: own_shapes.Rights | None = None


def survey(base: BaseInfo, data: Data, known: Set[str], bar: Progress) -> Survey:
    """Look at every record of `data`: hash its image, and decode it unless it is `known`.

    Raises `UserError` if none can be used, and, unless `data.skip_bad`, if any cannot: it names them all.
    A picture that `data.shapes.small` drops is among the bad ones and stops nothing. Raises it too for those
    whose licence `data.require_license` does not allow.
    """
    good, bad = open_records(data)
    total = len(good) + len(bad)
    found = Surveyor.of(base, data).look_at(good, known, partial(bar.track, description="checking"))
    bad = [*bad, *found.bad]
    if bad and not data.skip_bad:
        raise UserError(
            f"{len(bad)} of {total} records of {data.path!r} cannot be used; fix them, or leave them out "
            "with data.skip_bad=true:",
            listing(bad),
        )
    bad = [*bad, *found.dropped]
    if len(bad) == total:
        raise UserError(f"no record of {data.path!r} can be used; fix the first of them:", listing(bad))
    return replace(found, bad=bad)


@dataclass(frozen=True)
class Surveyor:
    """Looks at records for a base and a config; what it needs for that is loaded once."""

    data: Data
    shaper: Shaper
    tokenizers: Sequence[Any]

    @classmethod
    def of(cls, base: BaseInfo, data: Data) -> Surveyor:
        """Raises `UserError` as `Shaper.of` and `load_tokenizers`."""
        return cls(data, Shaper.of(base, data), load_tokenizers(base))

    def look_at(
        self,
        records: Sequence[Record],
        known: Set[str] = frozenset(),
        track: Callable[[Sequence[Future[Look]]], Iterable[Future[Look]]] = lambda checks: checks,
    ) -> Survey:
        """What there is to encode of `records`, with those that cannot be used; threads look at them.

        An image whose hash is `known` is not decoded.
        """
        data, pool = self.data, ThreadPoolExecutor()
        try:
            checks = [pool.submit(_look, record, data, self.shaper, known) for record in records]
            each = [(record, check.result()) for record, check in zip(records, track(checks), strict=True)]
        finally:
            pool.shutdown(cancel_futures=True)  # an interrupt must not wait for all that is in the queue
        kept = [(record, look) for record, look in each if isinstance(look, Seen)]
        require_licenses(data, (record for record, _ in kept))
        texts = hashes_of(self.tokenizers, [_captions(record) for record, _ in kept], data.chunks)
        entries = [
            entry
            for (record, look), text in zip(kept, texts, strict=True)
            for entry in _entries(record, look, text, data)
        ]
        return Survey(
            {record.id: record for record, _ in kept},
            {record.id: look for record, look in kept},
            entries,
            [(record.id, look) for record, look in each if isinstance(look, str)],
            [(record.id, look.reason) for record, look in each if isinstance(look, _Dropped)],
            rights.summary(record.rights for record, _ in kept),
        )


def require_licenses(data: Data, records: Iterable[Record]) -> None:
    """Raise `UserError`, which names them, if pictures have no licence that `data.require_license` allows.

    General pictures of the kit's own (`data.regularization: asset:NAME`) are under its licence.
    """
    shipped = (data.regularization or "").startswith("asset:")
    asked = {
        record.id: record.rights for record in records if not (shipped and record.id.startswith(GENERAL))
    }
    if sentence := rights.not_allowed(asked, data.require_license):
        raise UserError(f"data.path {data.path!r}: {sentence}")


@dataclass(frozen=True)
class _Dropped:
    """A picture that is left out as the config says."""

    reason: str


Look = Seen | _Dropped | str
"""Of a record; the last is why it cannot be read."""


def _look(record: Record, data: Data, shaper: Shaper, known: Set[str]) -> Look:
    """What was found of a record's image, or why it cannot be read."""
    try:
        content = record.read()
        image = sha256_bytes(content)
        if image not in known:
            try_to_read(content)
        size, transparent = of_image(content, lambda opened: _header(opened, content))
        weights = _weights(record, data, size, transparent)
    except UserError as error:
        return str(error)
    except OSError as error:
        return f"unreadable image: {error.strerror or error}"
    try:
        return Seen(image, cut(size, shaper.target(size)), weights)
    except UserError as error:
        return _Dropped(str(error))


def _header(image: Image.Image, content: bytes) -> tuple[Size, bool]:
    return upright_size(image, content), image.has_transparency_data


def _weights(record: Record, data: Data, size: Size, transparent: bool) -> str:
    """What the weights of the picture's cells are made from; "" where all of it counts alike."""
    source, background = data.masks.source, data.masks.background
    if source == "none":
        return ""
    if record.mask is not None:
        content = record.mask()
        masks.require_fit(content, size)
        return f"{sha256_bytes(content)} {background:g}"
    return f"{masks.ALPHA} {background:g}" if source == "alpha" and transparent else ""


def _captions(record: Record) -> tuple[tuple[str, float], ...]:
    return tuple((caption.text, caption.weight) for caption in record.captions)


def _entries(record: Record, seen: Seen, text: str, data: Data) -> Iterator[Entry]:
    """Its rows: one, and others where its mirror image or several crops are wanted."""
    target, captions = seen.cut.target, _captions(record)
    crops: list[str] = [data.shapes.crop]
    if data.shapes.crops > 1:
        crops = [f"random {k}" for k in range(1, data.shapes.crops + 1)]
    elif data.shapes.crop == "center" or seen.cut.resized == target:  # nothing to choose
        crops = [""]
    for crop in crops:
        for mirrored in (False, True) if data.flip else (False,):
            yield Entry(
                record.id, record.caption, seen.image, text, mirrored,
                None if target == (data.resolution, data.resolution) else target, crop, seen.weights,
                captions if len(captions) > 1 else (), record.repeats,
            )  # fmt: skip
