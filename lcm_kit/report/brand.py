"""Your look at four steps: the first picture of a brand run's report, and its numbers in plain words.

Reads `brand.json`, which `evaluation/brand` writes: the base, the styled teacher and the adapter on the same
prompts and noise, held against the brand's own pictures.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any, cast

from lcm_kit import assets
from lcm_kit.config.resolution import read, shown
from lcm_kit.data import reconstruction
from lcm_kit.data.reconstruction import Measured
from lcm_kit.data.records import Record, pictures
from lcm_kit.errors import UserError
from lcm_kit.evaluation import verdicts
from lcm_kit.evaluation.result_shapes import Results
from lcm_kit.evaluation.results import CONTROL, BrandRow, brand_rows, decoded, prompts
from lcm_kit.evaluation.verdicts import LOST, Brand, forgotten
from lcm_kit.io.own_shapes import Interval
from lcm_kit.report import contract
from lcm_kit.report.contract import interval
from lcm_kit.report.shared import image_uri, number, percent, picture_uri
from lcm_kit.samplers import title_of

_SHOWN = 6  # rows of the first picture
_TITLES = {"base": "The base", "styled": "The style, not fast", "adapter": "Your adapter"}


def context(run: Path, found: Results, quality: Results | None = None) -> dict[str, Any]:
    """What the page shows of `evaluation/brand`, pictures as data URIs; `quality`: as in
    `verdicts.brand_headline`.
    """
    head = verdicts.brand_headline(found, quality)
    adherence, size = found["adherence"], read(found["resolution"])
    return {
        "verdict": verdicts.brand_verdict(head, adherence),
        "columns": ["Your pictures", *(title(row) for row in (head.base, head.adapter))],
        "rows": _lines(run, found, head),
        "vae": _drawn_by_the_vae(run),
        "control": _control(run, found, head),
        "control_columns": [title(row) for row in (head.base, head.adapter)],
        "sentences": sentences(head, adherence),
        "contract": _contract(run, found, quality),
        "all": [{**row, "title": title(row)} for row in brand_rows(found)],
        "gauge": gauge(adherence),
        "most": f"{LOST:.0%} of their score" if adherence == "clip" else f"{100 * LOST:g} points",
        "confidence": found["settings"]["confidence"],
        "decoded": decoded(found),
        "seen": found.get("seen"),
        "size": shown(size),
        "shape": None if isinstance(size, int) else " / ".join(map(str, size)),
    }


def title(row: BrandRow) -> str:
    """A row in words: `The base, 50 steps`."""
    return f"{_TITLES[row['name']]}, {row['steps']} step{'s' * (row['steps'] != 1)}"


def how(row: BrandRow) -> str:
    """How a row was drawn, in words: `DDIM, guidance_scale 5`."""
    sampler = title_of(row["sampler"])
    return f"{sampler}, guidance_scale {row['guidance_scale']:g}"


def gauge(adherence: str) -> Any:
    """How a figure of prompts is written: a share as percent, a CLIP score as a number."""
    return number if adherence == "clip" else percent


def sentences(head: Brand, adherence: str) -> list[str]:
    """What was measured, in words, the adapter beside the base; only what there are figures for."""
    show = gauge(adherence)
    told = _in_style(head)
    asked = "nearness to their text (CLIP score)" if adherence == "clip" else "pictures right"
    told += [
        f"{what}: {_beside(head, key, form)}{_nearer(head) if key == 'brand_similarity' else ''}."
        for key, what, form in (
            ("brand_similarity", "Nearness to your pictures (brand similarity, higher is nearer)", number),
            ("brand_adherence", f"Prompts in your style, {asked}", show),
            ("control_adherence", f"Prompts of other things, {asked}", show),
            ("diversity", "Variety between pictures of one prompt", number),
        )
        if figure_of(head.base, key) and figure_of(head.adapter, key)
    ]
    if (lost := forgotten(head, adherence)) is not None:
        which, gap = "prompts", show(lost)
        if head.more:
            which, gap = f"{head.more.n} prompts", percent(lost)
        told.append(
            f"On {which} of other things the adapter is {gap} below the base: it has forgotten some "
            "of what the base can draw; a lower LoRA weight, fewer steps or more varied pictures may help."
        )
    return told


def _in_style(head: Brand) -> list[str]:
    """How many of the prompts of the style show it; nothing where it was not measured."""
    rows = [("your adapter", head.adapter), ("the base", head.base)]
    rows += [(f"the look at {head.styled['steps']} steps", head.styled)] if head.styled else []
    counts = [(name, verdicts.showing(head, row)) for name, row in rows]
    if any(count is None for _, count in counts):
        return []
    named = ", ".join(f"{name} {count}" for name, count in counts)
    return [f"Prompts in your style that show it, nearer to yours than to the base's, of {head.n}: {named}."]


def figure_of(row: BrandRow, key: str) -> Interval | None:
    """A figure of a row by name."""
    return cast(Mapping[str, Interval | None], row)[key]


def _nearer(head: Brand) -> str:
    if (less := head.nearer) is None:
        return ""
    ends = f"{number(less['low'])} to {number(less['high'])}"
    return f"; adapter less base, prompt by prompt, {number(less['difference'])} ({ends})"


def _beside(head: Brand, key: str, show: Any) -> str:
    """A figure of the base, of the adapter and of the look at its full steps."""
    base, mine = (interval(figure_of(row, key), show) for row in (head.base, head.adapter))
    slow = ""
    if head.styled:
        slow = f", the look at {head.styled['steps']} steps {interval(figure_of(head.styled, key), show)}"
    return f"the base {base}, your adapter {mine}{slow}"


# -- Pictures ------------------------------------------------------------------------------------------------


def _lines(run: Path, found: Results, head: Brand) -> list[dict[str, Any]]:
    """A line a prompt: the brand's picture, the base's and the adapter's, and what was asked for."""
    drawn = zip(head.base["pictures"], head.adapter["pictures"], strict=True)
    lines = list(zip(prompts(found)["texts"], drawn, strict=False))[:_SHOWN]
    named = [_picture(run, name) for name in found.get("brand_pictures") or []]
    mine = zip_longest(named[: len(lines)], _any_of(found, len(lines)))
    return [
        {"prompt": prompt, "images": [one or other, *(_picture(run, name) for name in names)]}
        for (prompt, names), (one, other) in zip(lines, mine, strict=True)
    ]


def _any_of(found: Results, count: int) -> list[str | None]:
    """Pictures of the brand's folder, spread over it, for prompts that none was made for."""
    brand = found["settings"].get("brand")
    folder = assets.place(brand or "")
    if not brand or not folder.is_dir():
        return [None] * count
    there = pictures(folder, str(folder))
    return [_shown(there[k * len(there) // count]) for k in range(count)]


def _shown(record: Record) -> str | None:
    """A brand's picture, through the door for pictures that are not ours; None if it cannot be read."""
    try:
        return image_uri(record.load())
    except (OSError, UserError):
        return None


def _control(run: Path, found: Results, head: Brand) -> list[dict[str, Any]]:
    drawn = (row["control_pictures"] for row in (head.base, head.adapter))
    lines = zip(prompts(found, CONTROL)["texts"], *drawn, strict=False)
    return [
        {"prompt": prompt, "images": [_picture(run, name) for name in names]} for prompt, *names in lines
    ][:_SHOWN]


def _contract(run: Path, found: Results, quality: Results | None) -> dict[str, Any] | None:
    """The trigger contract, its pictures as data URIs; None where it was not measured."""
    if (shown := contract.context(found, quality)) is None:
        return None
    drawn = [
        {"prompt": prompt, "images": [_picture(run, name) for name in names]}
        for prompt, *names in shown["pictures"][:_SHOWN]
    ]
    titled = [{**each, "title": title(each["row"])} for each in shown["rows"]]
    columns = ["The base, without the trigger", "Your adapter, without it", "Your adapter, with it"]
    return {**shown, "rows": titled, "pictures": drawn, "columns": columns}


def _drawn_by_the_vae(run: Path) -> dict[str, Any] | None:
    """The pictures that the base's VAE draws worst, beside what it makes of them; None if not measured."""
    if (found := reconstruction.read(run)) is None or not found.figures:
        return None
    told = found.findings()
    return {
        "sentences": [each.sentence for each in told],
        "warned": any(each.weight == "warning" for each in told),
        "size": shown(found.resolution),
        "columns": ["Your picture", "As the base's VAE gives it back"],
        "rows": [
            {
                "prompt": _became(each),
                "images": [
                    _picture(run, f"{reconstruction.FOLDER}/{k}-{side}.png") for side in ("before", "after")
                ],
            }
            for k, each in enumerate(found.figures[: reconstruction.SHOWN])
        ],
    }


def _became(each: Measured) -> str:
    moved = f"{each.ink} comes back as {each.becomes} (CIELAB {each.moved:.1f}); " if each.ink else ""
    return f"{each.id}: {each.psnr:.1f} dB; {moved}{each.lost:.0%} of fine detail lost"


def _picture(run: Path, name: str | None) -> str | None:
    return picture_uri(run / name) if name and (run / name).is_file() else None
