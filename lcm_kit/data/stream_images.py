"""Streams of pictures and captions as a cache of parts: which are missing, who makes them, and the list."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image

from lcm_kit import console, sample
from lcm_kit.bases import BaseInfo
from lcm_kit.config.schema import Data, Training
from lcm_kit.data import cuts, parts, rights, shards, vae_precision
from lcm_kit.data.encoder import Encoder, tensors_of, usable_base
from lcm_kit.data.findings import few, number
from lcm_kit.data.images import maker_of
from lcm_kit.data.lost import SHOWN, Lost
from lcm_kit.data.parts import PartMaker
from lcm_kit.data.progress import EncodeReport, listing, progress_bar
from lcm_kit.data.records import Record
from lcm_kit.data.streams import SourceShard, identities, source_shards
from lcm_kit.data.survey import Surveyor
from lcm_kit.drawing.batches import at_once
from lcm_kit.drawing.pictures import png_bytes
from lcm_kit.errors import UserError
from lcm_kit.io import own_files, own_shapes
from lcm_kit.io.files import sha256_bytes
from lcm_kit.io.remote import Folder
from lcm_kit.share import ALONE, Share


class Elsewhere(Protocol):
    """Another engine, whose workers make the parts, with `part_maker` each."""

    def precision(self, config: Training) -> str:
        """What the VAE is to compute in, as a worker's device finds it (`try_precision`)."""

    def make(
        self,
        config: Training,
        sources: Sequence[SourceShard],
        settings: Mapping[str, Any],
        advance: Callable[[], None],
    ) -> None:
        """Make the parts of `sources` by `settings`, and `advance` with each. Raises `UserError`."""


def folder_of(data: Data) -> Folder:
    """Where the cache is, here or at an address."""
    return Folder.of(data.cache, data.local_cache, data.local_cache_gb)


def require_possible(config: Training) -> None:
    """Raise `UserError` for keys that would need all pictures of the stream at once."""
    data = config.data
    asked = {
        "data.regularization": data.regularization is not None,
        "data.leave_out": data.leave_out is not None,
        "data.source mix": data.source == "mix",
    }
    for key in (key for key, given in asked.items() if given):
        raise UserError(
            f"{key} is not for a stream ({data.path!r}), whose pictures are never all known at once; encode "
            "a folder of images, or remove it"
        )


def encode(
    config: Training, progress: bool = True, share: Share = ALONE, elsewhere: Elsewhere | None = None
) -> EncodeReport:
    """Bring the cache `config.data.cache` up to date with a stream: make the parts that it lacks.

    A part that is there and whole is kept; of several processes each makes its `share`, unless they are made
    `elsewhere`. Raises `UserError` as `PartMaker.make`, and if the source, the base or the folder cannot be
    used.
    """
    require_possible(config)
    base, data, started = usable_base(config), config.data, time.monotonic()
    folder, sources = folder_of(data), source_shards(data)
    old = parts.read_json(folder, parts.PARTS, own_shapes.Parts)
    before = None if old is None else old["settings"]
    if elsewhere is not None:
        precision = _known_precision(base, data, before) or elsewhere.precision(config)
    else:
        precision = try_precision(base, data, sources, before, share)
    settings = shards.settings(base, data, precision)
    if share.world > 1:
        found_here = sha256_bytes(repr(identities(data, sources)).encode())
        share.require_same(shards.without_places(settings) | {"set of shards": found_here})
    found = [parts.done(folder, source, settings) for source in sources]
    missing = [source for source, part in zip(sources, found, strict=True) if part is None]
    share.wait()  # every process has seen which are missing
    with progress_bar(progress and share.first, "shards") as bar:
        task = bar.add_task("encoding", total=len(missing if elsewhere else share.of(missing)))
        advance = partial(bar.advance, task, 1)
        if elsewhere is None:
            make_parts(config, precision, share.of(missing), advance)
        elif missing:
            elsewhere.make(config, missing, settings, advance)
    share.wait()
    where = folder.shown if folder.is_remote else Path(folder.place)
    report = EncodeReport(where, 0, 0, 0.0)
    if share.first:
        now = [
            part or parts.done(folder, source, settings) for source, part in zip(sources, found, strict=True)
        ]
        if absent := [source.name for source, part in zip(sources, now, strict=True) if part is None]:
            raise UserError(f"the part of {absent[0]} was not made; run the same command again")
        held = [part for part in now if part is not None]
        _require_licenses(data, held)
        _require_rows(folder, data, held)
        if _lacks_empty(folder, settings):  # as after an encode by other settings, which was stopped
            part_maker(config, precision)
        made = sum(part["rows"] for part, was in zip(held, found, strict=True) if was is None)
        changes = [] if old is None else shards.differences(old["settings"], settings)
        lost = {part["source"]: Lost.read(part["lost"]) for part in held if "lost" in part}
        remarks = _lost_in_words(folder, data, lost, of=len(held))
        if old is None or old["parts"] != held:
            _draw_worst(folder, lost)
        _write_list(folder, base, data, settings, held, old)
        report = EncodeReport(
            where, sum(part["rows"] for part in held), made, time.monotonic() - started, changes,
            [bad for part in held if part["skipped"] for bad in _skipped(folder, part)], remarks=remarks,
        )  # fmt: skip
        if progress:
            console.say(report.message)
    share.wait()
    return report


def make_parts(
    config: Training, precision: str, sources: Sequence[SourceShard], advance: Callable[[], None]
) -> None:
    """Make the parts of `sources`, one after the other; the models are loaded once, where there is any.

    `precision`: the VAE's, the same for all parts of a cache.
    """
    if not sources:
        return
    maker = part_maker(config, precision)
    for source in sources:
        maker.make(source)
        advance()


def part_maker(config: Training, precision: str) -> PartMaker:
    """What makes parts of `config`: its models, loaded. The unconditional pass is in the cache then.

    `precision`: the VAE's. Raises `UserError` for a base or a cache that cannot be used.
    """
    base, data = usable_base(config), config.data
    folder, device = folder_of(data), sample.placement()["device"]
    encoder = Encoder.load(base, device, precision=precision, chunks=data.chunks)
    settings = shards.settings(base, data, precision)
    if _lacks_empty(folder, settings):
        empty = shards.empty(settings)
        folder.write(empty.file, own_files.tensor_bytes(tensors_of(encoder.empty()), empty.content))
    side = data.resolution
    return PartMaker(
        Surveyor.of(base, data), settings, folder, partial(maker_of, encoder, data),
        at_once(data.batch_size, side, side, device),
    )  # fmt: skip


def _lacks_empty(folder: Folder, settings: Mapping[str, Any]) -> bool:
    empty = shards.empty(settings)
    return folder.made_from(empty.file) != empty.content


def try_precision(
    base: BaseInfo,
    data: Data,
    sources: Sequence[SourceShard],
    before: Mapping[str, Any] | None = None,
    share: Share = ALONE,
) -> str:
    """What the VAE computes in: what is known, else what the first picture proves on this machine's device.

    `before`: the settings of the cache's list, None where it has none. Raises `UserError` for pictures that
    cannot be read.
    """
    if folder_of(data).is_remote:
        return _known_precision(base, data, before) or vae_precision.FULL

    def first() -> torch.Tensor:
        records = (each for source in sources for each in source.records() if isinstance(each, Record))
        return next(records).pixels(data.resolution)[None]

    device = sample.placement()["device"]
    return vae_precision.settle(Path(data.cache), base, data, before, device, first, share)


def _known_precision(base: BaseInfo, data: Data, before: Mapping[str, Any] | None) -> str | None:
    """What the config says or the cache was begun in; at an address, where machines could differ, what the
    config says, and float32 where it says auto."""
    if folder_of(data).is_remote:
        return vae_precision.FULL if data.vae_precision == "auto" else data.vae_precision
    return vae_precision.known(Path(data.cache), base, data, before)


def _require_licenses(data: Data, held: Sequence[own_shapes.Part]) -> None:
    """Parts may be older than the key: what is made now was asked picture by picture (`Surveyor.look_at`)."""
    wrong = [
        part["source"]
        for part in held
        if not rights.all_allowed(part.get("rights"), part["pictures"], data.require_license)
    ]
    if wrong:
        raise UserError(
            f"data.path {data.path!r}: {few(wrong)} {'has' if len(wrong) == 1 else 'have'} pictures without "
            "a licence that data.require_license allows; take them out, or leave these shards out"
        )


def _require_rows(folder: Folder, data: Data, held: Sequence[own_shapes.Part]) -> None:
    if any(part["rows"] for part in held):
        return
    why = [bad for part in held if part["skipped"] for bad in _skipped(folder, part)]
    raise UserError(
        f"no record of {data.path!r} can be used; "
        + ("fix the first of them:" if why else f"{number(len(held), 'shard')} of it hold none"),
        *([listing(why)] if why else []),
    )


def _lost_in_words(folder: Folder, data: Data, lost: Mapping[str, Lost], of: int) -> list[str]:
    """What became of the pictures of all parts, `of` so many, by the accounts that there are of them."""
    total = sum(lost.values(), Lost())
    said = [*total.sentences(data.chunks), cuts.places(folder.shown, total, parts=True)] if lost else []
    if len(lost) < of:
        said.append(
            f"of {number(of - len(lost), 'shard')} that an older version encoded it is not known what "
            "became of the pictures"
        )
    return said


def _draw_worst(folder: Folder, lost: Mapping[str, Lost]) -> None:
    """The worst pictures of all parts as a sheet in `folder`, from those of the parts."""
    worst = sorted(
        (-harm, source, at) for source, each in lost.items() for at, (_, harm) in enumerate(each.worst)
    )[:SHOWN]
    sheets: dict[str, Image.Image] = {}
    for source in {source for _, source, _ in worst}:
        try:
            sheets[source] = parts.worst_of(folder, source)
        except UserError as error:  # nothing is trained on it
            console.say(f"warning: {error}", err=True)
    sheet = cuts.of_sheets((sheets[source], at) for _, source, at in worst if source in sheets)
    if sheet is None:
        folder.delete(cuts.SHEET)
    else:
        folder.write(cuts.SHEET, png_bytes(sheet))


def _skipped(folder: Folder, part: own_shapes.Part) -> list[tuple[str, str]]:
    found = parts.read_json(
        folder.below(parts.folder_name(part["source"])), parts.RECORDS, own_shapes.PartRecords
    )
    return [] if found is None else [(each["id"], each["reason"]) for each in found["skipped"]]


def _write_list(
    folder: Folder,
    base: BaseInfo,
    data: Data,
    settings: object,
    held: Sequence[own_shapes.Part],
    old: own_shapes.Parts | None,
) -> None:
    new = {**shards.origin(base, data), "settings": settings, "parts": list(held)}
    if old is None or old["parts"] != list(held) or old["settings"] != settings:
        folder.write(parts.PARTS, own_files.json_text(new))
