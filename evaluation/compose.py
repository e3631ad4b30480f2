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

from dataclasses import replace
from pathlib import Path

from lcm_kit import bases, console, sample
from lcm_kit.config.sweep import Compose
from lcm_kit.evaluation import metric_table as metrics
from lcm_kit.evaluation import tables
from lcm_kit.evaluation.draw import Samples, draw_all, inputs
from lcm_kit.evaluation.extract import FeatureExtractor, brand_features
from lcm_kit.evaluation.measure import Ruler
from lcm_kit.evaluation.metrics.bootstrap import Resamples
from lcm_kit.evaluation.pairs import PairPipes, choose, plan, write_map
from lcm_kit.evaluation.recommend import use_at
from lcm_kit.evaluation.results import FILE, MAIN
from lcm_kit.evaluation.swept_adapters import base_keys, require_whole, swept_adapters
from lcm_kit.io.locks import alone
from lcm_kit.lora import merge_files, verify
from lcm_kit.training import processes


@alone("evaluation/compose", lambda config: config.output)
def main(config: Compose) -> Path:
    """Search; returns the path of `results.json`."""
    # -- Parts: the base, both adapters, the samples ---------------------------------------------------------
    share, device = processes.share(), sample.placement()["device"]
    base = bases.inspect_base(**base_keys(config, config.speed))
    found = swept_adapters(
        (config.style, config.speed), verify.base_of(base.path, base.revision, base.variant)
    )
    require_whole(found)
    style, speed = (replace(each, name=name) for each, name in zip(found, ("style", "speed"), strict=True))
    folder = Path(config.output)
    samples = Samples.of(config, base)
    prompts, resolution = samples.prompts, samples.resolution
    look = FeatureExtractor.of(
        config.recipe, prompts, resolution, device, features=config.features,
        text_features=config.text_features, probe="brand-probe",
    )  # fmt: skip
    brand = brand_features(config, look, resolution)

    # -- Draw ------------------------------------------------------------------------------------------------
    cells = plan(config, speed.method)
    made_by = inputs(base, samples, look, device)
    pipes = PairPipes(base, style.file, speed.file, samples)
    made_from = [made_by, style.weights, speed.weights]
    drawn = draw_all(
        cells, folder / "cells", pipes.get, samples, look, lambda cell: made_from, share
    )  # fmt: skip
    if not share.first:
        return folder / FILE

    # -- Measure and choose ----------------------------------------------------------------------------------
    ruler = Ruler(
        Resamples.draw(len(prompts), config.images_per_prompt, config.resamples, config.seed),
        drawn[cells[0]], config.confidence, brand=brand,
    )  # fmt: skip
    figures = metrics.measure(drawn, ruler, config.recipe)
    chosen, reasons = choose(figures, config.confidence)

    # -- Write -----------------------------------------------------------------------------------------------
    measured = tables.Measured(samples, figures, tables.write_pictures(folder, drawn, samples))
    tables.write_samples(folder, drawn, samples, config.recipe)
    sheet = [
        picture for cell in (cells[0], chosen) for picture in sample.to_pil(samples.pictures_of(drawn[cell]))
    ]
    sample.save_png(sample.contact_sheet(sheet, len(samples.shown)), folder / "teacher-and-pair.png")
    write_map(figures, chosen, folder / "map.png")
    results = tables.results(
        config, folder.resolve().name, base, (style, speed), look, cells[0], {MAIN: measured}, []
    )
    sentence = (
        f"{use_at(resolution)} the style at {chosen.style_weight:g} and the acceleration at "
        f"{chosen.lora_weight:g}, {config.steps} steps, guidance {chosen.guidance_scale:g}."
    )
    results["recommended"] = {
        "sentence": sentence, "adapter": chosen.adapter, "cell": chosen.id, "sampler": chosen.sampler,
        "steps": chosen.steps, "guidance_scale": chosen.guidance_scale, "lora_weight": chosen.lora_weight,
        "style_weight": chosen.style_weight, "reasons": reasons, "warnings": [],
    }  # fmt: skip
    with console.working("merging the pair"):
        merged = merge_files.merge(
            [(style.file, chosen.style_weight), (speed.file, chosen.lora_weight)], folder / "merged",
            rank=config.rank, base=base.path, variant=base.variant,
        )  # fmt: skip
    tables.write_tables(folder, results)
    file = tables.write_results(folder / FILE, results)
    tables.show(results)
    console.say(sentence)
    for line in (*reasons, *merged.written):
        console.say(f"  - {line}")
    console.say(
        f"the map of the search: {folder / 'map.png'}; above the styled teacher, below the pair: "
        f"{folder / 'teacher-and-pair.png'}"
    )
    return file
