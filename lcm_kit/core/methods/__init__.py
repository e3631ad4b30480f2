"""Distillation methods, one file each; a name in `METHODS` is the `method.name` of a config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any, cast

from lcm_kit.core.methods.base import Method, MethodInfo, Times, usual
from lcm_kit.core.methods.dmd import DMD
from lcm_kit.core.methods.lcm import LCM
from lcm_kit.core.methods.pcm import PCM
from lcm_kit.core.methods.progressive import Progressive, Stage
from lcm_kit.core.methods.tcd import TCD

METHODS: dict[str, type[Method]] = {kind.name: kind for kind in (LCM, TCD, PCM, Progressive, DMD)}
DEFAULT = MethodInfo.of(LCM(), LCM.name)  # of a config, and of a LoRA that does not say how it was made


def info(name: str | None, constants: Mapping[str, Any] | None = None) -> MethodInfo:
    """Of the method of the kit's that has this name, with the settings that a file says it had.

    Of another its name is all that is known; settings that are none of the method's are passed over.
    """
    if name is None:
        return DEFAULT
    if name not in METHODS:
        return MethodInfo(name, name)
    method = METHODS[name]
    own = {field.name for field in fields(cast(Any, method)) if field.name != "name"}
    known = {key: value for key, value in (constants or {}).items() if key in own}
    plain = MethodInfo.of(method(), name)
    try:
        return MethodInfo.read(asdict(MethodInfo.of(method(**known), name))) or plain
    except (TypeError, ValueError):  # a header may hold anything
        return plain


__all__ = [
    "DEFAULT", "DMD", "LCM", "METHODS", "PCM", "TCD", "Method", "MethodInfo", "Progressive", "Stage", "Times",
    "info", "usual",
]  # fmt: skip
