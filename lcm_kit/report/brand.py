"""Your look at four steps: the first picture of a brand run's report, and its numbers in plain words.

Reads `brand.json`, which `evaluation/brand` writes: the base, the styled teacher and the adapter on the same
prompts and noise, held against the brand's own pictures.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

from lcm_kit import assets, own_files, result_shapes
from lcm_kit.data.records import Record, pictures
from lcm_kit.errors import UserError
from lcm_kit.report.shared import image_uri, number, percent, picture_uri
from lcm_kit.samplers import title_of

FILE = "brand.json"
LOST = 0.05  # of the control prompts: losing a larger share of them, or of their CLIP score, is forgetting
_STEPS = 4  # of the adapter in the first picture
_SHOWN = 6  # rows of the first picture
_TITLES = {"base": "The base", "styled": "The look, not fast", "adapter": "Your adapter"}
Row = Mapping[str, Any]


def read(run: Path) -> result_shapes.Brand | None:
    """What `evaluation/brand` found for `run`; None if it did not run, or holds no adapter."""
    file = run / FILE
    if not file.is_file():
        return None
    found = own_files.read_json(file, result_shapes.Brand, "run `lcm-kit evaluate evaluation/brand` again")
    return found if compares(found) else None


def compares(found: Mapping[str, Any]) -> bool:
    """Whether a brand.json has both the base and an adapter to hold against it."""
    return {"base", "adapter"} <= {row["name"] for row in found["rows"]}


def context(run: Path, found: Mapping[str, Any], results: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What the page shows of what `read` found, pictures as data URIs; `results`: as in `headline`."""
    head = headline(found, results)
    return {
        "verdict": verdict(head, adherence := found.get("adherence")),
        "columns": ["Your pictures", *(title(head[name]) for name in ("base", "adapter"))],
        "rows": _lines(run, found, head),
        "control": _control(run, found, head),
        "control_columns": [title(head[name]) for name in ("base", "adapter")],
        "sentences": sentences(head, adherence),
        "all": [{**row, "title": title(row)} for row in found["rows"]],
        "gauge": gauge(adherence),
        "most": f"{LOST:.0%} of their score" if adherence == "clip" else f"{100 * LOST:g} points",
        "confidence": found.get("confidence", 0.95),
    }


def headline(found: Mapping[str, Any], results: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The rows of a brand.json to compare: `base`, `styled` (None if there is none), the `adapter` nearest 4
    steps; `less`, the adapter's figures less the base's on the same prompts and noise; and `more`, the shares
    of right pictures of base and adapter on the prompts of a results.json, None unless it has more of them.
    """
    of = {name: [row for row in found["rows"] if row["name"] == name] for name in _TITLES}
    adapter = min(of["adapter"], key=lambda row: abs(row["steps"] - _STEPS))
    place = adapter["steps"], "base"
    less = next(each for each in found["differences"] if (each["steps"], each["less"]) == place)
    styled = next(iter(of["styled"]), None)
    more = _more(adapter["steps"], results, len(found.get("control_prompts") or []))
    return {"base": of["base"][0], "styled": styled, "adapter": adapter, "less": less, "more": more}


def _more(steps: int, results: Mapping[str, Any] | None, known: int) -> dict[str, Any] | None:
    rows = results["rows"] if results and results["n"] > known else []
    shares = {row["name"]: row["attribute_accuracy"] for row in rows
              if row["name"] == "teacher" or (row["name"], row["steps"]) == ("student", steps)}  # fmt: skip
    base, adapter = shares.get("teacher"), shares.get("student")
    if results is None or base is None or adapter is None:
        return None
    return {"base": base, "adapter": adapter, "n": results["n"]}


def title(row: Row) -> str:
    """A row in words: `The base, 50 steps`."""
    return f"{_TITLES[row['name']]}, {row['steps']} step{'s' * (row['steps'] != 1)}"


def how(row: Row) -> str:
    """How a row was drawn, in words: `DDIM, guidance_scale 5`."""
    sampler = title_of(row["sampler"])
    return f"{sampler}, guidance_scale {row['guidance_scale']:g}"


def verdict(head: Mapping[str, Any], adherence: str | None = None) -> str:
    """Yes: nearer to the brand than the base, beyond the interval of the paired difference, and the control
    prompts not forgotten.
    """
    nearer = head["less"]["brand_similarity"]
    if nearer is None:
        return "Judge by eye"
    if nearer["low"] <= 0:
        return "No"
    return "In part" if forgotten(head, adherence) else "Yes"


def forgotten(head: Mapping[str, Any], adherence: str | None = None) -> float | None:
    """How far the adapter is below the base on control prompts, if that is more than `LOST`; else None.

    Of a share that is 5 points, of a CLIP score 5% of the base's. By the larger number of prompts, where a
    quality evaluation has more of them.
    """
    if more := head["more"]:
        lost = float(more["base"] - more["adapter"])
        return lost if lost > LOST + 1e-9 else None
    base, adapter = (head[name]["control_adherence"] for name in ("base", "adapter"))
    if not (base and adapter):
        return None
    lost = float(base["value"] - adapter["value"])
    most = LOST * base["value"] if adherence == "clip" else LOST
    return lost if lost > most + 1e-9 else None


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
    show = gauge(adherence)
    asked = "nearness to their text (CLIP score)" if adherence == "clip" else "pictures right"
    told = [
        f"{what}: {_beside(head, key, form)}{_nearer(head) if key == 'brand_similarity' else ''}."
        for key, what, form in (
            ("brand_similarity", "Nearness to your pictures (brand similarity, higher is nearer)", number),
            ("brand_adherence", f"Prompts in your look, {asked}", show),
            ("control_adherence", f"Prompts of other things, {asked}", show),
            ("diversity", "Variety between pictures of one prompt", number),
        )
        if head["base"][key] and head["adapter"][key]
    ]
    if (lost := forgotten(head, adherence)) is not None:
        which, gap = "prompts", show(lost)
        if more := head["more"]:
            which, gap = f"{more['n']} prompts", percent(lost)
        told.append(
            f"On {which} of other things the adapter is {gap} below the base: it has forgotten some "
            "of what the base can draw; a lower LoRA weight, fewer steps or more varied pictures may help."
        )
    return told


def _nearer(head: Mapping[str, Any]) -> str:
    if (less := head["less"]["brand_similarity"]) is None:
        return ""
    ends = f"{number(less['low'])} to {number(less['high'])}"
    return f"; adapter less base, prompt by prompt, {number(less['difference'])} ({ends})"


def _beside(head: Mapping[str, Any], key: str, show: Any) -> str:
    """A figure of the base, of the adapter and of the look at its full steps."""
    base, styled, adapter = (head[name] for name in ("base", "styled", "adapter"))
    slow = f", the look at {styled['steps']} steps {interval(styled[key], show)}" if styled else ""
    return f"the base {interval(base[key], show)}, your adapter {interval(adapter[key], show)}{slow}"


# -- Pictures ------------------------------------------------------------------------------------------------


def _lines(run: Path, found: Mapping[str, Any], head: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A line a prompt: the brand's picture, the base's and the adapter's, and what was asked for."""
    drawn = zip(head["base"]["pictures"], head["adapter"]["pictures"], strict=True)
    lines = list(zip(found["prompts"], drawn, strict=False))[:_SHOWN]
    named = [_picture(run, name) for name in found["brand_pictures"]]
    mine = zip_longest(named[: len(lines)], _any_of(found, len(lines)))
    return [
        {"prompt": prompt, "images": [one or other, *(_picture(run, name) for name in names)]}
        for (prompt, names), (one, other) in zip(lines, mine, strict=True)
    ]


def _any_of(found: Mapping[str, Any], count: int) -> list[str | None]:
    """Pictures of the brand's folder, spread over it, for prompts that none was made for."""
    folder = assets.place(found.get("brand") or "")
    if not found.get("brand") or not folder.is_dir():
        return [None] * count
    there = pictures(folder, str(folder))
    return [_shown(there[k * len(there) // count]) for k in range(count)]


def _shown(record: Record) -> str | None:
    """A brand's picture, through the door for pictures that are not ours; None if it cannot be read."""
    try:
        return image_uri(record.load())
    except (OSError, UserError):
        return None


def _control(run: Path, found: Mapping[str, Any], head: Mapping[str, Any]) -> list[dict[str, Any]]:
    drawn = (head[name].get("control_pictures") or [] for name in ("base", "adapter"))
    lines = zip(found.get("control_prompts") or [], *drawn, strict=False)
    return [
        {"prompt": prompt, "images": [_picture(run, name) for name in names]} for prompt, *names in lines
    ][:_SHOWN]


def _picture(run: Path, name: str | None) -> str | None:
    return picture_uri(run / name) if name and (run / name).is_file() else None
