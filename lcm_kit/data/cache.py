"""`encode` turns images and captions into a folder of latents and text embeddings; `Cache` reads it.

Training then needs neither the VAE nor the text encoder. The folder's format is the affair of `shards.py`.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from lcm_kit import console, families, own_files, own_shapes
from lcm_kit.config.schema import Data, Training
from lcm_kit.console import Progress
from lcm_kit.data import shards
from lcm_kit.data.caption_files import Bad
from lcm_kit.data.image_files import of_image, try_to_read
from lcm_kit.data.progress import EncodeReport, finish, listing, progress_bar
from lcm_kit.data.records import Record, open_records
from lcm_kit.data.shards import Entry, Shard
from lcm_kit.data.transforms import framing, to_pixels, upright_for
from lcm_kit.errors import UserError
from lcm_kit.families import BaseInfo, inspect_base
from lcm_kit.families.condition import Condition, Framing
from lcm_kit.families.tokens import straightened
from lcm_kit.files import require_writable, sha256_bytes
from lcm_kit.prediction import check as check_prediction
from lcm_kit.schedule import Schedule
from lcm_kit.share import Share

ALONE = Share()
_CONDITION = ("embeds", "pooled", "time_ids")


def encode(config: Training, progress: bool = True, share: Share = ALONE) -> EncodeReport:
    """Bring the cache `config.data.cache` up to date with the images, the captions and the base.

    Only shards that are missing or whose inputs changed are encoded: an interrupted run continues, a second
    run does nothing. Of several processes each encodes its `share` of the shards, and the first writes the
    manifest when all are done. Raises `UserError` if the base or the data cannot be used, and, unless
    `data.skip_bad`, if any record is unreadable or has no caption: it names them all, before anything is
    encoded.
    """
    started, data, folder = time.monotonic(), config.data, Path(config.data.cache)
    base = usable_base(config)
    old = shards.read_manifest(folder, repair=True)
    with progress_bar(progress and share.first) as bar:
        records, entries, bad = _survey(data, old, bar)
        made_by = shards.settings(base, data)
        planned = shards.plan(made_by, entries, data.shard_size)
        missing = shards.missing(folder, planned)
        if share.first:
            _say_what_is_cut(base, [entry for shard in missing for entry in shard.entries])
        share.wait()  # every process has seen which shards are missing
        _encode(base, data, missing, share, records, bar)
    share.wait()
    new = shards.manifest(base, data, planned, bad)
    return finish(folder, old, new, missing, started, progress, share, bad)


def usable_base(config: Training) -> BaseInfo:
    """The base of `config`. Raises `UserError` if it cannot be trained, or not at `data.resolution`."""
    base = inspect_base(config.base.path, revision=config.base.revision, variant=config.base.variant)
    check_prediction(Schedule.from_config(base.scheduler_config), base.prediction_type)
    if config.data.resolution % base.factor:
        raise UserError(
            f"data.resolution {config.data.resolution} is not a multiple of {base.factor}, as the base's VAE "
            "needs"
        )
    return base


def _say_what_is_cut(base: BaseInfo, entries: Sequence[Entry]) -> None:
    cut, most = families.too_long(base, {entry.id: entry.caption for entry in entries})
    if cut:
        longest = max(cut, key=lambda id: cut[id])
        console.say(
            f"warning: captions with more than the {most} tokens that the base reads, the rest is cut off: "
            f"{len(cut)}, the longest that of {longest} with {cut[longest]}",
            err=True,
        )


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
            f"{len(bad)} of {total} records of {data.path!r} cannot be used; mend them, or leave them out "
            "with data.skip_bad=true:",
            listing(bad),
        )
    if len(bad) == total:
        raise UserError(f"no record of {data.path!r} can be used; mend the first of them:", listing(bad))
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


def _encode(
    base: BaseInfo,
    data: Data,
    missing: Sequence[Shard],
    share: Share,
    records: Mapping[str, Record],
    bar: Progress,
) -> None:
    """Encode and write this process's missing shards, each when it is done, and the empty condition."""
    empty, content = Path(data.cache) / shards.EMPTY, shards.content_hash(shards.settings(base, data))
    mine = share.of(missing)
    done = not share.first or shards.intact(empty, content)
    if not mine and done:
        return
    require_writable(Path(data.cache))  # before the base is loaded for nothing
    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoder = Encoder.load(base, device)
    if not done:
        own_files.write_tensors(empty, tensors_of(encoder.empty()), content)
    task = bar.add_task("encoding", total=sum(len(shard.entries) for shard in mine))
    for shard in mine:
        tensors = encode_shard(encoder, shard, records, data, lambda n: bar.advance(task, n))
        own_files.write_tensors(Path(data.cache) / shard.file, tensors, shard.content)


@dataclass(frozen=True)
class Encoder:
    """The VAE, in float32 (in float16 SDXL's overflows), and the text encoders of a base."""

    family: families.Code
    vae: Any  # None where only captions are encoded
    text: Any

    @classmethod
    def load(cls, base: BaseInfo, device: str, vae: bool = True) -> Encoder:
        """The VAE, unless captions are all there is to encode, and the text encoders of `base`."""
        family = families.family_of(base)
        text = family.load_text(base)
        for part in text:
            if isinstance(part, torch.nn.Module):
                part.to(device)
        return cls(family, families.load_vae(base).to(device) if vae else None, text)

    def empty(self) -> Condition:
        """The condition of an unconditional pass."""
        return self.family.empty_condition(self.text, 1)

    def condition(self, captions: Sequence[str], framings: Sequence[Framing]) -> Condition:
        """The conditions of captions, and of how their pictures were cut."""
        return replace(self.family.encode_text(self.text, captions), time_ids=self.family.sizes(framings))


def tensors_of(condition: Condition) -> dict[str, Tensor]:
    """The tensors of a condition by name, float32 on the CPU."""
    tensors = {name: getattr(condition, name) for name in _CONDITION}
    return {name: tensor.float().cpu() for name, tensor in tensors.items() if tensor is not None}


def encode_shard(
    encoder: Encoder,
    shard: Shard,
    records: Mapping[str, Record],
    data: Data,
    advance: Callable[[int], None],
) -> dict[str, Tensor]:
    """The tensors of one shard, float32 on the CPU: `latents` [n, C, h, w] and `embeds` [n, L, D].

    SDXL adds `pooled` [n, P] and `time_ids` [n, 6].
    """
    found: dict[str, list[Tensor]] = {}
    for batch, pictures in _ahead(shard, records, data):
        pixels = torch.stack([picture for picture, _ in pictures])
        latents = families.encode_images(encoder.vae, pixels).float().cpu()
        broken = [entry.id for entry, z in zip(batch, latents, strict=True) if not z.isfinite().all()]
        if broken:
            raise UserError(
                f"the VAE gives latents that are not finite for {', '.join(broken)}; remove these images"
            )
        condition = encoder.condition([entry.caption for entry in batch], [framed for _, framed in pictures])
        for name, tensor in {"latents": latents, **tensors_of(condition)}.items():
            found.setdefault(name, []).append(tensor)
        advance(len(batch))
    return {name: torch.cat(tensors) for name, tensors in found.items()}


Picture = tuple[Tensor, Framing]  # pixels [3, H, W] and how they were cut


def _ahead(
    shard: Shard, records: Mapping[str, Record], data: Data
) -> Iterator[tuple[Sequence[Entry], list[Picture]]]:
    """Entries and pictures by batches; threads decode the next while the VAE works on this one."""

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

    size = data.batch_size
    batches = [shard.entries[first : first + size] for first in range(0, len(shard.entries), size)]
    with ThreadPoolExecutor() as pool:
        coming = [pool.submit(picture, entry) for entry in batches[0]]
        for batch, following in zip(batches, [*batches[1:], []], strict=True):
            current, coming = coming, [pool.submit(picture, entry) for entry in following]
            yield batch, [future.result() for future in current]


@dataclass(frozen=True, eq=False)
class Cache:
    """A finished cache. Rows are read from disk when asked for; the operating system keeps the hot ones."""

    folder: Path
    ids: list[str]
    captions: list[str]
    images: list[str]  # hash of each row's image file: the same for a picture and its mirror image
    _shards: list[own_shapes.Shard] = field(repr=False)
    _empty_content: str = field(repr=False)  # content hash of the empty condition's file

    @staticmethod
    def open(
        folder: Path | str, *, base: BaseInfo, data: Data, settings: Mapping[str, Any] | None = None
    ) -> Cache:
        """The cache in `folder`, if it was made for this base and these settings, of images unless given.

        Raises `UserError` if it is missing, unfinished, damaged, or was made for another VAE, text encoder,
        resolution or source; what is in a shard is looked at when it is first read (`shards.intact`).
        """
        folder = Path(folder)
        found = shards.read_manifest(folder)
        if found is None:
            raise UserError(
                f"there is no finished cache in {str(folder)!r}; run `lcm-kit encode` with this config first"
            )
        wanted = settings or shards.settings(base, data)
        changed = shards.differences(found["settings"], wanted)
        if changed:
            raise UserError(
                f"cache {str(folder)!r} was made for another config ({'; '.join(changed)}); run "
                "`lcm-kit encode` with this config first"
            )
        for shard in found["shards"]:  # by their headers; their tensors are looked at when they are opened
            if own_files.made_from(folder / shard["file"]) != shard["content"]:
                shards.require_intact(folder / shard["file"], shard["content"])
        rows = found["records"]
        ids = [row["id"] + " (mirrored)" * row["mirrored"] for row in rows]
        captions, images = ([row[key] for row in rows] for key in ("caption", "image"))
        return Cache(folder, ids, captions, images, found["shards"], shards.content_hash(wanted))

    @property
    def fingerprint(self) -> str:
        """Hash of all that the cached tensors were made from: images, captions, resolution and base."""
        return sha256_bytes("".join(shard["content"] for shard in self._shards).encode())

    def __len__(self) -> int:
        """Rows: images, twice as many with data.flip."""
        return len(self.ids)

    def latents(self, index: int | Sequence[int]) -> Tensor:
        """Latents [n, C, h, w], float32, of the rows at `index` (one row: n = 1)."""
        return self._rows("latents", index)

    def condition(self, index: int | Sequence[int]) -> Condition:
        """The conditions of the rows at `index`, float32."""
        first = _open(self.folder / self._shards[0]["file"], self._shards[0]["content"])
        held = [name for name in _CONDITION if name in first.keys()]  # noqa: SIM118
        return Condition(**{name: self._rows(name, index) for name in held})

    def empty(self, n: int = 1) -> Condition:
        """The condition of an unconditional pass, n times, float32; without sizes (`Condition.sized_as`)."""
        shards.require_intact(self.folder / shards.EMPTY, self._empty_content)
        return Condition(**load_file(self.folder / shards.EMPTY)).expand(n)

    def _rows(self, name: str, index: int | Sequence[int]) -> Tensor:
        starts = [0, *accumulate(shard["rows"] for shard in self._shards)]
        rows = []
        for i in [index] if isinstance(index, int) else index:
            number = bisect_right(starts, i) - 1
            shard, row = self._shards[number], i - starts[number]
            rows.append(_open(self.folder / shard["file"], shard["content"]).get_slice(name)[row : row + 1])
        return torch.cat(rows)


@lru_cache(maxsize=256)
def _open(path: Path, content: str) -> Any:
    """An open shard. `content` is in the key so that a shard that was written anew is opened anew.

    Raises `UserError` if its tensors are not those that were written.
    """
    shards.require_intact(path, content)
    return safe_open(path, framework="pt")
