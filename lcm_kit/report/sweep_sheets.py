"""A sweep's cells in words, in groups, and as contact sheets: guidance (rows) by steps (columns)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lcm_kit.evaluation.result_shapes import Results
from lcm_kit.evaluation.results import prompt_of, prompts
from lcm_kit.report.shared import picture_uri
from lcm_kit.samplers import title_of

Cell = dict[str, Any]  # as in results.json, with `number` (its place there) and `shots`
Group = tuple[str | None, str, float]  # adapter, sampler, LoRA weight
_ALL_PICTURES = 13_000_000  # bytes of all pictures of a page, before base64 adds a third: below 20 MB in all


@dataclass(frozen=True)
class Sheet:
    """A grid of cells; None where a combination was not swept."""

    title: str
    corner: str  # what the rows and the columns are
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell | None, ...]], ...]

    def holds(self, name: str | None) -> bool:
        """Whether the cell of this id is in it."""
        return any(cell is not None and cell["id"] == name for _, row in self.rows for cell in row)


# -- In words ------------------------------------------------------------------------------------------------


def sampler(cell: Mapping[str, Any]) -> str:
    """The sampler's name as people know it."""
    return title_of(cell["sampler"])


def describe(cell: Mapping[str, Any]) -> str:
    """All settings of a cell in words: `quickstart: LCM, 4 steps, guidance_scale 1.5, LoRA weight 1`."""
    steps = f"{cell['steps']} step" + ("s" if cell["steps"] != 1 else "")
    who = {"teacher": "teacher", "plain": "base"}.get(cell["kind"], cell["adapter"])
    weight = f", LoRA weight {cell['lora_weight']:g}" if cell["adapter"] is not None else ""
    return f"{who}: {sampler(cell)}, {steps}, guidance_scale {cell['guidance_scale']:g}{weight}"


def group(cell: Mapping[str, Any]) -> Group:
    """What a cell's sheet and its plots have in common."""
    return cell["adapter"], cell["sampler"], cell["lora_weight"]


def groups(cells: Iterable[Cell]) -> dict[Group, list[Cell]]:
    """Cells by `group`, in the order in which they come."""
    found: dict[Group, list[Cell]] = {}
    for cell in cells:
        found.setdefault(group(cell), []).append(cell)
    return found


def title(of: Group, cells: Sequence[Cell]) -> str:
    """The name of a group: `quickstart: LCM, LoRA weight 1`."""
    adapter, _, weight = of
    if adapter is None:
        return f"The base without an adapter: {sampler(cells[0])}"
    return f"{adapter}: {sampler(cells[0])}, LoRA weight {weight:g}"


def families(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """Cells by who drew them, for the plot of quality against cost: adapter and sampler."""
    found: dict[str, list[Cell]] = {}
    for cell in cells:
        who = {"teacher": "teacher", "plain": "base"}.get(cell["kind"], cell["adapter"])
        found.setdefault(f"{who}, {sampler(cell)}", []).append(cell)
    return found


# -- Contact sheets ------------------------------------------------------------------------------------------


def sheets(cells: Sequence[Cell]) -> list[Sheet]:
    """The teacher over guidance, each adapter's grids, its LoRA weights, and the base's plain samplers."""
    teachers = sorted(of_kind(cells, "teacher"), key=lambda cell: cell["guidance_scale"])
    scales = tuple(f"{cell['guidance_scale']:g}" for cell in teachers)
    first = f"Teacher: {sampler(teachers[0])}, {teachers[0]['steps']} steps" if teachers else ""
    students = of_kind(cells, "student")
    varied = weighed(students)
    plain = groups(of_kind(cells, "plain"))
    inside = {cell["id"] for line in varied.values() for cell in line}
    return [
        *([Sheet(first, "guidance →", scales, (("", tuple(teachers)),))] if teachers else []),
        *(
            _grid(title(of, line), line, "guidance_scale")
            for of, line in groups(students).items()
            if len(line) > 1 or line[0]["id"] not in inside
        ),
        *(_grid(name, line, "lora_weight") for name, line in varied.items()),
        *(_grid(title(of, line), line, "guidance_scale") for of, line in plain.items()),
    ]  # fmt: skip


def of_kind(cells: Iterable[Cell], kind: str) -> list[Cell]:
    """Those of one kind."""
    return [cell for cell in cells if cell["kind"] == kind]


def weighed(students: Sequence[Cell]) -> dict[str, list[Cell]]:
    """Where more than one LoRA weight was swept: the cells over it by name, for each adapter and sampler.

    Of several guidance_scales the one with most such cells, then the lowest; and only steps that were drawn
    at several weights.
    """
    lines: dict[tuple[str, str, float], dict[int, list[Cell]]] = {}
    for cell in students:
        at = lines.setdefault((cell["adapter"], cell["sampler"], cell["guidance_scale"]), {})
        at.setdefault(cell["steps"], []).append(cell)
    varied = {
        key: [
            cell for line in at.values() if len({each["lora_weight"] for each in line}) > 1 for cell in line
        ]
        for key, at in lines.items()
    }
    found: dict[tuple[str, str], tuple[float, list[Cell]]] = {}
    for (adapter, name, scale), line in sorted(varied.items(), key=lambda pair: (-len(pair[1]), pair[0][2])):
        if line:
            found.setdefault((adapter, name), (scale, line))
    return {
        f"{adapter}: {sampler(line[0])} over LoRA weight, guidance_scale {scale:g}": line
        for (adapter, _), (scale, line) in found.items()
    }


def _grid(name: str, cells: Sequence[Cell], rows: str) -> Sheet:
    """Cells by `rows` and steps; on its side, in one row, where there is one number of steps."""
    steps, heads = sorted({cell["steps"] for cell in cells}), sorted({cell[rows] for cell in cells})
    words = {"lora_weight": "LoRA weight", "guidance_scale": "guidance"}[rows]
    at = {(cell[rows], cell["steps"]): cell for cell in cells}
    counts = tuple(f"{n} step" + ("s" if n != 1 else "") for n in steps)
    labels = tuple(f"{head:g}" for head in heads)
    if len(steps) == 1:
        return Sheet(name, f"{words} →", labels, ((counts[0], tuple(at[head, steps[0]] for head in heads)),))
    lines = tuple(tuple(at.get((head, n)) for n in steps) for head in heads)
    return Sheet(name, f"{words} ↓ steps →", counts, tuple(zip(labels, lines, strict=True)))


# -- Pictures ------------------------------------------------------------------------------------------------


def embed(folder: Path, cells: Sequence[Cell], results: Results) -> list[str]:
    """Give each cell its `shots`, one for each shown sample, and return all pictures as data URIs.

    A shot names a picture by its place in that list, so that a page holds each once; `picture` is None where
    the file is missing. However many pictures there are, together they stay below 18 MB.
    """
    total = sum(len(cell["pictures"]) for cell in cells)
    uris: list[str] = []
    for cell in cells:
        cell["shots"] = []
        for name, sample in zip(cell["pictures"], prompts(results)["shown"], strict=False):
            there = (folder / name).is_file()
            cell["shots"].append({
                "picture": len(uris) if there else None,
                "sample": sample,
                "prompt": prompt_of(results, sample),
            })  # fmt: skip
            if there:
                uris.append(picture_uri(folder / name, budget=_ALL_PICTURES // total))
    return uris
