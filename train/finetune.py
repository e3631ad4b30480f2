"""Style LoRA: the ordinary denoising loss on brand pictures; draws as its base does, in another style.

    lcm-kit train configs/finetune/tiny_brand.yaml
    accelerate launch --num_processes 4 -m lcm_kit train configs/finetune/tiny_brand.yaml

The UNet with its LoRA must tell the noise that was mixed into a cached picture (or v, if that is what the
base outputs), errors weighted by min-SNR (arXiv:2303.09556), some captions left out so that guidance keeps
working. Beside each brand picture the base's own pictures can be trained on (prior preservation, DreamBooth,
arXiv:2208.12242). The result are the weights with the lowest loss on held-out pictures, not the last, of
those that have not forgotten how to draw the control prompts.

`lcm-kit encode` with the same config comes first: training reads latents and embeddings only. The same
command continues an interrupted run, bit for bit on a CPU. To try another idea, copy it and change it.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lcm_kit import bases
from lcm_kit.adapter import text as text_lora
from lcm_kit.adapter.adapted_unet import TRAINED, AdaptedUNet
from lcm_kit.adapter.trained_weights import swapped
from lcm_kit.bases.compiling import compile_blocks
from lcm_kit.bases.condition import Condition
from lcm_kit.bases.memory import load_unet, make_optimizer, set_rates
from lcm_kit.config.finetune import Finetune
from lcm_kit.core.flat import flattened
from lcm_kit.core.losses import l2
from lcm_kit.core.prediction import predictor
from lcm_kit.core.schedule import Schedule
from lcm_kit.core.step import diffusion_loss, snr_weight, weighed
from lcm_kit.core.transfer import sent
from lcm_kit.data import prior, sources
from lcm_kit.data.batches import Batch, Batches, draw
from lcm_kit.data.captions import live
from lcm_kit.data.split import split
from lcm_kit.io.locks import alone
from lcm_kit.lora.provenance_rules import of_training
from lcm_kit.training import release, run_folder, run_metrics, runtime, stepping, updates
from lcm_kit.training.ahead import Ahead
from lcm_kit.training.control import StyleControl
from lcm_kit.training.held_out import BestCheckpoint, HeldOut
from lcm_kit.training.processes import say
from lcm_kit.training.stopping import leave, stoppable
from lcm_kit.training.validation import StyleValidation


class StepRandomness(NamedTuple):
    """The randomness of one step for the samples of this process, each from its own (seed, step, slot)."""

    noise: Tensor  # [B, C, h, w]
    t: Tensor  # int64 [B]
    dropped: Tensor  # bool [B], on the host: trained on without its caption

    def to(self, device: torch.device) -> StepRandomness:
        """The same with noise and times on `device`."""
        return StepRandomness(sent(self.noise, device), sent(self.t, device), self.dropped)


def step_randomness(
    config: Finetune, timesteps: int, batch: Batch, step: int, whose: str = ""
) -> StepRandomness:
    """Draw noise, a time of `timesteps` and whether the caption is left out, for every sample of `batch`.

    `whose` tells the prior's randomness from the brand's.
    """
    shape = batch.latents.shape[1:]

    def of(purpose: str, f: Any) -> Tensor:
        return draw(config.seed, step, batch.slots, whose + purpose, f)

    noise = of("noise", lambda g: torch.randn(shape, generator=g))
    if config.loss.noise_offset:
        noise += config.loss.noise_offset * of("offset", lambda g: torch.randn(shape[0], 1, 1, generator=g))
    times = of("times", lambda g: torch.randint(timesteps, (), generator=g))
    chance = of("dropout", lambda g: torch.rand((), generator=g))
    return StepRandomness(noise, times, chance < config.caption_dropout)


@release.released
@alone("train", lambda config: config.output, needed=False)  # a finished run needs none
def main(config: Finetune) -> Path:
    """Train as `config` says and return the run's folder. Raises `UserError` for what the user can fix."""
    # -- Runtime: processes, precision, the run's folder -----------------------------------------------------
    run = Path(config.output)
    accelerator = runtime.start(config)
    device, dtype = accelerator.device, runtime.dtype(accelerator)
    if not run_folder.claim(config, accelerator):
        return run

    # -- Parts: the base's UNet and schedule, the pictures ---------------------------------------------------
    base = bases.inspect_base(config.base.path, revision=config.base.revision, variant=config.base.variant)
    kind = base.prediction_type
    text = text_lora.load(base, config, device)  # None: captions are as they were encoded
    cache = live(sources.open_images(config.data, base), text)
    trained, kept = split(cache, config.validation.held_out, config.seed)
    own = live(prior.open_cache(config, base), text)
    fingerprint = cache.fingerprint + (f"+{own.fingerprint}" if own else "")
    control = StyleControl.prepare(config, base.base_hash)
    validation = StyleValidation.prepare(config, base.base_hash, control)
    schedule = Schedule.from_config(base.scheduler_config).to(device)
    weight = snr_weight(schedule, kind, config.loss.min_snr_gamma, config.loss.snr_floor)
    adapted = AdaptedUNet(load_unet(base, config, device, dtype))

    # -- Adapter: the LoRA that is trained; everything else is frozen ----------------------------------------
    adapted.add_lora(config.adapter, seed=config.seed)
    groups = text_lora.joined(adapted, text, config)

    # -- Optimizer -------------------------------------------------------------------------------------------
    o = config.optimizer
    model, optimizer = runtime.prepare(accelerator, adapted, make_optimizer(groups, o, device))
    lora = adapted.parameters()  # other objects, if they were sharded
    ema = flattened(lora) if config.ema else []
    compile_blocks(model, config, partial(say, accelerator))

    # -- Resume: a run keeps what one step sees, however many processes there are now ------------------------
    hashes = {"unet": base.hash_of("unet"), "data": fingerprint, "base": base.base_hash}
    origin, state = runtime.resume(accelerator, config, **hashes)
    saver = runtime.Saver(accelerator, config, origin, adapted, {TRAINED: ema}, {TRAINED: optimizer})
    done, window = 0, []
    if state:
        saver.restore(state)
        done, window = state.step, state.window
        say(accelerator, f"{run}: continuing after step {done} of {config.steps}")
    run_folder.begin(config, accelerator)
    metrics = run_metrics.Metrics.open(config, accelerator, done)

    # -- Data: latents, embeddings and randomness on the device, of the brand's and of the base's own --------
    local_batch = origin.batch // origin.world
    place = accelerator.process_index, accelerator.num_processes
    batches = Batches(trained, local_batch, config.seed, *place, sources.mix_of(trained, config.data))
    beside = Batches(own, local_batch, config.seed + 1, *place) if own else None
    empty = cache.empty()

    def drawn_from(source: Batches, step: int, whose: str) -> tuple[Batch, StepRandomness]:
        batch = source.at(step)
        drawn = step_randomness(config, schedule.steps, batch, step, whose)
        return batch.without_captions(drawn.dropped, empty).to(device), drawn.to(device)

    def needed(step: int) -> list[tuple[float, Batch, StepRandomness]]:
        parts = [(1.0, *drawn_from(batches, step, ""))]
        if beside:
            parts.append((config.prior.weight, *drawn_from(beside, step, "prior ")))
        return parts

    # -- Loss: of the raw output against what it should be, as it weighs at its time -------------------------
    def losses_at(x0: Tensor, condition: Condition, noise: Tensor, t: Tensor, cells: Tensor | None) -> Tensor:
        told, t = condition.to(device, dtype).kwargs(), t.to(device)
        cells = None if cells is None else cells.to(device)
        student = predictor(lambda x, t: model(x.to(dtype), t, **told).sample, schedule, kind)
        return weight[t] * diffusion_loss(
            kind=kind, loss=weighed(lambda a, b: l2(a, b, 0.0), cells), schedule=schedule,
            student=student, x0=x0.to(device), noise=noise.to(device), t=t,
        )  # fmt: skip

    def losses_of(parts: list[tuple[float, Batch, StepRandomness]], part: slice) -> Tensor:
        losses = torch.zeros((), device=device)
        for factor, batch, drawn in parts:
            given = batch.latents[part], batch.condition[part], drawn.noise[part], drawn.t[part]
            losses = losses + factor * losses_at(*given, batch.weights_of(part))
        return losses

    # -- Measuring: the weights that would be saved, on held-out pictures and on the base's own --------------
    held_out = HeldOut(kept, config.seed, schedule.steps, config.batch_size)
    measures = held_out.measures_at(losses_at) | control.measures_at(adapted, held_out, losses_at, text)
    tell = partial(of_training, config, base, fingerprint, rights=cache.rights, runs=cache.runs)
    result = partial(swapped, lora, ema or lora)
    measuring = BestCheckpoint(config, saver, metrics, tell, measures, validation, result)

    # -- Loop: gradients by as many samples at once as memory allows -----------------------------------------
    forward = min(config.batch_size, local_batch)
    passes = stepping.Passes(accelerator, model, lora, local_batch, forward, o.grad_clip)
    guard = updates.Guard(accelerator, config, metrics, optimizer, lora, ema, window, updates=done)
    ahead = Ahead(needed, config.steps, device)
    with (
        run_metrics.progress(accelerator, done, config.steps) as advance,
        stoppable(accelerator) as asked,
        stepping.oom_as_user_error(run),
    ):
        measuring.start(done)
        for step in range(done, config.steps):
            started, done = time.perf_counter(), step + 1
            parts = ahead.at(step)
            rate = runtime.learning_rate(o, step, config.steps)
            set_rates(optimizer, rate)
            guard.update(done, passes(done, partial(losses_of, parts)), parts[0][1].ids)
            optimizer.zero_grad()
            ahead.prepare(done)

            last = done == config.steps
            stop = 0 if last else asked()
            logged = last or done % config.logging.every == 0
            saved = last or done % config.checkpoint.every == 0 or stop != 0
            if logged or saved or measuring.due(done):
                guard.settle()
            speed = advance(guard.last.loss, origin.batch, time.perf_counter() - started)
            if logged and guard.window:
                told = {"lr": rate, "images_per_second": speed}
                metrics.log(done, loss=guard.mean(), grad_norm=guard.last.norm, **told)
            if not stop:
                measuring.after(done)
            if saved:
                saver.save(done, guard.window)
            if stop:
                leave(accelerator, run, stop, done, config.steps)

    # -- Save: the best of the measured weights, or of their EMA ---------------------------------------------
    measuring.finish(done)
    run_folder.say_finished(accelerator, run, done)
    accelerator.end_training()
    return run
