"""Does a few-step adapter draw in the look, and does it still draw the rest?

    lcm-kit evaluate evaluation/brand run=runs/my_run style=runs/my_run/style brand=my_pictures

Two lists of prompts are drawn from the same noise by the base, by the styled teacher (the base with the style
LoRA) and by the adapter at each number of steps, with plain diffusers and the exported files: prompts of the
look, on which similarity to the brand's pictures, adherence and diversity are measured, and control prompts,
which do not name the look, to see what was unlearned. Writes brand.json and pictures/ beside it into the
run's folder, under brand/. Copy this file and change it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from lcm_kit import families, own_files, processes, sample
from lcm_kit.config.brand import Brand
from lcm_kit.data import records
from lcm_kit.export import verify
from lcm_kit.files import atomic_folder
from lcm_kit.locks import alone
from lcm_kit.metrics.bootstrap import Resamples
from lcm_kit.results import Rows
from lcm_kit.sweep import brand, measure, tables
from lcm_kit.sweep.cells import Cell
from lcm_kit.sweep.draw import Pipes, Samples, draw_all, inputs, versions
from lcm_kit.sweep.look import Looker
from lcm_kit.sweep.subjects import base_facts, insist_on_whole, subjects


@alone("evaluation/brand", brand.output)
def main(config: Brand) -> Path:
    """Evaluate; returns the path of `brand.json`."""
    # -- Parts: the base, the adapters, the prompts ----------------------------------------------------------
    share, device = processes.share(), sample.placement()["device"]
    brand.insist_on_one_file(config.run)
    where = base_facts(config, config.run)
    base = families.inspect_base(where["path"], revision=where["revision"], variant=where["variant"])
    files = [config.run, *([config.style] if config.style else [])]
    found = subjects(files, verify.base_of(base.path, base.revision, base.variant))
    insist_on_whole(found)
    adapters = dict(zip((brand.ADAPTER, brand.STYLE), found, strict=False))
    folder, size = brand.output(config), config.resolution or base.sample_size * base.factor
    wanted, shown = brand.prompts_and_pictures(config)
    count = config.control_count or config.count
    control = list(islice(cycle(records.prompts(config.control_prompts)), count))
    look = Looker.of(config, [*wanted, *control], size, device)
    samples = {
        kind: Samples(tuple(prompts), n, config.seed, size, config.batch_size, config.pictures)
        for kind, prompts, n in (("brand", wanted, config.images_per_prompt), ("control", control, 1))
    }

    # -- Draw ------------------------------------------------------------------------------------------------
    cells = brand.plan(config, found[0].method)
    pipes = Pipes(
        base, adapters,
        warm=lambda pipe: sample.sample(pipe, wanted[:1], sampler="ddim", steps=1, size=size),
    )  # fmt: skip

    def draw(kind: str) -> dict[Cell, Rows]:
        made_by = inputs(config, base, samples[kind], look, device)

        def made_from(cell: Cell) -> list[Any]:
            return [made_by, adapters[cell.adapter].weights if cell.adapter else None]

        return draw_all(cells, folder / "brand" / kind, pipes.get, samples[kind], look, made_from, share)

    drawn = {kind: draw(kind) for kind in samples}
    if not share.first:
        return folder / "brand.json"

    # -- Measure ---------------------------------------------------------------------------------------------
    others = look.folder(config.control, size) if config.control else drawn["brand"][cells[0]]["features"]
    sets = {"brand": (look.folder(config.brand, size), others), "control": None}
    reference = cells[1] if config.style else cells[0]

    def figures_of(kind: str) -> dict[Cell, measure.Figures]:
        chosen, n = samples[kind], samples[kind].images_per_prompt
        ruler = measure.Ruler(
            resamples=Resamples.draw(len(chosen.prompts), n, config.resamples, config.seed),
            teachers={}, reference=drawn[kind][reference], real=None, brand=sets[kind], cost=None,
            confidence=config.confidence,
        )  # fmt: skip
        return {cell: ruler.figures(cell, rows) for cell, rows in drawn[kind].items()}

    figures = {kind: figures_of(kind) for kind in samples}

    # -- Write -----------------------------------------------------------------------------------------------
    with atomic_folder(folder / "brand" / "pictures") as inside:
        names = {
            kind: tables.save_pictures(inside, drawn[kind], samples[kind], f"{kind}-") for kind in samples
        }
        beside = brand.save_pictures(shown, inside, size)

    def paths(found: Sequence[str]) -> list[str]:
        return [f"brand/pictures/{name}" for name in found]

    table = [
        brand.row(
            cell, {kind: figures[kind][cell] for kind in samples},
            {kind: paths(names[kind][cell.id]) for kind in samples}, config.confidence,
        )
        for cell in cells
    ]  # fmt: skip
    results: dict[str, Any] = {
        "schema": brand.SCHEMA, "base": {**where, "hash": base.base_hash},
        "adapters": {name: subject.facts() for name, subject in adapters.items()},
        "brand": config.brand, "control": config.control, "features": config.features,
        "adherence": look.kind(), "confidence": config.confidence, "seed": config.seed, "resolution": size,
        "images_per_prompt": config.images_per_prompt, "prompts": wanted, "control_prompts": control,
        "brand_pictures": [name and f"brand/pictures/{name}" for name in beside], "rows": table,
        "differences": brand.differences(cells, figures, config.confidence),
        "machine": tables.machine(device), "versions": versions(),
    }  # fmt: skip
    own_files.write_json(folder / "brand.json", results)
    brand.show(table)
    return folder / "brand.json"
