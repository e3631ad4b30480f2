"""Distillation methods, one file each; a name in `METHODS` is the `method.name` of a config."""

from __future__ import annotations

from lcm_kit.core.methods.base import Method, MethodInfo, Times, usual
from lcm_kit.core.methods.lcm import LCM

METHODS: dict[str, type[Method]] = {LCM.name: LCM}
DEFAULT = MethodInfo.of(LCM, LCM.name)  # of a config, and of a LoRA that does not say how it was made


def info(name: str | None) -> MethodInfo:
    """Of the method of the kit's that has this name; of another its name is all that is known."""
    if name is None:
        return DEFAULT
    return MethodInfo.of(METHODS[name], name) if name in METHODS else MethodInfo(name, name)


__all__ = ["DEFAULT", "LCM", "METHODS", "Method", "MethodInfo", "Times", "info", "usual"]
