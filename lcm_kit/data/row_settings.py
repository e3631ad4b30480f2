"""What of a config decides which rows a picture has: how it is cut, weighed and captioned.

Each row of a manifest says this of itself, so that no hash of a shard needs it. Whether another config would
make the same rows nobody can tell by them: so it is part of a cache's settings, and of what a part of a
stream is made by, whose pictures are not looked at again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from lcm_kit.bases import BaseInfo
from lcm_kit.config.schema import Data

_BASE = "what the sides of the base's pictures are multiples of"
_BLOCKS = ("shapes", "masks", "captions")  # of `data`, whole


def of(base: BaseInfo, data: Data) -> dict[str, Any]:
    """By key of the config; None for what the other keys make no use of."""
    blocks = {name: asdict(getattr(data, name)) for name in _BLOCKS}
    trigger = data.captions.trigger_in_front or data.captions.shuffle_tags
    buckets = data.shapes.kind == "buckets" and data.shapes.multiple is None
    return {
        **{f"data.{name}.{key}": value for name, block in blocks.items() for key, value in block.items()},
        "data.chunks": data.chunks,
        "data.trigger": data.trigger if trigger else None,
        _BASE: base.multiple if buckets else None,
    }


def is_one(key: str) -> bool:
    """Whether a key of a cache's settings is of these, which caches did not keep once."""
    blocks = tuple(f"data.{name}." for name in _BLOCKS)
    return key.startswith(blocks) or key in ("data.chunks", "data.trigger", _BASE)


def without_old(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """`new` without those that `old` did not keep: of these it is not known whether they differ."""
    return {key: value for key, value in new.items() if key in old or not is_one(key)}
