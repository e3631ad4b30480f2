"""LCM-LoRA distillation: a LoRA that draws in 1-8 steps what its base draws in 50 with guidance.

    lcm-kit train configs/distill/tiny_lcm.yaml
    accelerate launch --num_processes 4 -m lcm_kit train configs/distill/tiny_lcm.yaml

One UNet plays three parts (arXiv:2310.04378, 2311.05556). With its LoRA off it is the teacher, which takes
one ODE step under classifier-free guidance from t to s (`guidance: 1`: without it, and the student is drawn
with guidance instead). With its LoRA on it is the student, which must land at the same point from t as from
s; the one from s is the target, optionally with an EMA of the LoRA's weights. `teacher.weight` below 1 is
latent consistency fine-tuning: s is reached with the noise that is in x_t already, which needs no teacher;
`adapter.start` is then the LCM-LoRA that is tuned.

`lcm-kit encode` with the same config comes first: training reads latents and embeddings only. The same
command continues an interrupted run, bit for bit on a CPU. To try another idea, copy this file and edit it.
"""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor

from lcm_kit import bases
from lcm_kit.adapter.adapted_unet import TRAINED, AdaptedUNet
from lcm_kit.adapter.matching import FAKE
from lcm_kit.adapter.roles import Given, Objective, Roles
from lcm_kit.adapter.stages import stage_at
from lcm_kit.adapter.styles import add_teacher_adapters, start_from
from lcm_kit.bases import compiling
from lcm_kit.bases.memory import load_unet, make_optimizer
from lcm_kit.config.schema import Distill, Loss
from lcm_kit.core.flat import flattened
from lcm_kit.core.methods import Times
from lcm_kit.core.schedule import Schedule
from lcm_kit.data import sources
from lcm_kit.data.batches import Batch, Batches
from lcm_kit.data.split import taught_by_plain_base, two_teachers
from lcm_kit.io.locks import alone
from lcm_kit.lora.provenance_rules import of_training
from lcm_kit.training import release, run_folder, run_metrics, runtime, stepping, turns
from lcm_kit.training.ahead import Ahead
from lcm_kit.training.control import Control
from lcm_kit.training.diversity import Diversity
from lcm_kit.training.held_out import BestCheckpoint, HeldOut
from lcm_kit.training.processes import say
from lcm_kit.training.randomness import StepRandomness, step_randomness
from lcm_kit.training.stopping import leave, stoppable
from lcm_kit.training.validation import Validation


@release.released
@alone("train", lambda config: config.output, needed=False)  # a finished run needs none
def main(config: Distill) -> Path:
    """Train as `config` says and return the run's folder. Raises `UserError` for what the user can fix."""
    # -- Runtime: processes, precision, the run's folder -----------------------------------------------------
    run = Path(config.output)
    accelerator = runtime.start(config)
    device, dtype = accelerator.device, runtime.dtype(accelerator)
    if not run_folder.claim(config, accelerator):
        return run

    # -- Parts: the base's UNet and schedule, and the four plugs ---------------------------------------------
    base = bases.inspect_base(config.base.path, revision=config.base.revision, variant=config.base.variant)
    cache = sources.open_cache(config, base)
    trained, kept = sources.split_off(config, cache)
    control, diversity = (kind.prepare(config, base.base_hash) for kind in (Control, Diversity))
    validation = Validation.prepare(config, base.base_hash, control)
    schedule = Schedule.from_config(base.scheduler_config).to(device)
    objective = Objective.of(config)
    adapted = AdaptedUNet(load_unet(base, config, device, dtype))

    # -- Adapters: the teacher's, then the one that is trained; everything else is frozen --------------------
    styles = add_teacher_adapters(adapted, config.teacher, base)
    adapted.add_lora(config.adapter, seed=config.seed)
    start = start_from(adapted, config.adapter, base)
    if config.matching:
        adapted.add_lora(config.adapter, name=FAKE, seed=config.seed + 1, on_teacher=True)

    # -- Optimizers: one of each LoRA that is trained --------------------------------------------------------
    o = config.optimizer
    made = [make_optimizer(adapted.parameters(name), o, device) for name in adapted.trained]
    model, *made = runtime.prepare(accelerator, adapted, *made)
    optimizers = dict(zip(adapted.trained, made, strict=True))
    ema = flattened(adapted.parameters()) if config.second_set else []  # other objects, if they were sharded
    compiling.compile_blocks(model, config, partial(say, accelerator))

    # -- Resume: a run keeps what one step sees, however many processes there are now ------------------------
    files = [style.sha256 for style in (*styles, *start)]
    origin, state = runtime.resume(
        accelerator, config, unet=base.hash_of("unet"), data=cache.fingerprint, teacher=files,
        base=base.base_hash,
    )  # fmt: skip
    saver = runtime.Saver(accelerator, config, origin, adapted, {TRAINED: ema}, optimizers)
    done, window = 0, []
    if state:
        saver.restore(state)
        done, window = state.step, state.window
        say(accelerator, f"{run}: continuing after step {done} of {config.steps}")
    run_folder.begin(config, accelerator)
    metrics = run_metrics.Metrics.open(config, accelerator, done)

    # -- Data: latents and embeddings, and randomness, on the device -----------------------------------------
    local_batch, reuse = origin.batch // origin.world, config.teacher.reuse
    places = accelerator.process_index, accelerator.num_processes
    batches = Batches(trained, local_batch, config.seed, *places, sources.mix_of(trained, config.data))
    empty = cache.empty()

    def needed(step: int) -> tuple[Batch, StepRandomness]:
        batch = batches.at(step // reuse)
        drawn = step_randomness(config, objective.method, schedule, batch, step)
        return batch.without_captions(drawn.dropped, empty).to(device), drawn.to(device)

    # -- The parts that one UNet plays, and the losses between them ------------------------------------------
    roles = Roles(
        adapted, model, ema, empty.to(device, dtype), schedule, base.prediction_type, objective,
        dtype, both=two_teachers(config) and runtime.sharded(accelerator),
        padded=compiling.wants(config, device),
    )  # fmt: skip

    def given(batch: Batch, drawn: StepRandomness, part: slice, group: int | None = None) -> Given:
        return Given(
            batch.latents[part], drawn.noise[part], Times(*(time[part] for time in drawn.times)),
            drawn.guidance[part], batch.condition[part].to(dtype=dtype),
            taught_by_plain_base(config, batch.ids[part]),
            None if group is None else (group, part.start), drawn.intervals, batch.weights_of(part),
        )  # fmt: skip

    # -- Measuring: held-out pictures, on the final grid with draws of no step; control; diversity -----------
    def held_out_losses(batch: Batch) -> Tensor:
        final = replace(config, grid=replace(config.grid, steps_start=None), loss=Loss())  # draws ask no loss
        drawn = step_randomness(final, objective.method, schedule, batch, -1)
        return roles.losses(given(batch.to(device), drawn.to(device), slice(None)))

    held_out = HeldOut(kept, config.seed, schedule.steps, config.batch_size)
    measures = held_out.measures(held_out_losses) | control.measures(adapted) | diversity.measures(adapted)
    tell = partial(
        of_training, config, base, cache.fingerprint, teacher=styles, start=start, rights=cache.rights,
        runs=cache.runs,
    )  # fmt: skip
    measuring = BestCheckpoint(config, saver, metrics, tell, measures, validation)

    # -- Loop: gradients by as many samples at once as memory allows -----------------------------------------
    learning = turns.Turns.of(accelerator, roles, config, optimizers, metrics, local_batch, done, window)
    guard = learning.student.guard
    ahead = Ahead(needed, config.steps, device)
    with (
        run_metrics.progress(accelerator, done, config.steps) as advance,
        stoppable(accelerator) as asked,
        stepping.oom_as_user_error(run),
    ):
        measuring.start(done)
        for step in range(done, config.steps):
            started, done = time.perf_counter(), step + 1
            stage = stage_at(config, step)
            roles.begin(step, stage)
            batch, drawn = ahead.at(step)
            rate = runtime.learning_rate(o, step - stage.first, stage.steps)
            rows = partial(given, batch, drawn, group=step // reuse if reuse > 1 else None)
            learning.step(done, rate, rows, drawn.turns, batch.ids)
            ahead.prepare(done)

            last = done == config.steps
            stop = 0 if last else asked()
            logged = last or done % config.logging.every == 0
            saved = last or done % config.checkpoint.every == 0 or stop != 0
            if logged or saved or measuring.due(done):
                learning.settle()
            speed = advance(guard.last.loss, origin.batch, time.perf_counter() - started)
            if logged and guard.window:
                told = {"lr": rate, "images_per_second": speed, **learning.figures()}
                metrics.log(done, loss=guard.mean(), grad_norm=guard.last.norm, **told)
            if not stop:
                measuring.after(done)
            if saved:
                saver.save(done, guard.window)
            if stop:
                leave(accelerator, run, stop, done, config.steps)

    # -- Save: the best of the measured weights; not their EMA, which is the target's affair -----------------
    measuring.finish(done)
    run_folder.say_finished(accelerator, run, done)
    accelerator.end_training()
    return run
