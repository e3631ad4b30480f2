"""Does a few-step adapter draw in the style, and does it still draw the rest?

    lcm-kit evaluate evaluation/brand run=runs/my_run style=runs/my_run/style brand=my_pictures

Two lists of prompts are drawn from the same noise by the base, by the styled teacher (the base with the style
LoRA) and by the adapter at each number of steps, with plain diffusers and the exported files: prompts of the
style, on which similarity to the brand's pictures, adherence and diversity are measured, and control prompts,
which do not name the style, to see what was unlearned. Writes brand.json and pictures/ beside it into the
run's folder, under brand/. Copy this file and change it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lcm_kit import bases, sample
from lcm_kit.config.brand import Brand
from lcm_kit.data import records
from lcm_kit.evaluation import brand, tables, verdicts
from lcm_kit.evaluation import metric_table as metrics
from lcm_kit.evaluation.cells import Cell
from lcm_kit.evaluation.compare import differences
from lcm_kit.evaluation.draw import Pipes, Samples, draw_all, how_of, inputs, repeated
from lcm_kit.evaluation.extract import FeatureExtractor
from lcm_kit.evaluation.kept import Rows
from lcm_kit.evaluation.measure import Figures, Ruler
from lcm_kit.evaluation.metrics.bootstrap import Resamples
from lcm_kit.evaluation.results import BRAND_FILE, CONTROL, MAIN
from lcm_kit.evaluation.swept_adapters import base_keys, require_whole, swept_adapters
from lcm_kit.io.files import atomic_folder
from lcm_kit.io.locks import alone
from lcm_kit.lora import verify
from lcm_kit.training import processes

FOLDERS = {MAIN: "brand", CONTROL: "control"}  # of what is drawn for each list of prompts; pictures begin so


@alone("evaluation/brand", brand.output)
def main(config: Brand) -> Path:
    """Evaluate; returns the path of `brand.json`."""
    # -- Parts: the base, the adapters, the prompts ----------------------------------------------------------
    share, device = processes.share(), sample.placement()["device"]
    brand.require_one_file(config.run)
    base = bases.inspect_base(**base_keys(config, config.run))
    files = [config.run, *([config.style] if config.style else [])]
    found = swept_adapters(files, verify.base_of(base.path, base.revision, base.variant))
    require_whole(found)
    names = (brand.ADAPTER, brand.STYLE)
    adapters = {name: replace(each, name=name) for name, each in zip(names, found, strict=False)}
    folder, size = brand.output(config), config.resolution or base.sample_size * base.factor
    wanted, shown = brand.prompts_and_pictures(config)
    control = repeated(records.prompts(config.control_prompts), config.control_count or config.count)
    look = FeatureExtractor.of(
        config.recipe, [*wanted, *control], size, device, features=config.features,
        text_features=config.text_features, probe="brand-probe",
    )  # fmt: skip
    how = how_of(config, base)
    samples = {
        kind: Samples(prompts, n, config.seed, size, config.batch_size, config.pictures, how=how)
        for kind, prompts, n in ((MAIN, wanted, config.images_per_prompt), (CONTROL, control, 1))
    }

    # -- Draw ------------------------------------------------------------------------------------------------
    cells = brand.plan(config, found[0].method)
    pipes = Pipes(base, adapters, samples[MAIN])

    def draw(kind: str) -> dict[Cell, Rows]:
        made_by = inputs(base, samples[kind], look, device)
        return draw_all(
            cells, folder / "brand" / FOLDERS[kind], pipes.get, samples[kind], look,
            lambda cell: [made_by, pipes.weights_of(cell)], share,
        )  # fmt: skip

    drawn = {kind: draw(kind) for kind in samples}
    if not share.first:
        return folder / BRAND_FILE

    # -- Measure ---------------------------------------------------------------------------------------------
    unstyled = drawn[MAIN][cells[0]]["features"]
    others = look.folder(config.control, size) if config.control else unstyled
    own = look.folder(config.brand, size)
    reference = cells[1] if config.style else cells[0]

    def figures_of(kind: str) -> dict[Cell, Figures]:
        chosen, n = samples[kind], samples[kind].images_per_prompt
        resamples = Resamples.draw(len(chosen.prompts), n, config.resamples, config.seed)
        ruler = Ruler(resamples, drawn[kind][reference], config.confidence)
        if kind == MAIN:
            ruler = replace(ruler, brand=(own, others), unstyled=unstyled)
        return metrics.measure(drawn[kind], ruler, config.recipe)

    figures = {kind: figures_of(kind) for kind in samples}
    pairs = [
        (
            (tables.cell_id(kind, mine), figures[kind][mine]),
            (tables.cell_id(kind, other), figures[kind][other]),
        )
        for mine in cells
        for other in cells
        for kind in samples
        if (mine.kind, other.kind) == ("student", "teacher")
    ]

    # -- Write -----------------------------------------------------------------------------------------------
    with atomic_folder(folder / "brand" / "pictures") as inside:
        saved = {
            kind: tables.save_pictures(inside, drawn[kind], samples[kind], f"{FOLDERS[kind]}-")
            for kind in samples
        }
        beside = brand.save_pictures(shown, inside, size)
    measured = {
        kind: tables.Measured(
            samples[kind], figures[kind],
            {cell: [f"brand/pictures/{name}" for name in names] for cell, names in saved[kind].items()},
        ) for kind in samples
    }  # fmt: skip
    results = tables.results(
        config, folder.resolve().name, base, list(adapters.values()), look, reference, measured,
        differences(pairs, config.confidence),
    )  # fmt: skip
    results["brand_own"] = brand.own_similarity(own, others)
    results["brand_pictures"] = [name and f"brand/pictures/{name}" for name in beside]
    head = verdicts.brand_headline(results)
    results["verdict"] = verdicts.brand_verdict(head, results["adherence"])
    tables.show(results)
    return tables.write_results(folder / BRAND_FILE, results)
