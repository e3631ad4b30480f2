"""Distillation methods, one file each; a name in `METHODS` is the `method.name` of a config."""

from __future__ import annotations

from lcm_kit.methods.base import Method, Times
from lcm_kit.methods.lcm import LCM

METHODS: dict[str, type[LCM]] = {"lcm": LCM}

__all__ = ["LCM", "METHODS", "Method", "Times"]
