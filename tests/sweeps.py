"""A sweep's folder without a model: its results.json, with figures that behave as real ones do."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

from lcm_kit.tiny import world
from tests import measured

PROMPTS = tuple(world.random_scene(np.random.default_rng(k)).prompt for k in range(4))
LABELS = {
    "prompt_adherence": ("prompt adherence", "", "higher"),
    "latent_distance": ("distance to the teacher, latents", "", "lower"),
    "effective_guidance": ("effective guidance", "", None),
    "frechet_real": ("Fréchet distance to real pictures", "", "lower"),
    "kernel_teacher": ("kernel distance to the teacher's", "", "lower"),
    "diversity": ("diversity", "", "higher"),
    "saturation": ("colourfulness over the teacher's", "", "one"),
    "seconds": ("seconds an image", "s", "lower"),
    "energy": ("energy an image", "J", "lower"),
    "cost_1000": ("cost of 1,000 images", "", "lower"),
}
Cell = dict[str, Any]


def build_sweep(
    folder: Path,
    *,
    adapters: Sequence[str] = ("quickstart",),
    samplers: Sequence[str] = ("lcm", "ddim"),
    steps: Sequence[int] = (1, 2, 4, 8),
    guidance: Sequence[float] = (1.0, 1.5, 2.0, 3.0),
    weights: Sequence[float] = (1.0,),
    teachers: Sequence[float] = (1.0, 3.0, 5.0, 7.0),
    plain: bool = True,
    metrics: Sequence[str] = tuple(LABELS),
    prompts: Sequence[str] = PROMPTS,
    size: int = 64,
    noise: float = 0.0,
) -> dict[str, Any]:
    """Write `results.json` and `pictures/` and return the results.

    The pictures are renders of the embedded world, blurred by few steps and coloured by guidance; `noise` (in
    levels) makes them hard to compress. The energy is null in every cell, as on a CPU, and LCM has no
    distance to the teacher beyond one step.
    """
    cells = [measured.cell("teacher", "ddim", 50, scale) for scale in teachers]
    if plain:
        cells += [measured.cell("plain", "ddim", n, scale) for n, scale in product((1, 2, 4, 8), (1.0, 5.0))]
    cells += [
        measured.cell("student", sampler, n, scale, name, weight=weight)
        for name in adapters
        for sampler, n, scale, weight in product(samplers, steps, guidance, weights)
    ]  # fmt: skip
    shown = [2 * k for k in range(len(prompts))]
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for cell in cells:
        cell["metrics"] = {key: _figure(cell, key) for key in metrics}
        cell["pictures"] = [f"pictures/{cell['id']}-{sample:03d}.png" for sample in shown]
        for k, name in enumerate(cell["pictures"]):
            _picture(cell, k, size, noise).save(folder / name)
    results = measured.results(
        "evaluation/guidance_sweep", cells, prompts, images_per_prompt=2, resolution=size,
        base={"path": "asset:tiny-sd", "revision": None, "hash": "b" * 64, "prediction_type": "epsilon"},
        metrics={key: {"label": LABELS[key][0], "unit": LABELS[key][1], "better": LABELS[key][2],
                       "help": f"what {key} is"} for key in metrics},
        comparisons=list(_comparisons(cells, metrics)), verdict="Yes",
        recommended=_recommended(cells), breaks=_breaks(cells, adapters),
    )  # fmt: skip
    (folder / "results.json").write_text(json.dumps(results, allow_nan=False))
    return results


def _figure(cell: Cell, key: str) -> dict[str, float] | None:
    """Value and interval: few steps are worse, guidance beyond what is baked in too, the teacher is best."""
    away = 1 / cell["steps"]
    extra = cell["guidance_scale"] - 1 if cell["kind"] == "student" else 0.0
    bare = {"plain": 1.5, "student": 0.4, "teacher": 0.0}[cell["kind"]]
    worse = bare * away + 0.35 * extra * away + 0.2 * abs(cell["lora_weight"] - 1)
    value = {
        "prompt_adherence": math.exp(-worse),
        "latent_distance": 0.05 + worse,
        "effective_guidance": 2.5 * cell["lora_weight"] * (1 + 0.5 * extra),
        "frechet_real": 0.02 + worse,
        "kernel_teacher": 0.001 + 0.01 * worse,
        "diversity": 0.2 * math.exp(-0.5 * extra),
        "saturation": 1 + 0.3 * extra,
        "seconds": 0.02 * cell["unet_calls"],
        "energy": None,
        "cost_1000": 0.02 * cell["unet_calls"] * 1000,
    }[key]
    random = cell["sampler"] == "lcm" and cell["steps"] > 1
    if value is None or (key == "latent_distance" and random):
        return None
    if key == "effective_guidance" and cell["kind"] != "student":
        return None
    half = 0.0 if key in ("seconds", "cost_1000") else 0.02 + 0.1 * value
    return {"value": value, "low": value - half, "high": value + 1.3 * half}


def _picture(cell: Cell, k: int, size: int, noise: float) -> Image.Image:
    picture = world.render(world.random_scene(np.random.default_rng(k)), size)
    away = {"plain": 4.0, "student": 1.2, "teacher": 0.0}[cell["kind"]] / cell["steps"] * size / 64
    colour = 0.6 + 0.4 * cell["guidance_scale"] if cell["kind"] == "student" else 1.0
    picture = ImageEnhance.Color(picture.filter(ImageFilter.GaussianBlur(away))).enhance(colour)
    if noise:
        grain = np.random.default_rng([k, cell["unet_calls"]]).normal(0, noise, (size, size, 3))
        picture = Image.fromarray((np.asarray(picture) + grain).clip(0, 255).astype(np.uint8))
    return picture


def _comparisons(cells: Sequence[Cell], metrics: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Adapters at the same settings, and each cell without guidance against a plain one at as many calls."""
    settings = ("sampler", "steps", "guidance_scale", "lora_weight")
    for i, a in enumerate(cells):
        for b in cells[i + 1 :] if a["kind"] == "student" else ():
            if [a[key] for key in settings] == [b[key] for key in settings]:
                yield from _pair(a, b, metrics)
        for b in cells if a["kind"] == "student" and a["guidance_scale"] == 1 else ():
            if b["kind"] == "plain" and b["unet_calls"] == a["unet_calls"] and b["guidance_scale"] == 1:
                yield from _pair(a, b, metrics)


def _pair(a: Cell, b: Cell, metrics: Sequence[str]) -> Iterator[dict[str, Any]]:
    for key in metrics:
        first, second = a["metrics"][key], b["metrics"][key]
        if first and second:
            gap = first["value"] - second["value"]
            yield {"a": a["id"], "b": b["id"], "metric": key, "difference": gap, "low": gap - 0.05,
                   "high": gap + 0.05, "p": 0.01 if abs(gap) > 0.05 else 0.5}  # fmt: skip


def _recommended(cells: Sequence[Cell]) -> dict[str, Any]:
    students = [cell for cell in cells if cell["kind"] == "student" and cell["guidance_scale"] == 1]
    chosen = min(students, key=lambda cell: abs(cell["unet_calls"] - 4))
    return {
        "sentence": f"Use {chosen['steps']} steps.", "cell": chosen["id"],
        **{key: chosen[key] for key in ("adapter", "steps", "guidance_scale", "lora_weight", "sampler")},
        "reasons": ["as good as the best"], "warnings": [],
    }  # fmt: skip


def _breaks(cells: Sequence[Cell], adapters: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Every grid breaks at its third guidance_scale, if it has as many."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name in adapters:
        mine = [cell for cell in cells if cell["adapter"] == name]
        scales = sorted({cell["guidance_scale"] for cell in mine})
        rows = dict.fromkeys((cell["sampler"], cell["steps"], cell["lora_weight"]) for cell in mine)
        found[name] = [
            {"sampler": sampler, "steps": steps, "lora_weight": weight, "guidance_scale": scales[2],
             "sentence": f"{sampler}, {steps} steps: from guidance_scale {scales[2]:g} on it hurts"}
            for sampler, steps, weight in rows
        ] if len(scales) > 2 else []  # fmt: skip
    return found
