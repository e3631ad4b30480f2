"""`lcm-kit check`: is everything there that a config names, and are the pictures fit to be trained on?

Loads no weights, but for a folder's `--base`, whose VAE is to draw the pictures. Downloads nothing, but for
the first records of a stream.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from lcm_kit import assets
from lcm_kit.config.brand import Brand
from lcm_kit.config.evaluation import Quality
from lcm_kit.config.finetune import Finetune
from lcm_kit.config.load import Config
from lcm_kit.config.resolution import Resolution
from lcm_kit.config.schema import Base, Data, Distill, Training
from lcm_kit.config.sweep import Compose, GuidanceSweep
from lcm_kit.errors import UserError

if TYPE_CHECKING:  # they take seconds to import
    from lcm_kit.bases import BaseInfo
    from lcm_kit.data.caption_files import Bad
    from lcm_kit.data.records import Record

_USUAL = 512  # pixels that a folder is trained at, where nothing says otherwise
_OF_A_STREAM = 16  # records
_LOOKED_AT = 2000  # images: more would take minutes; `encode` tries each in any case


def check(config: Config) -> list[str]:
    """What is there, and what was noticed about its pictures, in lines.

    Raises one `UserError` that lists everything that is not there or that `encode` would stop on.
    """
    found: list[str] = []
    missing: list[UserError] = []
    for look in _looks(config):
        try:
            found += look().splitlines()
        except UserError as error:
            missing.append(error)
    if len(missing) == 1:
        raise missing[0]
    if missing:
        raise UserError(f"{len(missing)} things are missing", missing)
    return found


def check_images(
    path: str,
    resolution: int | None,
    trigger: str | None,
    base: Base | None = None,
    require_license: Sequence[str] = (),
) -> tuple[list[str], list[str]]:
    """What was noticed about a folder of images, in lines, and what `encode` would stop on.

    `resolution` None: that of `base`, whose VAE is asked to draw the pictures, or 512 without one.
    """
    from lcm_kit.data.folder import check_folder

    if base is None:
        found = check_folder(
            path, resolution=resolution or _USUAL, trigger=trigger, require_license=require_license
        )
        return [f"data: {path}, {found.count} images", *found.remarks], list(found.errors)

    from lcm_kit import sample
    from lcm_kit.bases import inspect_base
    from lcm_kit.data import reconstruction
    from lcm_kit.data.records import open_records

    info = inspect_base(base.path, revision=base.revision, variant=base.variant)
    size = resolution or info.resolution
    info.require_resolution(size, "--resolution")
    lines, errors = check_images(path, size, trigger, None, require_license)
    if not errors:
        records, _ = open_records(Data(path=path, kind="folder"))
        drawn = reconstruction.measure(info, records, size, sample.placement()["device"])
        lines += [f"{each.weight}: {each.sentence}" for each in drawn.findings()]
    return lines, errors


def _looks(config: Config) -> list[Callable[[], str]]:
    if isinstance(config, Training):
        return _trains(config)
    if isinstance(config, Quality):
        alone = config.base
        drawn = config.resolution
        subject = (lambda: _base(Base(path=alone), drawn)) if alone else (lambda: _trained(config.run))
        return [subject, lambda: _prompts(config.prompts)]
    if isinstance(config, GuidanceSweep | Compose | Brand):
        prompts = [config.prompts, config.control_prompts if isinstance(config, Brand) else None]
        folders = [path for path in (config.brand, config.control) if path is not None]
        on, size = config.base, config.resolution
        return [
            *(partial(_adapter, path) for path in _adapters_of(config)),
            *([lambda: _base(Base(on, config.revision, config.variant), size)] if on else []),
            *(partial(_prompts, each) for each in prompts if each),
            *(partial(_pictures, path) for path in folders),
        ]
    return []


def _adapters_of(config: GuidanceSweep | Compose | Brand) -> tuple[str, ...]:
    if isinstance(config, GuidanceSweep):
        return config.adapters
    if isinstance(config, Compose):
        return config.style, config.speed
    return (config.run, config.style) if config.style else (config.run,)


def _trains(config: Training) -> list[Callable[[], str]]:
    data = config.data
    prompts = [config.validation.prompts, config.validation.control]
    looks = [lambda: _base(config.base, trains=config)]
    looks += [lambda: _data(data, config.base), lambda: _tokens(config)] if data.has_images else []
    looks += [lambda: _samples(data)] if data.has_samples else []
    looks += [lambda: _alone(data)] if data.source == "prompts" else []
    if isinstance(config, Finetune):
        prompts.append(config.prior.prompts)
    elif isinstance(config, Distill) and (config.teacher.adapters or config.adapter.start):
        looks.append(lambda: _adapters(config))
    if (left_out := config.data.leave_out) is not None:
        looks.append(lambda: _left_out(left_out))
    return looks + [partial(_prompts, each) for each in prompts if each]


def _base(base: Base, drawn: Resolution | None = None, trains: Training | None = None) -> str:
    """What a base says of itself; `drawn`: the size of what is drawn with it, or all that a training asks."""
    if _on_the_hub(base.path):
        return f"base: {base.path} on the hub, not looked at"
    from lcm_kit.bases import inspect_base, require_fit
    from lcm_kit.core.prediction import check as check_prediction
    from lcm_kit.core.schedule import Schedule
    from lcm_kit.data import drawn_sizes

    info = inspect_base(base.path, revision=base.revision, variant=base.variant)
    check_prediction(Schedule.from_config(info.scheduler_config), info.prediction_type)
    require_fit(info)
    if drawn is not None:
        info.require_resolution(drawn, "resolution")
    if trains is not None:
        drawn_sizes.require(trains, info)
    kind = f"{info.family.name}, {info.prediction_type} prediction"
    there = f"base: {base.path}, {kind}, {info.resolution} pixels"
    return "\n".join([there, *_licence(base, info.license)])


def _licence(base: Base, declared: str | None) -> list[str]:
    from lcm_kit.io import licenses

    license = licenses.normal(base.license) if base.license else declared
    if license is None:
        return []
    found = [f"base licence: {license}"]
    if declared and declared != license:
        found.append(f"warning: base.license says {license}, and the README.md of the base {declared}")
    if terms := licenses.terms(license):
        found.append(f"warning: its name says {', '.join(terms)}; so will the card and the file")
    return found


def _data(data: Data, of: Base) -> str:
    from lcm_kit.data.stream_kinds import is_stream

    if is_stream(data):
        return _stream(data)
    if _on_the_hub(data.path) and data.kind != "folder":
        return _unseen(data.path)
    from lcm_kit.data.folder import check_data, reading
    from lcm_kit.data.records import open_records
    from lcm_kit.data.survey import require_licenses

    records, bad = open_records(data)
    require_licenses(data, records)
    looked = check_data(data, _known(of)) if len(records) <= _LOOKED_AT else None
    if looked is not None and looked.errors:
        raise UserError(
            f"data.path {data.path!r}: {' '.join(looked.errors)} Or leave them out with data.skip_bad=true"
        )
    if bad and not data.skip_bad:
        name, reason = bad[0]
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise UserError(
            f"data.path {data.path!r}: {name} ({reason}){more}; fix them or set data.skip_bad=true"
        )
    there = f"data: {data.path}, {len(records)} images with captions" + (
        f", {len(bad)} left out" if bad else ""
    )
    unopened = f"note: more than {_LOOKED_AT} images are not opened by this check."
    rest = looked.remarks if looked else [*reading(data), unopened]
    return "\n".join([there, *(f"  {line}" for line in rest)])


def _stream(data: Data) -> str:
    """The shards of a stream, and the first records of the first one: is there a way to them at all?"""
    from lcm_kit.data.findings import number
    from lcm_kit.data.streams import source_shards
    from lcm_kit.io.urls import shown

    name = shown(data.path)
    if data.streaming and _on_the_hub(data.path):
        return _unseen(name)
    shards = source_shards(data)
    found = [_fault(item) for item in islice(shards[0].records(), _OF_A_STREAM)]
    faults = [fault for fault in found if fault]
    if not found:
        raise UserError(f"data.path {name!r}: {shards[0].name} holds no record; give a file with pictures")
    if len(faults) == len(found) or (faults and not data.skip_bad):
        more = "" if len(faults) == len(found) else ", or set data.skip_bad=true"
        raise UserError(f"data.path {name!r}: {faults[0]}; fix it{more}")
    left_out = f", of which {len(faults)} would be left out" if faults else ""
    return (
        f"data: {name}, {number(len(shards), 'shard')}\n  note: only the first "
        f"{number(len(found), 'record')} of {shards[0].name} were read by this check{left_out}."
    )


def _fault(item: Record | Bad) -> str:
    """Which record of a stream is of no use, and why; "" if it is."""
    from lcm_kit.data.image_files import try_to_read

    if isinstance(item, tuple):
        return f"{item[0]} ({item[1]})"
    try:
        try_to_read(item.read())
    except UserError as error:
        return f"{item.id} ({error})"
    return ""


def _known(base: Base) -> BaseInfo | None:
    """What the base says of itself; None where that is not here, or not to be read, which `_base` says."""
    from lcm_kit.bases import inspect_base

    if _on_the_hub(base.path):
        return None
    try:
        return inspect_base(base.path, revision=base.revision, variant=base.variant)
    except UserError:
        return None


def _tokens(config: Training) -> str:
    """Captions that the base's text encoders would not read to their end, counted by its own tokenizers."""
    from lcm_kit.bases import load_tokenizers, room, too_long
    from lcm_kit.data.findings import few, number
    from lcm_kit.data.lost import captions_by_name
    from lcm_kit.data.records import open_records

    base = _known(config.base)
    if base is None or (_on_the_hub(config.data.path) and config.data.kind != "folder"):
        return ""
    try:
        records, _ = open_records(replace(config.data, captions=config.data.captions.unshuffled))
    except UserError:  # it is said of the data
        return ""
    chunks = config.data.chunks
    by_name = captions_by_name((record.id, record.captions) for record in records)
    cut, most = too_long(load_tokenizers(base), by_name, chunks)
    if not cut:
        return ""
    named = few([f"{id} ({count})" for id, count in cut.items()])
    has = number(len(cut), "caption", after=("has", "have"))
    return f"  warning: {has} more tokens than {room(most, chunks)}, and the rest is cut off: {named}."


def _on_the_hub(path: str) -> bool:
    return not path.startswith(("asset:", "/", ".", "~")) and not Path(path).exists()


def _unseen(path: str) -> str:
    """A wrong path looks like the name of a data set on the hub, so both are said."""
    return f"data: {path} is not on this machine; as a data set on the hub it is not looked at"


def _prompts(prompts: str) -> str:
    from lcm_kit.data import records

    return f"prompts: {prompts}, {len(records.prompts(prompts))} of them"


def _adapter(path: str) -> str:
    from lcm_kit.lora import untrusted
    from lcm_kit.lora.locate import adapter_file

    file = adapter_file(path)
    return f"adapter: {file}, {len(untrusted.inspect(file).entries)} tensors"


def _pictures(path: str) -> str:
    from lcm_kit.data.records import pictures

    return f"images: {path}, {len(pictures(assets.place(path), path))} of them"


def _left_out(run: str) -> str:
    from lcm_kit.data.sources import held_out_of

    share, _ = held_out_of(run)
    return f"left out: the {share:.0%} of the pictures that {run} held out"


def _samples(data: Data) -> str:
    from lcm_kit.data.samples import prompts_of

    return f"samples: {len(prompts_of(data))} of the teacher's, for {data.samples.prompts}"


def _alone(data: Data) -> str:
    return f"data: {_prompts(data.samples.prompts)}, trained on without pictures"


def _adapters(config: Distill) -> str:
    from lcm_kit.lora.locate import adapter_file

    named = [entry.path for entry in (*config.teacher.adapters, *config.adapter.start)]
    return f"adapters: {', '.join(str(adapter_file(path)) for path in named)}"


def _trained(run: str) -> str:
    if not (Path(run) / "adapter").is_dir():
        raise UserError(
            f"run {run!r} has no adapter/ folder; train it first, or give another folder as run=..."
        )
    return f"run: {run}"
