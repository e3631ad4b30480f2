"""How a LoRA was made, back from the metadata of a file: one of this kit's, or anybody's."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from lcm_kit import samplers
from lcm_kit.config.resolution import of_sides
from lcm_kit.io import licenses
from lcm_kit.io.own_files import unknown_keys
from lcm_kit.lora import provenance
from lcm_kit.lora.provenance import Base, Data, Provenance, Recommended

PREFIX = "lcm_kit."  # of the metadata keys that hold what only this kit knows
REST = PREFIX + "provenance"  # all that has no key of its own, as JSON


def sampler_name(use: Recommended) -> str:
    """As apps call what is recommended."""
    return "" if use.sampler is None else samplers.sampler_of(use.sampler).name_in_apps


def declared_modules(metadata: Mapping[str, str]) -> int | None:
    """How many modules a file of ours was written with; None if the header does not say."""
    return _whole(metadata.get(PREFIX + "modules"))


def provenance_from_header(metadata: Mapping[str, str], title: str) -> Provenance:
    """How a file was made, from its header: all of it from one of ours, else what kohya and ModelSpec tell.

    `title` is the caller's, because a stranger's header can say anything and a title becomes a file's name. A
    value that does not parse counts as unknown, and so does all of `REST` where one key of it does not.
    """
    known = without_none_strings(metadata)
    if PREFIX + "metadata" in known:
        own = {key.removeprefix(PREFIX): value for key, value in known.items() if key.startswith(PREFIX)}
        keyed = _keyed(known, own)
        try:
            found = provenance.from_json(_joined(_rest(known), keyed))
        except (ValueError, RecursionError):
            found = provenance.from_json(keyed)
        return replace(found, title=title, recommended=_recommended(own))
    merged = known.get("modelspec.merged_from")
    return Provenance(
        title,
        base=Base(known.get("ss_sd_model_name")),
        step=_whole(known.get("ss_steps")),
        data=Data(
            resolution=_size(known.get("ss_resolution")) or _size(known.get("modelspec.resolution")),
            shapes=_shapes(known),
            trigger=known.get("modelspec.trigger_phrase"),
        ),
        date=known.get("modelspec.date"),
        parents=tuple(merged.split(", ")) if merged else (),
        license=licenses.said(known.get("modelspec.license")),
    )


def not_read(metadata: Mapping[str, str]) -> str | None:
    """A sentence on what a header says that `provenance_from_header` does not read; None if it reads all."""
    try:
        provenance.from_json(_rest(metadata))
    except (ValueError, RecursionError) as error:
        unknown = unknown_keys(error) if isinstance(error, ValidationError) else []
        says = f"says {unknown[0][:60]}, which this kit does not know" if unknown else "is no whole record"
        kit = metadata.get(PREFIX + "kit_version", "?")[:20]
        return f"its {REST} (of lcm-kit {kit}) {says}, so that none of it is read"
    return None


def _rest(known: Mapping[str, str]) -> dict[str, Any]:
    """Raises `ValueError` if it is no JSON object."""
    rest = json.loads(known.get(REST, "{}"))
    if not isinstance(rest, dict):
        raise ValueError("it is no JSON object")
    return rest


def _joined(rest: Mapping[str, Any], keyed: Mapping[str, Any]) -> dict[str, Any]:
    """One object of both; of a section some has keys of its own, which count."""
    sections = {
        name: {**rest[name], **value}
        for name, value in keyed.items()
        if isinstance(value, dict) and isinstance(rest.get(name), dict)
    }
    return {**rest, **keyed, **sections}


def _keyed(known: Mapping[str, str], own: Mapping[str, str]) -> dict[str, Any]:
    """What has keys of its own, as `provenance.from_json` takes it."""
    low, high = _number(own.get("guidance_min")), _number(own.get("guidance_max"))
    found = {
        "base": {"path": own.get("base"), "hash": own.get("base_hash")},
        "method": {"name": own.get("method")},
        "step": _whole(own.get("steps")),
        "guidance": None if low is None or high is None else {"min": low, "max": high},
        "data": {
            "fingerprint": own.get("data_fingerprint"),
            "resolution": _size(known.get("ss_resolution")),
            "trigger": known.get("modelspec.trigger_phrase"),
        },
        "date": known.get("modelspec.date"),
        "kit_version": own.get("kit_version"),
        "parents": list(_names(own.get("parents"))),
    }
    return {name: value for name, value in found.items() if value is not None}


def _recommended(own: Mapping[str, str]) -> Recommended | None:
    """What a sweep recommended for the weights of a file, back from its header."""
    sampler, steps = own.get("sampler"), _whole(own.get("sampling_steps"))
    scale, weight = _number(own.get("sampling_guidance_scale")), _number(own.get("lora_weight"))
    if "recommended" not in own:  # what else it says of sampling holds for the method in general
        return None
    if (
        sampler is None
        or not samplers.serves_adapter(sampler)
        or not steps
        or steps > 1000
        or scale is None
        or scale < 1
        or weight is None
    ):
        return Recommended(own["recommended"], None, None, None, None)
    part, at = own.get("recommended_for"), own.get("recommended_at")
    return Recommended(own["recommended"], sampler, steps, scale, weight, part=part, at=at)


def without_none_strings(metadata: Mapping[str, str]) -> dict[str, str]:
    """Without what sd-scripts writes as "None"."""
    return {key: value for key, value in metadata.items() if value not in ("", "None")}


def _whole(text: str | None) -> int | None:
    return int(text) if text is not None and re.fullmatch(r"[0-9]{1,15}", text) else None


def _number(text: str | None) -> float | None:
    try:
        number = float(text or "")
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _size(text: str | None) -> int | tuple[int, int] | None:
    """The side, from "(512, 512)", "512,512", "512x512" or "512", else width and height; None of others."""
    sides = [_whole(number) for number in re.findall(r"[0-9]+", text or "")]
    if not all(sides) or len(sides) not in (1, 2):
        return None
    width, height = sides[0], sides[-1]
    assert width and height
    return of_sides(width, height)


def _shapes(known: Mapping[str, str]) -> dict[str, int]:
    """How many pictures were of which shape, as sd-scripts says it of one data set or of several."""
    try:
        told = [json.loads(known.get("ss_bucket_info", "null"))]
        told += [each["bucket_info"] for each in json.loads(known.get("ss_datasets", "[]"))]
        buckets = [each for info in told if info for each in info["buckets"].values()]
        found: dict[str, int] = {}
        for (width, height), n in ((each["resolution"], each["count"]) for each in buckets):
            if not all(type(number) is int and 0 < number < 10**9 for number in (width, height, n)):
                return {}
            found[f"{width}x{height}"] = found.get(f"{width}x{height}", 0) + n
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}
    return found


def _names(text: str | None) -> tuple[str, ...]:
    try:
        names = json.loads(text or "[]")
        json.dumps(names, ensure_ascii=False).encode()  # JSON can spell half of a character
    except (ValueError, RecursionError):
        return ()
    fine = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return tuple(names) if fine else ()
