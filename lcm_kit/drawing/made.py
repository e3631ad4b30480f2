"""How a picture was made, as text in its PNG file: A1111's `parameters`, and all of it as JSON.

A1111 (1.10) writes the prompt, a line that begins with `Negative prompt:`, and a last line of `Name: value`
behind commas. ComfyUI reads that too, where a picture is dropped onto it: from the last line that begins with
`Steps:`. Its older frontends (1.58.1 does better) read nothing where no line begins with `Negative prompt:`,
so that one is always written.

Each prompt is one line, so none can begin a line of its own, but the first. What apps read in a prompt, and
was drawn as plain words, is spelled so that it is plain there too: in other spaces and letters, which make
the same tokens (CLIP's are the same for both), and with a backslash before a bracket.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from unicodedata import category

from lcm_kit import __version__, samplers
from lcm_kit.bases.emphasis import Weighted, read
from lcm_kit.drawing import decoders
from lcm_kit.drawing.pictures import slug
from lcm_kit.errors import UserError
from lcm_kit.io.files import sha256_file
from lcm_kit.lora.locate import adapter_file, called

PARAMETERS, OWN = "parameters", "lcm_kit"  # keywords in the PNG
_FIELD = re.compile(r"(negative prompt|steps)(?=:)", re.IGNORECASE)  # begins a part of A1111's text
_FILE = re.compile(r"<(?=\w+:)")  # <lora:NAME:1> loads one
_WORDS = re.compile(r"\b(AND|BREAK)\b")
_BRACKETS = re.compile(r"[\\()\[\]]")
_OF_VALUES = re.compile(r'[,:"{}<>\\]')  # what a value of A1111's line, or a name in a prompt, cannot hold


class Lora(NamedTuple):
    """One that a picture may have been drawn with."""

    title: str  # as apps call it
    sha256: str  # of its file


@dataclass(frozen=True)
class Source:
    """What draws: `base` as `base_name` has it, and `loras` by the names that settings have for them."""

    base: str
    loras: Mapping[str, Lora] = field(default_factory=dict)
    decoder: str | None = None  # the name of what decodes in the VAE's place

    @property
    def decoded(self) -> dict[str, str]:
        """What a PNG and a record say of what decodes in the VAE's place: nothing of the VAE itself."""
        return {} if self.decoder is None else {"decoder": self.decoder}

    def record(self, settings: Mapping[str, Any], index: int = 0) -> dict[str, Any]:
        """All that is known of picture `index` of a request of these settings, as JSON."""
        on = settings.get("adapters") or {}
        return {
            "lcm_kit": __version__, "base": self.base, **self.decoded,
            "adapters": {name: self.loras[name].sha256 for name in on}, "index": index,
            "settings": dict(settings),
        }  # fmt: skip

    def told(
        self,
        settings: Mapping[str, Any],
        size: tuple[int, int],
        index: int = 0,
        *,
        emphasis: bool | None = None,
        prompts: bool = True,
    ) -> dict[str, str]:
        """The text of a PNG file of (width, height) by keyword.

        `settings`: as the server answers with them, `prompt` and `negative_prompt`, `seed`, `count`,
        `sampler`, `steps`, `guidance_scale`, weights by name in `adapters`, and an edit's `strength` among
        them. `emphasis`: how its prompts were read (`emphasis.read`). Without `prompts` they are left out.
        """
        if not prompts:
            settings = {key: value for key, value in settings.items() if "prompt" not in key}
        own = json.dumps(self.record(settings, index))
        return {PARAMETERS: self._parameters(settings, size, index, emphasis), OWN: own}

    def _parameters(
        self, settings: Mapping[str, Any], size: tuple[int, int], index: int, emphasis: bool | None
    ) -> str:
        """As A1111 writes it."""
        words = [for_apps(settings.get("prompt") or "", emphasis)]
        for name, weight in (settings.get("adapters") or {}).items():
            words.append(f"<lora:{_value(self.loras[name].title)}:{_number(weight)}>")
        sampler, schedule = _sampler(settings["sampler"])
        count = settings.get("count", 1)
        strength = settings.get("strength")
        facts = {
            "Steps": settings["steps"], "Sampler": sampler, "Schedule type": schedule,
            "CFG scale": _number(settings["guidance_scale"]), "Seed": settings["seed"],
            "Size": f"{size[0]}x{size[1]}",
            "Model": _value(Path(self.base.removeprefix("asset:")).name.removesuffix(".safetensors")),
            "Denoising strength": None if strength is None else _number(strength),
            "Batch size": count if count > 1 else None, "Batch pos": index if count > 1 else None,
        }  # fmt: skip
        line = ", ".join(f"{name}: {value}" for name, value in facts.items() if value not in (None, ""))
        against = for_apps(settings.get("negative_prompt") or "", emphasis)
        return f"{' '.join(filter(None, words))}\nNegative prompt: {against}\n{line}"


def of_drawing(base: str, use: Mapping[str, Any]) -> tuple[Source, dict[str, Any]]:
    """What draws with `use`, the settings of `sample.draw_images`; and of them those that `told` tells of."""
    loras, weights = {}, {}
    if use["adapter"] is not None:
        title = called(use["adapter"])
        loras[slug(title)] = Lora(title, sha256_file(adapter_file(use["adapter"])))
        weights[slug(title)] = use["lora_weight"]
    names = "negative_prompt", "seed", "sampler", "steps", "guidance_scale"
    decoder = None if use["decoder"] is None else decoders.said(use["decoder"])
    source = Source(base_name(base), loras, decoder)
    return source, {name: use[name] for name in names} | {"adapters": weights}


def base_name(base: str) -> str:
    """A base as others may know of it: of what lies in a folder its name alone."""
    return Path(base).name if Path(base).exists() else base


def for_apps(prompt: str, emphasis: bool | None = None) -> str:
    """A prompt on one line, as A1111 and ComfyUI read what was drawn by `emphasis.read(prompt, emphasis)`."""
    try:
        found = read(prompt, emphasis)
    except UserError:
        found = prompt  # what cannot be read was not drawn so either
    if isinstance(found, Weighted):
        text = prompt
    else:
        text = _BRACKETS.sub(r"\\\g<0>", _WORDS.sub(lambda word: word[0].lower(), found))
    return _FILE.sub("< ", _FIELD.sub(r"\1 ", _line(text)))


def _line(text: str) -> str:
    """On one line, without what is no text."""
    return "".join(sign for sign in " ".join(text.split()) if category(sign) not in ("Cc", "Cs"))


def _value(text: str) -> str:
    """A name that ends no field, and begins none."""
    return " ".join(_OF_VALUES.sub(" ", _line(text)).split())


def _number(value: float) -> str:
    """With all of its digits; whole numbers without a point, as A1111 has them."""
    return str(int(value)) if value == int(value) else repr(float(value))


def _sampler(name: str) -> tuple[str, str | None]:
    """Sampler and schedule type; what a name says behind its colon stands in the JSON alone."""
    entry = samplers.sampler_of(name)
    return entry.in_pictures or (_value(entry.title), None)
