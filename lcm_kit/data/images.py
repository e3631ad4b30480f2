"""Images and captions as a cache to train on: which records can be used, and their latents and embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from lcm_kit import sample
from lcm_kit.bases import BaseInfo
from lcm_kit.bases.condition import Framing
from lcm_kit.config.schema import Data, Training
from lcm_kit.console import Progress
from lcm_kit.data import cuts, masks, shards, vae_precision
from lcm_kit.data.buckets import cut
from lcm_kit.data.crops import placed
from lcm_kit.data.encoder import Encoder, tensors_of, usable_base
from lcm_kit.data.encoding import Contents, EncodedBatches, RowMaker, bring_up_to_date
from lcm_kit.data.image_files import of_image
from lcm_kit.data.lost import Lost
from lcm_kit.data.progress import EncodeReport
from lcm_kit.data.records import Record
from lcm_kit.data.shards import Entry
from lcm_kit.data.survey import survey
from lcm_kit.data.transforms import to_pixels, upright_for
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

    def surveyed(old: Mapping[str, Any] | None, bar: Progress) -> Contents:
        known = {row["image"] for row in old["records"]} if old else set()
        found = survey(base, data, known, bar)
        first = found.records[found.entries[0].id]
        precision = vae_precision.settle(
            Path(data.cache), base, data, old and old["settings"], sample.placement()["device"],
            lambda: first.pixels(data.resolution)[None], share,
        )  # fmt: skip
        made_by = shards.settings(base, data, precision)
        load = partial(_load, base, data, found.records, precision)
        lost = Lost.of({id: look.cut for id, look in found.seen.items()})
        remarks = [*lost.sentences(), cuts.places(data.cache, lost)]
        return Contents(
            base, data, made_by, found.entries, load, "encoding", found.bad, found.rights, remarks,
            lambda folder: cuts.write(folder, found, lost),
        )  # fmt: skip

    return bring_up_to_date(Path(data.cache), surveyed, progress, share)


def _load(
    base: BaseInfo, data: Data, records: Mapping[str, Record], precision: str, missing: bool
) -> RowMaker:
    device = sample.placement()["device"]
    encoder = Encoder.load(base, device, vae=missing, precision=precision, chunks=data.chunks)
    return maker_of(encoder, data, records)


def maker_of(encoder: Encoder, data: Data, records: Mapping[str, Record]) -> RowMaker:
    """What computes the rows of `records`, by id."""
    side, device = data.resolution, sample.placement()["device"]
    batches = Batches(
        at_once(data.batch_size, side, side, device), f"encoding a picture of {side} x {side} pixels",
        "choose a smaller data.resolution, or stop what else uses this device's memory",
    )  # fmt: skip
    return RowMaker(encoder, partial(encoded, encoder, records, data, batches), _not_finite)


def _not_finite(broken: Sequence[Entry]) -> str:
    names = ", ".join(entry.id for entry in broken)
    return f"the VAE gives latents that are not finite for {names}; remove these images"


class Picture(NamedTuple):
    """What is encoded of a picture."""

    pixels: Tensor  # [3, H, W]
    framed: Framing
    weights: Tensor | None  # uint8 [1, h, w] of its latent's cells; None: all are whole


def encoded(
    encoder: Encoder, records: Mapping[str, Record], data: Data, batches: Batches, entries: Sequence[Entry]
) -> EncodedBatches:
    """The tensors of `entries`, all of one shape, in batches on the CPU, as `shards.gathered` has them.

    Raises `UserError` for an image that is another one now.
    """
    vae = encoder.vae
    assert vae is not None  # there are rows to make

    def rows(_: int, some: Sequence[tuple[Entry, Picture]]) -> dict[str, Tensor]:
        made = {"latents": vae.encoded(torch.stack([picture.pixels for _, picture in some])).cpu()}
        if any(picture.weights is not None for _, picture in some):
            whole = torch.full((1, *made["latents"].shape[2:]), masks.WHOLE, dtype=torch.uint8)
            each = (whole if picture.weights is None else picture.weights for _, picture in some)
            made["weights"] = torch.stack(list(each))
        framings = [picture.framed for _, picture in some]
        texts = [entry.captions or ((entry.caption, 1.0),) for entry, _ in some]
        made |= tensors_of(encoder.condition([text for row in texts for text, _ in row], framings))
        if any(entry.captions for entry, _ in some):
            made["captions"] = torch.tensor([len(row) for row in texts])
            made["caption_weights"] = torch.tensor([weight for row in texts for _, weight in row])
        return made

    width, height = entries[0].size or (data.resolution,) * 2
    planned = at_once(data.batch_size, height, width, str(vae.device))
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    for batch, pictures in _ahead(entries, records, data, planned, factor):
        yield from batches.run(list(zip(batch, pictures, strict=True)), rows)


def _picture(entry: Entry, record: Record, data: Data, factor: int) -> Picture:
    """A record's picture, cut as `entry` says. Raises `UserError` if it is another file now."""
    content = record.read()
    if sha256_bytes(content) != entry.image:
        raise UserError("it is another file now")
    mask_file = record.mask() if record.mask is not None and entry.weights else None
    if mask_file is not None and not entry.weights.startswith(sha256_bytes(mask_file)):
        raise UserError("its mask is another file now")
    target = entry.size or (data.resolution, data.resolution)

    def shaped(image: Image.Image) -> Picture:
        image, whole = upright_for(image, max(target))
        mask = None
        if entry.weights:
            mask = masks.of_alpha(image) if mask_file is None else masks.read(mask_file)
        how = placed(entry.crop, cut(whole, target), image, mask, entry.image)
        weights = None
        if mask is not None:
            weights = masks.cells(mask, how, factor, data.masks.background, entry.mirrored)
        return Picture(to_pixels(image, how, entry.mirrored), how.framing(entry.mirrored), weights)

    return of_image(content, shaped)


def _ahead(
    entries: Sequence[Entry], records: Mapping[str, Record], data: Data, size: int, factor: int
) -> Iterator[tuple[Sequence[Entry], list[Picture]]]:
    """Entries and pictures by batches of `size`; threads decode the next while the VAE works on this one."""

    def picture(entry: Entry) -> Picture:
        try:
            return _picture(entry, records[entry.id], data, factor)
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
