"""Images and captions as a cache to train on: which records can be used, and their latents and embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from lcm_kit import sample
from lcm_kit.bases import BaseInfo
from lcm_kit.bases.condition import Framing
from lcm_kit.bases.tokens import straightened
from lcm_kit.config.schema import Data, Training
from lcm_kit.console import Progress
from lcm_kit.data import shards, vae_precision
from lcm_kit.data.caption_files import Bad
from lcm_kit.data.encoder import Encoder, tensors_of, usable_base
from lcm_kit.data.encoding import Contents, EncodedBatches, RowMaker, bring_up_to_date
from lcm_kit.data.image_files import of_image, try_to_read
from lcm_kit.data.progress import EncodeReport, listing
from lcm_kit.data.records import Record, open_records
from lcm_kit.data.shards import Entry
from lcm_kit.data.transforms import framing, to_pixels, upright_for
from lcm_kit.drawing.batches import Batches, at_once
from lcm_kit.errors import UserError
from lcm_kit.io.files import sha256_bytes
from lcm_kit.share import ALONE, Share


def encode(config: Training, progress: bool = True, share: Share = ALONE) -> EncodeReport:
    """Bring the cache `config.data.cache` up to date with the images, the captions and the base.

    As `encoding.bring_up_to_date`. Raises `UserError` if the base or the data cannot be used, and, unless
    `data.skip_bad`, if any record is unreadable or has no caption: it names them all, before anything is
    encoded.
    """
    base, data = usable_base(config), config.data

    def survey(old: Mapping[str, Any] | None, bar: Progress) -> Contents:
        records, entries, bad = _survey(data, old, bar)
        first = next(records[entry.id] for entry in entries)
        precision = vae_precision.settle(
            Path(data.cache), base, data, old and old["settings"], sample.placement()["device"],
            lambda: first.pixels(data.resolution)[None], share,
        )  # fmt: skip
        made_by = shards.settings(base, data, precision)
        load = partial(_load, base, data, records, precision)
        return Contents(base, data, made_by, entries, load, "encoding", bad)

    return bring_up_to_date(Path(data.cache), survey, progress, share)


def _survey(
    data: Data, old: Mapping[str, Any] | None, bar: Progress
) -> tuple[dict[str, Record], list[Entry], list[Bad]]:
    """Hash every record, and try every image that the old cache does not know."""
    good, bad = open_records(data)
    total = len(good) + len(bad)
    known = {row["image"] for row in old["records"]} if old else set()
    pool = ThreadPoolExecutor()
    try:
        checks = [pool.submit(_check, record, known) for record in good]
        found = [check.result() for check in bar.track(checks, description="checking")]
    finally:
        pool.shutdown(cancel_futures=True)  # an interrupt must not wait for all that is in the queue
    bad += [(record.id, reason) for record, (_, reason) in zip(good, found, strict=True) if reason]
    if bad and not data.skip_bad:
        raise UserError(
            f"{len(bad)} of {total} records of {data.path!r} cannot be used; fix them, or leave them out "
            "with data.skip_bad=true:",
            listing(bad),
        )
    if len(bad) == total:
        raise UserError(f"no record of {data.path!r} can be used; fix the first of them:", listing(bad))
    sides = (False, True) if data.flip else (False,)
    entries = [
        Entry(record.id, record.caption, image, sha256_bytes(straightened(record.caption).encode()), mirrored)
        for record, (image, reason) in zip(good, found, strict=True)
        if not reason
        for mirrored in sides
    ]
    return {record.id: record for record in good}, entries, bad


def _check(record: Record, known: set[str]) -> tuple[str, str]:
    """The hash of a record's image, and why it cannot be read ("" if it can)."""
    try:
        content = record.read()
        image = sha256_bytes(content)
        if image not in known:
            try_to_read(content)
    except UserError as error:
        return "", str(error)
    except OSError as error:
        return "", f"unreadable image: {error.strerror or error}"
    return image, ""


def _load(
    base: BaseInfo, data: Data, records: Mapping[str, Record], precision: str, missing: bool
) -> RowMaker:
    side, device = data.resolution, sample.placement()["device"]
    encoder = Encoder.load(base, device, vae=missing, precision=precision)
    batches = Batches(
        at_once(data.batch_size, side, side, device), f"encoding a picture of {side} x {side} pixels",
        "choose a smaller data.resolution, or stop what else uses this device's memory",
    )  # fmt: skip
    return RowMaker(encoder, partial(encoded, encoder, records, data, batches), _not_finite)


def _not_finite(broken: Sequence[Entry]) -> str:
    names = ", ".join(entry.id for entry in broken)
    return f"the VAE gives latents that are not finite for {names}; remove these images"


def encoded(
    encoder: Encoder, records: Mapping[str, Record], data: Data, batches: Batches, entries: Sequence[Entry]
) -> EncodedBatches:
    """The tensors of `entries` in batches, float32 on the CPU: `latents` [n, C, h, w], `embeds` [n, L, D].

    SDXL adds `pooled` [n, P] and `time_ids` [n, 6]. Raises `UserError` for an image that is another one now.
    """
    vae = encoder.vae
    assert vae is not None  # there are rows to make

    def rows(_: int, some: Sequence[tuple[Entry, Picture]]) -> dict[str, Tensor]:
        latents = vae.encoded(torch.stack([pixels for _, (pixels, _) in some]))
        condition = encoder.condition(
            [entry.caption for entry, _ in some], [framed for _, (_, framed) in some]
        )
        return {"latents": latents.cpu(), **tensors_of(condition)}

    planned = at_once(data.batch_size, data.resolution, data.resolution, str(vae.device))
    for batch, pictures in _ahead(entries, records, data, planned):
        yield from batches.run(list(zip(batch, pictures, strict=True)), rows)


Picture = tuple[Tensor, Framing]  # pixels [3, H, W] and how they were cut


def _ahead(
    entries: Sequence[Entry], records: Mapping[str, Record], data: Data, size: int
) -> Iterator[tuple[Sequence[Entry], list[Picture]]]:
    """Entries and pictures by batches of `size`; threads decode the next while the VAE works on this one."""

    def picture(entry: Entry) -> Picture:
        def cut(image: Image.Image) -> Picture:
            image, whole = upright_for(image, data.resolution)
            framed = framing(whole, data.resolution, entry.mirrored)
            return to_pixels(image, data.resolution, entry.mirrored, whole), framed

        try:
            content = records[entry.id].read()
            if sha256_bytes(content) != entry.image:
                raise UserError("it is another file now")
            return of_image(content, cut)
        except (UserError, OSError) as error:  # it could be read when `encode` began
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise UserError(
                f"{entry.id} of {data.path!r} changed while it was being encoded ({reason}); put it back or "
                "remove it, and run the same command again: finished shards are kept"
            ) from error

    batches = [entries[first : first + size] for first in range(0, len(entries), size)]
    with ThreadPoolExecutor() as pool:
        coming = [pool.submit(picture, entry) for entry in batches[0]]
        for batch, following in zip(batches, [*batches[1:], []], strict=True):
            current, coming = coming, [pool.submit(picture, entry) for entry in following]
            yield batch, [future.result() for future in current]
