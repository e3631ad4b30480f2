"""Which guidance, how many steps, what LoRA weight, and how we know: a grid on the same noise.

    lcm-kit evaluate configs/evaluation/guidance_sweep.yaml
    lcm-kit evaluate evaluation/guidance_sweep adapters='[my.safetensors]' base=FOLDER output=runs/my-sweep
    accelerate launch --num_processes 4 -m lcm_kit evaluate configs/evaluation/guidance_sweep.yaml

Every cell draws the same prompts from the same noise with plain diffusers: the base at each guidance_scale
(the teacher), the base under plain few-step samplers, and each adapter over the grid of samplers, steps,
guidance_scale and LoRA weight. What is kept of a cell lies in `cells/`, so that a stopped sweep continues and
a second one only measures. Writes results.json, results.csv, results.parquet, samples.parquet,
recommended.json, pictures/ and report.html (docs/guidance.md). Copy this file and change it.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

from lcm_kit import bases, console, sample
from lcm_kit.config.sweep import GuidanceSweep
from lcm_kit.errors import UserError
from lcm_kit.evaluation import metric_table as metrics
from lcm_kit.evaluation import tables
from lcm_kit.evaluation.cells import plan, reference
from lcm_kit.evaluation.compare import comparisons
from lcm_kit.evaluation.draw import Pipes, Samples, draw_all, inputs
from lcm_kit.evaluation.extract import FeatureExtractor, brand_features, reference_features
from lcm_kit.evaluation.measure import Ruler, moved
from lcm_kit.evaluation.metrics.bootstrap import Resamples
from lcm_kit.evaluation.recommend import Sweep, breaks, recommend
from lcm_kit.evaluation.result_shapes import Break, Recommended
from lcm_kit.evaluation.results import FILE, MAIN
from lcm_kit.evaluation.swept_adapters import base_keys, swept_adapters
from lcm_kit.io.locks import alone
from lcm_kit.lora import verify
from lcm_kit.report.sweep import write_sweep_report
from lcm_kit.training import processes


def output(config: GuidanceSweep) -> Path:
    """The sweep's folder. Raises `UserError` where there is none to take."""
    folder = Path(config.output or Path(config.adapters[0]) / "sweep")
    if config.output is None and folder.parent.is_file():
        raise UserError(f"{folder.parent} is a file; give output=FOLDER for what the sweep writes")
    return folder


@alone("evaluation/guidance_sweep", output)
def main(config: GuidanceSweep) -> Path:
    """Sweep; returns the path of `results.json`."""
    # -- Parts: the base, the adapters, the samples ----------------------------------------------------------
    share, device = processes.share(), sample.placement()["device"]
    base = bases.inspect_base(**base_keys(config, config.adapters[0]))
    found = swept_adapters(config.adapters, verify.base_of(base.path, base.revision, base.variant))
    folder = output(config)
    samples = Samples.of(config, base)
    prompts, resolution = samples.prompts, samples.resolution
    look = FeatureExtractor.of(
        config.recipe, prompts, resolution, device, features=config.features,
        text_features=config.text_features,
    )  # fmt: skip
    cells = plan(config, {subject.name: subject.method for subject in found})
    real = reference_features(config, look, prompts, resolution)
    brand = brand_features(config, look, resolution)

    # -- Draw ------------------------------------------------------------------------------------------------
    made_by = inputs(base, samples, look, device)
    pipes = Pipes(base, {subject.name: subject for subject in found}, samples)
    drawn = draw_all(
        cells, folder / "cells", pipes.get, samples, look,
        lambda cell: [made_by, pipes.weights_of(cell)], share,
    )  # fmt: skip
    if not share.first:
        return folder / FILE

    # -- Measure: every cell on the same resamples of prompts ------------------------------------------------
    main_teacher = reference(config.teacher)
    ruler = Ruler(
        Resamples.draw(len(prompts), config.images_per_prompt, config.resamples, config.seed),
        drawn[main_teacher], config.confidence,
        teachers={cell.guidance_scale: drawn[cell] for cell in cells if cell.kind == "teacher"},
        real=real, brand=brand, cost=config.cost,
    )  # fmt: skip
    figures = metrics.measure(drawn, ruler, config.recipe)
    sweep = Sweep(
        figures, main_teacher, found, config.confidence, moved(drawn, main_teacher), resolution
    )  # fmt: skip
    recommended = recommend(sweep)

    # -- Write -----------------------------------------------------------------------------------------------
    measured = tables.Measured(samples, figures, tables.write_pictures(folder, drawn, samples))
    tables.write_samples(folder, drawn, samples, config.recipe)
    results = tables.results(
        config, folder.resolve().parent.name, base, found, look, main_teacher, {MAIN: measured},
        comparisons(sweep),
    )  # fmt: skip
    results["verdict"] = "No" if recommended.cell is None else "Yes"
    results["recommended"] = cast(Recommended, recommended.as_json())
    results["breaks"] = {subject.name: cast(list[Break], breaks(sweep, subject.name)) for subject in found}
    tables.write_tables(folder, results)
    file = tables.write_results(folder / FILE, results)
    tables.show(results)
    tables.show_comparisons(results)
    console.say(recommended.sentence)
    warnings = [each.sentence for each in recommended.warnings if each.sentence not in recommended.sentence]
    for line in (*recommended.reasons, *warnings):
        console.say(f"  - {line}")
    console.say(f"report: {write_sweep_report(folder)}")
    return file
