"""What is known of how a LoRA was made: from its run, or back from the metadata of a file."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lcm_kit import methods
from lcm_kit.methods import METHODS, MethodInfo

SAMPLERS = {"lcm": "LCM", "tcd": "TCD", "ddim": "DDIM, trailing timesteps"}  # as apps call them
PREFIX = "lcm_kit."  # of the metadata keys that hold what only this kit knows


@dataclass(frozen=True)
class Recommended:
    """Settings that were measured to serve best; all None where none can be recommended."""

    sentence: str
    sampler: str | None
    steps: int | None
    guidance_scale: float | None
    lora_weight: float | None
    reasons: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    part: str | None = None  # of a merged file what was measured, alone; None: the file itself

    @property
    def sampler_name(self) -> str:
        """As apps call it."""
        return SAMPLERS.get(self.sampler or "", "")


@dataclass(frozen=True)
class Facts:
    """What is known of how a LoRA was made; None where nothing is."""

    title: str
    base: str | None = None  # as the user called it: a hub id, `asset:NAME` or a folder
    base_hash: str | None = None
    method: str | None = None  # of few-step distillation; None for a plain LoRA
    method_info: MethodInfo | None = None  # of a method that the kit does not know by its name
    steps: int | None = None  # optimizer steps
    guidance: tuple[float, float] | None = None  # baked in, lowest and highest, by `metadata.CONVENTION`
    data_fingerprint: str | None = None
    resolution: int | None = None  # pixels along one side of the training images
    trigger: str | None = None  # what prompts say to get the look
    date: str | None = None  # ISO 8601
    kit_version: str | None = None  # that trained it
    parents: tuple[str, ...] = ()  # the files that it was merged or converted from
    recommended: Recommended | None = None  # by a guidance sweep of these weights

    @property
    def distilled(self) -> MethodInfo | None:
        """What is known of the method; None for a plain LoRA."""
        return self.method_info or (methods.info(self.method) if self.method else None)

    @property
    def student(self) -> MethodInfo:
        """How it is drawn in few steps: what does not say how it was made is taken for an LCM-LoRA."""
        return self.distilled or methods.DEFAULT


def facts_of_run(adapter_facts: Mapping[str, Any], title: str) -> Facts:
    """From the content of a run's `adapter/adapter.json`; `data` and `date` are missing in old runs."""

    def section(name: str) -> Mapping[str, Any]:
        return adapter_facts.get(name) or {}

    guidance = section("guidance")
    return Facts(
        title=title,
        base=section("base").get("path"),
        base_hash=section("base").get("hash"),
        method=section("method").get("name"),
        method_info=_method_info(section("method").get("name"), adapter_facts.get("method_info")),
        steps=adapter_facts.get("step", adapter_facts.get("steps")),  # of the weights, then of the run
        guidance=(float(guidance["min"]), float(guidance["max"])) if guidance else None,
        data_fingerprint=section("data").get("fingerprint"),
        resolution=section("data").get("resolution"),
        trigger=section("data").get("trigger"),
        date=adapter_facts.get("date"),
        kit_version=adapter_facts.get("kit_version"),
    )


def declared_modules(metadata: Mapping[str, str]) -> int | None:
    """How many modules a file of ours was written with; None if the header does not say."""
    return _whole(metadata.get(PREFIX + "modules"))


def facts_from(metadata: Mapping[str, str], title: str) -> Facts:
    """The facts back from a header: all of them from one of ours, else what kohya's keys and ModelSpec tell.

    `title` is the caller's, because a stranger's header can say anything and a title becomes a file's name. A
    value that does not parse counts as unknown.
    """
    known = said(metadata)
    if PREFIX + "metadata" in known:
        own = {key.removeprefix(PREFIX): value for key, value in known.items() if key.startswith(PREFIX)}
        low, high = _number(own.get("guidance_min")), _number(own.get("guidance_max"))
        return Facts(
            title=title,
            base=own.get("base"),
            base_hash=own.get("base_hash"),
            method=own.get("method"),
            method_info=_method_info(own.get("method"), _json(own.get("method_info"))),
            steps=_whole(own.get("steps")),
            guidance=None if low is None or high is None else (low, high),
            data_fingerprint=own.get("data_fingerprint"),
            resolution=_square(known.get("ss_resolution")),
            trigger=known.get("modelspec.trigger_phrase"),
            date=known.get("modelspec.date"),
            kit_version=own.get("kit_version"),
            parents=_names(own.get("parents")),
            recommended=_recommended(own),
        )
    merged = known.get("modelspec.merged_from")
    return Facts(
        title=title,
        base=known.get("ss_sd_model_name"),
        steps=_whole(known.get("ss_steps")),
        resolution=_square(known.get("ss_resolution") or known.get("modelspec.resolution")),
        trigger=known.get("modelspec.trigger_phrase"),
        date=known.get("modelspec.date"),
        parents=tuple(merged.split(", ")) if merged else (),
    )


def _recommended(own: Mapping[str, str]) -> Recommended | None:
    """What a sweep recommended for the weights of a file, back from its header."""
    sampler, steps = own.get("sampler"), _whole(own.get("sampling_steps"))
    scale, weight = _number(own.get("sampling_guidance_scale")), _number(own.get("lora_weight"))
    if "recommended" not in own:  # what else it says of sampling holds for the method in general
        return None
    if sampler not in SAMPLERS or not steps or steps > 1000 or scale is None or scale < 1 or weight is None:
        return Recommended(own["recommended"], None, None, None, None)
    return Recommended(own["recommended"], sampler, steps, scale, weight, part=own.get("recommended_for"))


def said(metadata: Mapping[str, str]) -> dict[str, str]:
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


def _square(text: str | None) -> int | None:
    """The side, from "(512, 512)", "512,512", "512x512" or "512"; None for other than squares."""
    numbers = set(re.findall(r"[0-9]+", text or ""))
    return _whole(numbers.pop()) if len(numbers) == 1 else None


def _method_info(name: str | None, said: Any) -> MethodInfo | None:
    """What a file says of a method that is not the kit's; None where it says nothing that can be used."""
    found = None if name in METHODS else MethodInfo.read(said)
    return found if found and found.name == name and set(found.samplers) <= SAMPLERS.keys() else None


def _json(text: str | None) -> Any:
    try:
        return json.loads(text or "null")
    except (ValueError, RecursionError):
        return None


def _names(text: str | None) -> tuple[str, ...]:
    names = _json(text) or []
    fine = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return tuple(names) if fine else ()
