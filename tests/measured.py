"""Results as any evaluation writes them, of cells that a test makes up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lcm_kit.evaluation.metric_table import metrics_of
from lcm_kit.evaluation.results import CONTROL, CONTROL_ID, MAIN, VERSION

Value = float | tuple[float, float, float] | None


def figure(found: Value) -> dict[str, float] | None:
    """A figure of (value, low, high), or of a value alone; None of None."""
    ends = (found,) * 3 if isinstance(found, int | float) else found
    return dict(zip(("value", "low", "high"), ends, strict=True)) if ends else None


def cell(
    kind: str, sampler: str, steps: int, guidance: float = 1.0, adapter: str | None = None,
    of: str = MAIN, weight: float = 1.0, **figures: Value,
) -> dict[str, Any]:  # fmt: skip
    """A cell of results.json without pictures."""
    end = f"-w{weight:g}" if adapter else ""
    name = f"{adapter or kind}-{sampler}-{steps}-g{guidance:g}{end}"
    return {
        "id": name if of == MAIN else CONTROL_ID + name, "kind": kind, "adapter": adapter, "sampler": sampler,
        "steps": steps, "guidance_scale": guidance, "lora_weight": weight,
        "unet_calls": steps * (2 if guidance > 1 else 1), "prompts": of,
        "metrics": {key: figure(value) for key, value in figures.items()}, "pictures": [],
    }  # fmt: skip


def results(
    recipe: str,
    cells: list[dict[str, Any]],
    prompts: Sequence[str],
    *,
    control: Sequence[str] = (),
    images_per_prompt: int = 1,
    settings: dict[str, Any] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """What results.json holds; `more` are its other keys."""

    def listed(texts: Sequence[str], images: int) -> dict[str, Any]:
        return {"texts": list(texts), "images_per_prompt": images,
                "shown": [images * k for k in range(len(texts))]}  # fmt: skip

    adapters = dict.fromkeys(each["adapter"] for each in cells if each["adapter"])
    return {
        "version": VERSION, "recipe": recipe, "name": "synthetic",
        "base": {"path": "some/base", "revision": None, "hash": "b" * 64, "prediction_type": "epsilon"},
        "adapters": [{"name": name, "file": f"runs/{name}/my lora.safetensors", "sha256": "a" * 64,
                      "weights": "c" * 64, "layers": 64, "fault": None} for name in adapters],
        "settings": {"seed": 7, "batch_size": 32, "confidence": 0.95, "lora_weight": 1.0,
                     "reference_count": 1024, "features": "asset:probe", **(settings or {})},
        "resolution": 64, "adherence": "attributes",
        "prompts": {MAIN: listed(prompts, images_per_prompt),
                    **({CONTROL: listed(control, 1)} if control else {})},
        "metrics": {key: metric.described() for key, metric in metrics_of(recipe).items()},
        "reference": next((each["id"] for each in cells if each["kind"] == "teacher"), ""), "cells": cells,
        "comparisons": [], "verdict": None, "recommended": None,
        "machine": {"device": "cpu", "threads": 2}, "versions": {"lcm_kit": "0.1.0", "diffusers": "0.42"},
        **more,
    }  # fmt: skip
