"""How other programs read the text of a PNG file, written out slowly from what they document and do.

A1111 1.10 (`parameters`, as its "PNG Info" shows it) and ComfyUI's frontend, for a picture dropped onto it.
"""

from __future__ import annotations

import json
import struct
import zlib
from dataclasses import dataclass, field


def chunks(png: bytes) -> list[tuple[str, bytes]]:
    """The chunks of a file, each with its checksum right."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    found, at = [], 8
    while at < len(png):
        (length,) = struct.unpack(">I", png[at : at + 4])
        kind, content = png[at + 4 : at + 8], png[at + 8 : at + 8 + length]
        assert struct.unpack(">I", png[at + 8 + length : at + 12 + length]) == (zlib.crc32(kind + content),)
        found.append((kind.decode("ascii"), content))
        at += 12 + length
    assert found[-1] == ("IEND", b"")
    return found


def texts(png: bytes, *, latin: str = "latin-1") -> dict[str, str]:
    """By keyword. `latin`: what tEXt is decoded as: Latin-1 by the format, UTF-8 by ComfyUI."""
    found = {}
    for kind, content in chunks(png):
        if kind == "tEXt":
            keyword, _, text = content.partition(b"\0")
            found[keyword.decode("latin-1")] = text.decode(latin)
        elif kind == "iTXt":
            keyword, _, rest = content.partition(b"\0")
            assert rest[:2] == b"\0\0", "compressed"
            _, _, rest = rest[2:].partition(b"\0")
            found[keyword.decode("latin-1")] = rest.partition(b"\0")[2].decode("utf-8")
        else:
            assert kind in ("IHDR", "IDAT", "IEND"), kind
    return found


@dataclass
class Read:
    """What an app takes from a picture."""

    prompt: str
    negative: str
    fields: dict[str, str]
    loras: list[tuple[str, float]] = field(default_factory=list)


def a1111(text: str) -> Read:
    """The last line has the fields, if it has three; each other line belongs to one of the prompts."""
    *lines, last = text.strip().split("\n")
    fields = _fields(last)
    if len(fields) < 3:
        lines, fields = [*lines, last], {}
    prompts: list[list[str]] = [[], []]
    which = 0
    for line in (each.strip() for each in lines):
        if line.startswith("Negative prompt:"):
            which, line = 1, line.removeprefix("Negative prompt:").strip()
        prompts[which].append(line)
    prompt, loras = _without_files("\n".join(prompts[0]))
    return Read(prompt, "\n".join(prompts[1]), fields, loras)


def _fields(line: str) -> dict[str, str]:
    """`Name: value, ...`; a value may be a string of JSON's."""
    found, at = {}, 0
    while at < len(line):
        colon = line.find(":", at)
        if colon < 0:
            break
        name, at = line[at:colon].strip(), colon + 1
        while line[at : at + 1] == " ":
            at += 1
        if line[at : at + 1] == '"':
            value, at = json.JSONDecoder().raw_decode(line, at)
            at = line.find(",", at) + 1 or len(line)
        else:
            end = line.find(",", at)
            end = len(line) if end < 0 else end
            value, at = line[at:end], end + 1
        if "," in name:  # what stands before its last comma is no field
            name = name.rpartition(",")[2].strip()
        found[name] = value
    return found


def _without_files(prompt: str) -> tuple[str, list[tuple[str, float]]]:
    """The prompt without every `<kind:name:weight>`, of which `kind` is a word, and those that are LoRAs."""
    left, loras, at = "", [], 0
    while at < len(prompt):
        end = prompt.find(">", at)
        kind, colon, rest = (
            prompt[at + 1 : end].partition(":") if prompt[at] == "<" and end > 0 else ("",) * 3
        )
        if colon and rest and kind.replace("_", "a").isalnum():
            assert kind == "lora", kind
            name, _, weight = rest.partition(":")
            loras.append((name, float(weight)))
            at = end + 1
        else:
            left, at = left + prompt[at], at + 1
    return left.strip(), loras


def comfyui(text: str) -> Read | None:
    """As older frontends do: None, it opens nothing. A value ends at a second colon."""
    steps = text.rfind("\nSteps:")
    if steps < 0:
        return None
    line = text[steps:].split("\n")[1]
    negative = text.rfind("\nNegative prompt:", 0, steps + len("\nNegative prompt:"))
    if negative < 0:
        return None
    fields = {name.lower(): value.partition(":")[0] for name, value in _fields(line).items()}
    prompt, loras = _without_files(text[:negative].strip())
    return Read(prompt, text[negative + len("\nNegative prompt: ") : steps].strip(), fields, loras)
