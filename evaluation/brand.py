"""Does a few-step adapter draw in the style, and does it still draw the rest?

    lcm-kit evaluate evaluation/brand run=runs/my_run style=runs/my_run/style brand=my_pictures

Two lists of prompts are drawn from the same noise by the base, by the styled teacher (the base with the style
LoRA) and by the adapter at each number of steps, with plain diffusers and the exported files: prompts of the
style, on which similarity to the brand's pictures, adherence and diversity are measured, and control prompts,
which do not name the style, to see what was unlearned. Where a trigger calls the style, its prompts are drawn
without it as well: what leaks (`contract`). Writes brand.json and pictures/ beside it into the run's folder,
under brand/. Copy this file and change it.
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
from lcm_kit.evaluation.contract import contract
from lcm_kit.evaluation.draw import Pipes, Samples, draw_all, how_of, inputs, repeated, resolution_of
from lcm_kit.evaluation.extract import FeatureExtractor
from lcm_kit.evaluation.kept import Rows
from lcm_kit.evaluation.measure import Figures, Ruler
from lcm_kit.evaluation.metrics.bootstrap import Resamples
from lcm_kit.evaluation.results import BARE, BRAND_FILE, CONTROL, MAIN
from lcm_kit.evaluation.styled import renoised
from lcm_kit.evaluation.swept_adapters import base_keys, require_whole, swept_adapters
from lcm_kit.io.files import atomic_folder
from lcm_kit.io.locks import alone
from lcm_kit.lora import verify
from lcm_kit.training import processes


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
    folder, resolution = brand.output(config), resolution_of(config, base)
    trigger = brand.trigger_of(config, found[0].file)
    wanted, shown = brand.prompts_and_pictures(config, trigger)
    control = repeated(records.prompts(config.control_prompts), config.control_count or config.count)
    look = FeatureExtractor.of(
        config.recipe, [*wanted, *control], resolution, device, features=config.features,
        text_features=config.text_features, probe="brand-probe",
    )  # fmt: skip
    how = how_of(config, base)
    asked_style, asked_else = (
        Samples(prompts, n, config.seed, resolution, config.batch_size, config.pictures, how=how)
        for prompts, n in ((wanted, config.images_per_prompt), (control, 1))
    )
    samples = brand.lists(config, asked_style, asked_else, trigger)

    # -- Draw ------------------------------------------------------------------------------------------------
    cells = brand.plan(config, found[0].method)
    pipes = Pipes(base, adapters, samples[MAIN])

    def draw(chosen: Samples, cells: list[Cell], into: str) -> dict[Cell, Rows]:
        made_by = inputs(base, chosen, look, device)
        return draw_all(
            cells, folder / "brand" / into, pipes.get, chosen, look,
            lambda cell: [made_by, pipes.weights_of(cell)], share,
        )  # fmt: skip

    drawn = {kind: draw(each, cells, brand.FOLDERS[kind]) for kind, each in samples.items()}
    again = None
    if config.contract and BARE not in samples:
        other = replace(samples[CONTROL], seed=config.seed + 1)
        again = draw(other, cells[:1], brand.AGAIN)[cells[0]]["features"]
    if not share.first:
        return folder / BRAND_FILE

    # -- Measure ---------------------------------------------------------------------------------------------
    unstyled = drawn[MAIN][cells[0]]["features"]
    others = look.folder(config.control, resolution) if config.control else unstyled
    own = look.folder(config.brand, resolution)
    reference = cells[1] if config.style else cells[0]

    def figures_of(kind: str) -> dict[Cell, Figures]:
        chosen, n = samples[kind], samples[kind].images_per_prompt
        resamples = Resamples.draw(len(chosen.prompts), n, config.resamples, config.seed)
        plain = drawn[kind][cells[0]]["features"]
        ruler = Ruler(
            resamples, drawn[kind][reference], config.confidence, unstyled=plain,
            brand=None if kind == CONTROL else (own, others),
            renoised=again if kind == CONTROL else renoised(plain, n),
        )  # fmt: skip
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
            kind: tables.save_pictures(inside, drawn[kind], samples[kind], f"{brand.FOLDERS[kind]}-")
            for kind in samples
        }
        beside = brand.save_pictures(shown, inside, resolution)
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
    if config.contract:
        results["contract"] = contract(cells, figures, trigger, config.confidence)
        results["contract"]["verdict"] = verdicts.contract_verdict(results)
    head = verdicts.brand_headline(results)
    results["verdict"] = verdicts.brand_verdict(head, results["adherence"])
    tables.show(results)
    tables.show_contract(results)
    return tables.write_results(folder / BRAND_FILE, results)
