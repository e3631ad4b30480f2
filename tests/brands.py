"""A `brand.json` of the shape that `evaluation/brand` writes, with pictures that can be told apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

FIGURES = {
    "base": {"brand_similarity": (0.20, 0.15, 0.25), "control_adherence": (0.98, 0.95, 1.0)},
    "styled": {"brand_similarity": (0.80, 0.75, 0.85), "control_adherence": (0.97, 0.94, 1.0)},
    "adapter": {"brand_similarity": (0.70, 0.64, 0.76), "control_adherence": (0.95, 0.91, 0.99)},
}


def figure(found: tuple[float, float, float] | None) -> dict[str, float] | None:
    return dict(zip(("value", "low", "high"), found, strict=True)) if found else None


def row(name: str, steps: int, **figures: Any) -> dict[str, Any]:
    """A row; its figures are (value, low, high) or None, `FIGURES` unless given."""
    found = {**FIGURES[name], **figures}
    sampler, guidance = ("lcm", 1.0) if name == "adapter" else ("ddim", 5.0)
    return {
        "name": name, "sampler": sampler, "steps": steps, "guidance_scale": guidance,
        "unet_calls": steps * (2 if guidance > 1 else 1), "distance": figure((0.3, 0.2, 0.4)),
        "brand_adherence": figure((0.9, 0.85, 0.95)), "diversity": figure((0.5, 0.4, 0.6)),
        **{key: figure(found[key]) for key in found},
    }  # fmt: skip


def rows(**adapter: Any) -> list[dict[str, Any]]:
    """Base and styled teacher at 50 steps, the adapter at 1, 2, 4 and 8."""
    return [row("base", 50), row("styled", 50), *(row("adapter", n, **adapter) for n in (1, 2, 4, 8))]


def content(
    found: list[dict[str, Any]], less: tuple[float, float, float] | None = (0.5, 0.44, 0.56)
) -> dict[str, Any]:
    """Rows, and their differences: `less` of brand similarity, to the base at any number of steps."""
    nearer = less and {**dict(zip(("difference", "low", "high"), less, strict=True)), "p": 0.002}
    differences = [
        {"steps": each["steps"], "less": other, "brand_similarity": nearer if other == "base" else None}
        for each in found
        if each["name"] == "adapter"
        for other in ("styled", "base")
    ]
    return {"rows": found, "differences": differences}


def write_brand(
    run: Path, prompts: list[str], found: list[dict[str, Any]] | None = None, **more: Any
) -> None:
    """Write `run/brand.json` and its pictures, each of a colour of its own."""
    folder = run / "brand"
    folder.mkdir(parents=True, exist_ok=True)
    count = len(prompts)

    def drawn(name: str, shade: int) -> list[str]:
        for i in range(count):
            Image.new("RGB", (64, 64), (shade, 30 * i, 7)).save(folder / f"{name}-{i}.png")
        return [f"brand/{name}-{i}.png" for i in range(count)]

    found = rows() if found is None else found
    for k, each in enumerate(found):
        each["pictures"] = drawn(f"{each['name']}-{each['steps']}", 20 * k)
        each["control_pictures"] = drawn(f"control-{each['name']}-{each['steps']}", 20 * k + 9)
    told = {
        "base": {"path": "some/base", "hash": "b" * 64}, "adherence": "attributes", "prompts": prompts,
        "control_prompts": [f"other {prompt}" for prompt in prompts],
        "brand_pictures": drawn("yours", 200), **content(found), **more,
    }  # fmt: skip
    (run / "brand.json").write_text(json.dumps(told))
