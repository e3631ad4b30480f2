"""A `brand.json` of the shape that `evaluation/brand` writes, with pictures that can be told apart."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from tests.measured import cell, figure, results

FIGURES = {
    "base": {"brand_similarity": (0.20, 0.15, 0.25), "control_adherence": (0.98, 0.95, 1.0)},
    "styled": {"brand_similarity": (0.80, 0.75, 0.85), "control_adherence": (0.97, 0.94, 1.0)},
    "adapter": {"brand_similarity": (0.70, 0.64, 0.76), "control_adherence": (0.95, 0.91, 0.99)},
}


def row(name: str, steps: int, **figures: Any) -> dict[str, Any]:
    """A row as `results.brand_rows` gives it, without pictures; figures are (value, low, high) or None,
    `FIGURES` unless given.
    """
    usual = {
        "in_style": (1.0 if name != "base" else 0.0,) * 3,
        "distance": (0.3, 0.2, 0.4), "brand_adherence": (0.9, 0.85, 0.95), "diversity": (0.5, 0.4, 0.6),
        **FIGURES[name],
    }  # fmt: skip
    return {"name": name, "steps": steps, **usual, **figures}


def rows(**adapter: Any) -> list[dict[str, Any]]:
    """Base and styled teacher at 50 steps, the adapter at 1, 2, 4 and 8."""
    return [row("base", 50), row("styled", 50), *(row("adapter", n, **adapter) for n in (1, 2, 4, 8))]


def cells(each: dict[str, Any]) -> list[dict[str, Any]]:
    """The two cells of a row: on the prompts of the style and on the control prompts."""
    mine = each["name"] == "adapter"
    adapter = {"base": None, "styled": "style", "adapter": "adapter"}[each["name"]]
    how = ("student", "lcm") if mine else ("teacher", "ddim")
    guidance = 1.0 if mine else 5.0
    main = cell(
        *how, each["steps"], guidance, adapter, brand_similarity=each["brand_similarity"],
        prompt_adherence=each["brand_adherence"], diversity=each["diversity"],
        kernel_teacher=each["distance"], in_style=each["in_style"],
    )  # fmt: skip
    right = each["control_adherence"]
    return [main, cell(*how, each["steps"], guidance, adapter, of="control", prompt_adherence=right)]


def content(
    found: list[dict[str, Any]],
    less: tuple[float, float, float] | None = (0.5, 0.44, 0.56),
    prompts: Sequence[str] = ("a cat",),
    **more: Any,
) -> dict[str, Any]:
    """Results of rows and their differences: `less` of brand similarity, to the base, at any steps."""
    pairs = [cells(each) for each in found]
    base = next((main["id"] for main, _ in pairs if main["id"].startswith("teacher")), "none")
    nearer = [
        {"a": main["id"], "b": base, "metric": "brand_similarity", "p": 0.002,
         **dict(zip(("difference", "low", "high"), less, strict=True))}
        for main, _ in pairs if main["kind"] == "student" and less
    ]  # fmt: skip
    return results(
        "evaluation/brand", [main for main, _ in pairs] + [control for _, control in pairs], prompts,
        control=[f"other {prompt}" for prompt in prompts], comparisons=nearer, **more,
    )  # fmt: skip


def with_contract(
    found: dict[str, Any], trigger: str | None = "lumo style", **figures: Any
) -> dict[str, Any]:
    """`found` with a trigger contract of the style and of the adapter at 4 steps, and the pictures' cells
    without the trigger; figures as `row` takes them.
    """
    usual: dict[str, Any] = {
        "strength": (0.9, 0.8, 1.0), "leak": (0.09, 0.05, 0.15), "leak_share": (0.1, 0.05, 0.2),
        "changed": (0.5, 0.4, 0.6), "lost": (0.02, -0.02, 0.06), "lost_elsewhere": (0.03, -0.01, 0.07),
    }  # fmt: skip
    if trigger is None:
        usual |= dict.fromkeys(("strength", "leak", "leak_share", "lost"))
    mains = [each for each in found["cells"] if each["prompts"] == "main"]
    told = [
        {"cell": each["id"], **{key: figure(value) for key, value in (usual | figures).items()}}
        for each in mains if each["adapter"]
    ]  # fmt: skip
    if trigger is not None:
        bare = [{**each, "id": f"bare-{each['id']}", "prompts": "bare"} for each in mains]
        texts = [text.replace(f", {trigger}", "") for text in found["prompts"]["main"]["texts"]]
        lists = {**found["prompts"], "bare": {**found["prompts"]["main"], "texts": texts}}
        found = {**found, "cells": [*found["cells"], *bare], "prompts": lists}
    return {**found, "contract": {"trigger": trigger, "verdict": "Kept", "rows": told}}


def write_brand(
    run: Path,
    prompts: list[str],
    found: list[dict[str, Any]] | None = None,
    brand: str | None = None,
    **more: Any,
) -> None:
    """Write `run/brand.json` and its pictures, each of a colour of its own."""
    folder = run / "brand"
    folder.mkdir(parents=True, exist_ok=True)
    count = len(prompts)

    def drawn(name: str, shade: int) -> list[str]:
        for i in range(count):
            Image.new("RGB", (64, 64), (shade, 30 * i, 7)).save(folder / f"{name}-{i}.png")
        return [f"brand/{name}-{i}.png" for i in range(count)]

    told = content(
        rows() if found is None else found, prompts=prompts, settings={"brand": brand},
        **{"brand_pictures": drawn("yours", 200), **more},
    )  # fmt: skip
    for each in told["cells"]:
        k, control = [main["id"] for main in told["cells"]].index(each["id"].removeprefix("control-")), 9
        each["pictures"] = drawn(each["id"], 20 * k + control * (each["prompts"] == "control"))
    (run / "brand.json").write_text(json.dumps(told))
