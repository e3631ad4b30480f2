"""At which weights do a style and an acceleration LoRA work together? A grid against the styled teacher.

    lcm-kit compose STYLE SPEED --base BASE
    lcm-kit evaluate evaluation/compose style=runs/my_style speed=runs/my_speed

The styled teacher is the base with the style alone, at 50 steps with guidance; every pair of weights draws
the same prompts from the same noise in few steps, with plain diffusers. Writes the recommended pair
(recommended.json), one file that is both at these weights (`merged_kohya.safetensors`,
`merged_diffusers.safetensors`), the map of the search (map.png, results.json), and a sheet to look at. What
is kept of a cell lies in `cells/`: a stopped search continues. Copy this file and change it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lcm_kit import console, families, processes, sample
from lcm_kit.config.sweep import Compose
from lcm_kit.export import merge_files, verify
from lcm_kit.locks import alone
from lcm_kit.metrics.bootstrap import Resamples
from lcm_kit.results import SCHEMA
from lcm_kit.sweep import measure, tables
from lcm_kit.sweep.draw import Samples, draw_all, inputs, versions
from lcm_kit.sweep.look import Looker, brand_features
from lcm_kit.sweep.pairs import PairPipes, choose, plan, write_map
from lcm_kit.sweep.subjects import base_facts, insist_on_whole, subjects


@alone("evaluation/compose", lambda config: config.output)
def main(config: Compose) -> Path:
    """Search; returns the path of `results.json`."""
    # -- Parts: the base, both adapters, the samples ---------------------------------------------------------
    share, device = processes.share(), sample.placement()["device"]
    where = base_facts(config, config.speed)
    base = families.inspect_base(where["path"], revision=where["revision"], variant=where["variant"])
    style, speed = subjects(
        (config.style, config.speed), verify.base_of(base.path, base.revision, base.variant)
    )
    insist_on_whole((style, speed))
    folder = Path(config.output)
    samples = Samples.of(config, base)
    prompts, size = samples.prompts, samples.size
    look = Looker.of(config, prompts, size, device)
    brand = brand_features(config, look, size)

    # -- Draw ------------------------------------------------------------------------------------------------
    cells = plan(config, speed.method)
    made_by = inputs(config, base, samples, look, device)
    pipes = PairPipes(
        base, style.file, speed.file,
        warm=lambda pipe: sample.sample(pipe, prompts[:1], sampler="ddim", steps=1, size=size),
    )  # fmt: skip
    made_from = [made_by, style.weights, speed.weights]
    drawn = draw_all(
        cells, folder / "cells", pipes.get, samples, look, lambda cell: made_from, share
    )  # fmt: skip
    if not share.first:
        return folder / "results.json"

    # -- Measure and choose ----------------------------------------------------------------------------------
    ruler = measure.Ruler(
        resamples=Resamples.draw(len(prompts), config.images_per_prompt, config.resamples, config.seed),
        teachers={}, reference=drawn[cells[0]], real=None, brand=brand, cost=None,
        confidence=config.confidence,
    )  # fmt: skip
    with console.working(f"measuring {len(cells)} cells"):
        figures = {cell: ruler.figures(cell, rows) for cell, rows in drawn.items()}
    chosen, reasons = choose(figures, config.confidence)

    # -- Write -----------------------------------------------------------------------------------------------
    pictures = tables.write_pictures(folder, drawn, samples)
    tables.write_samples(folder, drawn, samples)
    sheet = [
        picture
        for cell in (cells[0], chosen)
        for picture in sample.to_pil(drawn[cell]["pictures"] / 127.5 - 1)
    ]
    sample.save_png(sample.contact_sheet(sheet, len(samples.shown)), folder / "teacher-and-pair.png")
    write_map(figures, chosen, folder / "map.png")
    recommended = {
        "sentence": f"Use the style at {chosen.style_weight:g} and the acceleration at "
                    f"{chosen.lora_weight:g}, {config.steps} steps, guidance {config.guidance_scale:g}.",
        "cell": chosen.id, "style_weight": chosen.style_weight, "speed_weight": chosen.lora_weight,
        "sampler": chosen.sampler, "steps": chosen.steps, "guidance_scale": chosen.guidance_scale,
        "reasons": reasons, "warnings": [],
    }  # fmt: skip
    results: dict[str, Any] = {
        "schema": SCHEMA, "kind": "compose", "name": folder.resolve().name,
        "base": {**where, "hash": base.base_hash, "prediction_type": base.prediction_type},
        "style": style.facts(), "speed": speed.facts(), "prompts": list(prompts),
        "images_per_prompt": config.images_per_prompt, "count": len(samples), "seed": config.seed,
        "resolution": size, "shown": samples.shown, "extractor": config.features, "adherence": look.kind(),
        "confidence": config.confidence, "brand": config.brand, "control": config.control,
        "cells": [{**cell.settings(), "metrics": measure.as_json(figures[cell], config.confidence),
                   "pictures": pictures[cell.id]} for cell in cells],
        "recommended": recommended, "machine": tables.machine(device), "versions": versions(),
    }  # fmt: skip
    with console.working("merging the pair"):
        merged = merge_files.merge(
            [(style.file, chosen.style_weight), (speed.file, chosen.lora_weight)], folder / "merged",
            rank=config.rank, base=base.path, variant=base.variant,
        )  # fmt: skip
    file = tables.write_results(folder, results)
    tables.show(results["cells"])
    console.say(recommended["sentence"])
    for line in (*reasons, *merged.written):
        console.say(f"  - {line}")
    console.say(
        f"the map of the search: {folder / 'map.png'}; above the styled teacher, below the pair: "
        f"{folder / 'teacher-and-pair.png'}"
    )
    return file
