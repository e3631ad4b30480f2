"""Your look at four steps: the first picture of a brand run's report, and its numbers in plain words.

Reads `brand.json`, which `evaluation/brand` writes: the base, the styled teacher and the adapter on the same
prompts and noise, held against the brand's own pictures.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lcm_kit.report.shared import SAMPLERS, number, percent, picture_uri

FILE = "brand.json"
LOST = 0.05  # of the control prompts' share: more than this is said to be forgotten
_STEPS = 4  # of the adapter in the first picture
_SHOWN = 6  # rows of the first picture
_TITLES = {"base": "The base", "styled": "The look, not fast", "adapter": "Your adapter"}
Row = Mapping[str, Any]


def read(run: Path) -> dict[str, Any] | None:
    """What `evaluation/brand` found for `run`; None if it did not run, or holds no adapter."""
    file = run / FILE
    if not file.is_file():
        return None
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found if {"base", "adapter"} <= {row["name"] for row in found["rows"]} else None


def context(run: Path) -> dict[str, Any] | None:
    """What the page shows of `brand.json`, pictures as data URIs; None where there is none."""
    if (found := read(run)) is None:
        return None
    head = headline(found["rows"])
    return {
        "verdict": verdict(head),
        "columns": ["Your pictures", *(title(head[name]) for name in ("base", "adapter"))],
        "rows": _lines(run, found, head),
        "control": _control(run, found, head),
        "control_columns": [title(head[name]) for name in ("base", "adapter")],
        "sentences": sentences(head, found.get("adherence")),
        "all": [{**row, "title": title(row)} for row in found["rows"]],
        "read": found.get("adherence") == "attributes",
        "gauge": gauge(found.get("adherence")),
    }


def headline(rows: Sequence[Row]) -> dict[str, Any]:
    """The rows to compare: `base`, `styled` (None if there is none), and `adapter`, the one nearest 4 steps."""
    of = {name: [row for row in rows if row["name"] == name] for name in _TITLES}
    adapter = min(of["adapter"], key=lambda row: abs(row["steps"] - _STEPS))
    return {"base": of["base"][0], "styled": next(iter(of["styled"]), None), "adapter": adapter}


def title(row: Row) -> str:
    """A row in words: `The base, 50 steps`."""
    return f"{_TITLES[row['name']]}, {row['steps']} step{'s' * (row['steps'] != 1)}"


def how(row: Row) -> str:
    """How a row was drawn, in words: `DDIM, guidance_scale 5`."""
    sampler = SAMPLERS.get(row["sampler"], row["sampler"])
    return f"{sampler}, guidance_scale {row['guidance_scale']:g}"


def verdict(head: Mapping[str, Any]) -> str:
    """Yes: nearer to the brand than the base beyond its interval, at most 5 points of the control lost."""
    base, adapter = head["base"], head["adapter"]
    if not (base["brand_similarity"] and adapter["brand_similarity"]):
        return "Judge by eye"
    if adapter["brand_similarity"]["low"] <= base["brand_similarity"]["high"]:
        return "No"
    return "In part" if (lost(head) or 0.0) > LOST else "Yes"


def lost(head: Mapping[str, Any]) -> float | None:
    """How much of the control prompts' figure the adapter loses against the base; None if not measured."""
    base, adapter = (head[name]["control_adherence"] for name in ("base", "adapter"))
    return round(base["value"] - adapter["value"], 9) if base and adapter else None


def gauge(adherence: str | None) -> Any:
    """How a figure of prompts is written: a share as percent, a CLIP score as a number."""
    return number if adherence == "clip" else percent


def interval(figure: Mapping[str, float] | None, show: Any = number) -> str:
    """A figure with its interval: `0.62 (0.58 to 0.66)`; a dash where it was not measured."""
    if figure is None:
        return "–"
    return f"{show(figure['value'])} ({show(figure['low'])} to {show(figure['high'])})"


def sentences(head: Mapping[str, Any], adherence: str | None = None) -> list[str]:
    """What was measured, in words, the adapter beside the base; only what there are figures for."""
    base, styled, adapter = head["base"], head["styled"], head["adapter"]
    show, told = gauge(adherence), []
    asked = "nearness to its text (CLIP score)" if adherence == "clip" else "pictures right"

    def beside(key: str, show: Any) -> str:
        text = f"the base {interval(base[key], show)}, your adapter {interval(adapter[key], show)}"
        return text + (f", the look at {styled['steps']} steps {interval(styled[key], show)}" if styled else "")

    for key, what, form in (
        ("brand_similarity", "Nearness to your pictures (brand similarity, higher is nearer)", number),
        ("brand_adherence", f"Prompts in your look, {asked}", show),
        ("control_adherence", f"Prompts of other things, {asked}", show),
        ("diversity", "Variety between pictures of one prompt", number),
    ):
        if base[key] and adapter[key]:
            told.append(f"{what}: {beside(key, form)}.")
    if (gone := lost(head)) is not None and gone > LOST:
        told.append(
            f"On prompts of other things the adapter is {show(gone)} below the base: it has forgotten some of "
            "what the base can draw. A lower LoRA weight, fewer steps or general pictures beside yours help."
        )
    return told


# -- Pictures ------------------------------------------------------------------------------------------------


def _lines(run: Path, found: Mapping[str, Any], head: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A line a prompt: the brand's picture, the base's and the adapter's, and what was asked for."""
    brand = [*found["brand_pictures"], *[None] * len(found["prompts"])]
    lines = zip(found["prompts"], brand, head["base"]["pictures"], head["adapter"]["pictures"], strict=False)
    return [
        {"prompt": prompt, "images": [_picture(run, name) for name in names]} for prompt, *names in lines
    ][:_SHOWN]


def _control(run: Path, found: Mapping[str, Any], head: Mapping[str, Any]) -> list[dict[str, Any]]:
    drawn = (head[name].get("control_pictures") or [] for name in ("base", "adapter"))
    lines = zip(found.get("control_prompts") or [], *drawn, strict=False)
    return [
        {"prompt": prompt, "images": [_picture(run, name) for name in names]} for prompt, *names in lines
    ][:_SHOWN]


def _picture(run: Path, name: str | None) -> str | None:
    return picture_uri(run / name) if name and (run / name).is_file() else None
