"""Is the student as good as the teacher, and better than plain samplers at equal cost?

    lcm-kit evaluate configs/evaluation/quality.yaml
    lcm-kit evaluate configs/evaluation/tiny_base.yaml     # a base alone
    accelerate launch --num_processes 4 -m lcm_kit evaluate configs/evaluation/quality.yaml

The same prompts are drawn from the same noise by the teacher (the base, many steps, guidance), by the base
under plain samplers at each budget of UNet calls (with guidance, at half the steps, and without), and by the
student at each number of steps (with guidance where none is baked into it). All of it is plain diffusers with
the exported file: what users run. Writes `results.json` and `pictures/` into the run's folder. Samples are
kept in `evaluation/`, so that a second evaluation with the same inputs only measures again. Copy this file
and change it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lcm_kit import assets, bases, sample
from lcm_kit.adapter.folder import base_of, read_provenance
from lcm_kit.config.evaluation import Quality
from lcm_kit.core.methods import DEFAULT, MethodInfo
from lcm_kit.errors import UserError
from lcm_kit.evaluation import metric_table as metrics
from lcm_kit.evaluation import tables, verdicts
from lcm_kit.evaluation.cells import Cell
from lcm_kit.evaluation.compare import differences
from lcm_kit.evaluation.draw import Pipes, Samples, draw_all, how_of, inputs, repeated, resolution_of
from lcm_kit.evaluation.extract import FeatureExtractor, of_the_world
from lcm_kit.evaluation.measure import Ruler
from lcm_kit.evaluation.metrics.bootstrap import Resamples
from lcm_kit.evaluation.metrics.features import PROBE
from lcm_kit.evaluation.results import FILE, MAIN
from lcm_kit.evaluation.swept_adapters import require_whole, swept_adapters
from lcm_kit.io.locks import alone
from lcm_kit.lora import verify
from lcm_kit.tiny import world
from lcm_kit.training import processes
from lcm_kit.training.run_files import config_of

STUDENT = "student"


def plan(config: Quality, method: MethodInfo = DEFAULT) -> list[Cell]:
    """The teacher first, then plain samplers by budget (guidance needs an even one), then any student.

    `method`: what made the student, which says how it draws.
    """
    cells = [Cell("teacher", None, "ddim", config.teacher_steps, config.guidance_scale)]
    for calls in config.unet_calls:
        for sampler in config.samplers:
            if calls % 2 == 0 and config.guidance_scale > 1:
                cells.append(Cell("plain", None, sampler, calls // 2, config.guidance_scale))
            cells.append(Cell("plain", None, sampler, calls, 1.0))
    steps = method.judged_steps if config.student_steps is None else config.student_steps
    students, scale = () if config.base else steps, method.guidance_beside(config.guidance_scale)
    return cells + [Cell("student", STUDENT, method.sampler, n, scale, config.lora_weight) for n in students]


@alone("evaluation/quality", lambda config: config.run)
def main(config: Quality) -> Path:
    """Evaluate a run; returns the path of its `results.json`."""
    # -- Parts: the run, its base, its exported file, the prompts --------------------------------------------
    run, share, device = Path(config.run), processes.share(), sample.placement()["device"]
    if config.base is not None:
        base = bases.inspect_base(config.base)
        trained, found = None, []
    elif not (run / "config.yaml").is_file():
        raise UserError(f"run {config.run!r} is not a run's folder (no config.yaml); train it first")
    else:
        trained = int(config_of(run)["data"]["resolution"])
        base = bases.inspect_base(**base_of(read_provenance(run / "adapter")))
        found = swept_adapters([config.run], verify.base_of(base.path, base.revision, base.variant))
    require_whole(found)
    resolution = resolution_of(config, base, trained)
    adapters = {name: replace(each, name=name) for name, each in zip((STUDENT,), found, strict=False)}
    prompts = repeated(assets.prompts(config.prompts), config.count)
    samples = Samples(
        prompts, 1, config.seed, resolution, config.batch_size, config.pictures, keep_all=True,
        how=how_of(config, base),
    )  # fmt: skip
    look = FeatureExtractor.of(
        config.recipe, prompts, resolution, device, features=PROBE if resolution == world.SIZE else None
    )
    ours = of_the_world(prompts, resolution) and len(prompts) > 1
    real = look.renders(config.reference_count) if ours else None

    # -- Draw: the base's cells first, then with the adapter on ----------------------------------------------
    cells = list(dict.fromkeys(plan(config, found[0].method if found else DEFAULT)))
    made_by = inputs(base, samples, look, device)
    pipes = Pipes(base, adapters, samples)
    drawn = draw_all(
        cells, run / "evaluation", pipes.get, samples, look,
        lambda cell: [made_by, pipes.weights_of(cell)], share,
    )  # fmt: skip
    if not share.first:
        return run / FILE

    # -- Measure: every cell on the same resamples of prompts ------------------------------------------------
    teacher = cells[0]
    ruler = Ruler(
        Resamples.draw(len(prompts), 1, config.resamples, config.seed), drawn[teacher], config.confidence,
        real=real,
    )  # fmt: skip
    figures = metrics.measure(drawn, ruler, config.recipe)
    pairs = [
        ((mine.id, figures[mine]), (other.id, figures[other]))
        for mine in cells
        for other in cells
        if mine.kind == "student"
        and (other == teacher or (other.kind == "plain" and other.unet_calls == mine.unet_calls))
    ]

    # -- Write -----------------------------------------------------------------------------------------------
    measured = tables.Measured(samples, figures, tables.write_pictures(run, drawn, samples))
    results = tables.results(
        config, run.resolve().name, base, list(adapters.values()), look, teacher, {MAIN: measured},
        differences(pairs, config.confidence),
    )  # fmt: skip
    results["frechet_floor"] = None if real is None else look.floor(len(prompts), real)
    results["verdict"] = verdicts.quality_verdict(results)
    tables.show(results)
    return tables.write_results(run / FILE, results)
