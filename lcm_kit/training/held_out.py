"""What is measured while a LoRA trains, besides its own loss, and the weights that are the result.

Held-out pictures of the style tell over-training, control prompts tell forgetting, pictures of one prompt
collapse (`overtraining.py` has the rule and the words). Noise and times are the same in every measurement, so
that two differ by the weights alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from lcm_kit.adapter.folder import FACTS, WEIGHTS, read_provenance, read_weights
from lcm_kit.bases.condition import Condition
from lcm_kit.config import schema
from lcm_kit.data.batches import Batch, Samples, draw
from lcm_kit.io import own_files
from lcm_kit.io.files import atomic_folder, discard
from lcm_kit.lora import provenance
from lcm_kit.training.overtraining import DIVERSITY, HELD_OUT_LOSS, Measured, fallen, of_tables, verdict
from lcm_kit.training.processes import say
from lcm_kit.training.run_metrics import Metrics
from lcm_kit.training.runtime import Saver, main_does, validate
from lcm_kit.training.validation import Validation, due

TIMES = 8  # timesteps at which each picture is measured, in the middles of as many equal parts
BEST = "best"  # folder of the run: a folder for each step whose weights are or may yet be the result

LossesAt = Callable[[Tensor, Condition, Tensor, Tensor, Tensor | None], Tensor]
"""(x0 [n, C, h, w], n conditions, noise [n, C, h, w], t int64 [n], weights of cells [n, 1, h, w] or None:
all alike) -> losses [n]."""

LossesOf = Callable[[Batch], Tensor]
"""A batch -> losses [n]."""
Measures = dict[str, Callable[[], float]]
"""Figures of the weights as they are, by name: of `HELD_OUT_LOSS`, `DIVERSITY`, the keys of `TOLERANCE`."""


@dataclass(frozen=True)
class HeldOut:
    """The mean loss over pictures, each `TIMES` times with the same randomness in every measurement."""

    pictures: Samples
    seed: int
    timesteps: int  # T, of the schedule
    batch_size: int  # pictures a forward

    def measures(self, losses_of: LossesOf) -> Measures:
        """`mean` of `losses_of` under its name; nothing where there are no pictures."""
        return {HELD_OUT_LOSS: partial(self.mean, losses_of)} if len(self.pictures.ids) else {}

    def measures_at(self, losses_at: LossesAt) -> Measures:
        """`mean_at` of `losses_at` under its name; nothing where there are no pictures."""
        return {HELD_OUT_LOSS: partial(self.mean_at, losses_at)} if len(self.pictures.ids) else {}

    def mean_at(self, losses_at: LossesAt) -> float:
        """The mean of `losses_at`, each picture at the same timesteps, with noise of its own at each."""

        def losses_of(batch: Batch) -> Tensor:
            places = [(2 * (slot % TIMES) + 1) * self.timesteps // (2 * TIMES) for slot in batch.slots]
            shape = batch.latents.shape[1:]
            noise = draw(self.seed, 0, batch.slots, "held out", lambda g: torch.randn(shape, generator=g))
            return losses_at(batch.latents, batch.condition, noise, torch.tensor(places), batch.weights)

        return self.mean(losses_of)

    @torch.no_grad()
    def mean(self, losses_of: LossesOf) -> float:
        """The mean of `losses_of`, which draws for itself: slot k of a batch is picture k // TIMES."""
        total = 0.0
        for slots in self._batches():
            places = [slot // TIMES for slot in slots]
            latents, condition = self.pictures.latents(places), self.pictures.condition(places)
            ids, weights = [self.pictures.ids[place] for place in places], self.pictures.weights(places)
            total += float(losses_of(Batch(latents, condition, ids, slots, weights)).sum())
        return total / (len(self.pictures.ids) * TIMES)

    def _batches(self) -> Iterator[range]:
        """Places one after the other, each batch of one shape."""
        first = 0
        for _, runs in groupby(self.pictures.runs, key=lambda run: run.shape):
            last = first + TIMES * sum(run.rows for run in runs)
            for begin in range(first, last, self.batch_size):
                yield range(begin, min(begin + self.batch_size, last))
            first = last


@dataclass(frozen=True)
class BestCheckpoint:
    """Draws and measures while a LoRA trains, and keeps the weights that are or may yet be the result.

    All processes call it together.
    """

    config: schema.Training
    saver: Saver
    metrics: Metrics
    facts: Callable[[int], provenance.Provenance]  # by steps: what is written beside the weights
    measures: Measures
    validation: Validation | None  # draws pictures
    # the block in which the weights are those that would be saved
    weights: Callable[[], AbstractContextManager[None]] = nullcontext

    def start(self, done: int) -> None:
        """Before the first step, or when a run goes on after `done`: measure what has not been.

        That is the start, or what a run that was stopped had no time for. Weights of later steps are
        forgotten: training finds them again.
        """
        main_does(self.saver.accelerator, lambda: self._forget(lambda step: step > done))
        lacking = any(done not in self.metrics.of(name) for name in self.measures)
        if lacking and (not done or due(self.config.validation, done, self.config.steps)):
            self._measure(done)

    def due(self, step: int) -> bool:
        """Whether it is time to draw and measure after `step` steps."""
        return due(self.config.validation, step, self.config.steps)

    def after(self, step: int) -> None:
        """Draw and measure after `step` steps, if it is time to."""
        if not self.due(step):
            return
        with self.weights():
            if self.validation:
                drawing = partial(self.validation, self.saver.adapted, step)
                self.metrics.log(step, **validate(self.saver.accelerator, drawing, self.validation.distance))
        if self.measures:
            self._measure(step)

    def finish(self, steps: int) -> None:
        """Write the run's adapter: what the rule keeps, or the weights of now if nothing was measured."""
        measured, facts = self._measured(), self.facts(steps)
        kept = measured.best(self._steps())
        if kept:
            main_does(self.saver.accelerator, lambda: self._copy(kept, facts))
        else:
            last = measured.diversity.get(steps)
            with self.weights():
                self.saver.adapter(facts.of_weights(steps, {} if last is None else {DIVERSITY: last}))
        for sentence in verdict(measured, kept):
            say(self.saver.accelerator, f"{self.saver.run}: {sentence}")

    def _measure(self, step: int) -> None:
        """Measure and log, and keep the weights if the rule may."""
        found: dict[str, float] = {}
        with self.weights():
            for name, measure in self.measures.items():
                found |= validate(self.saver.accelerator, measure, name)
            found = {name: value for name, value in found.items() if math.isfinite(value)}
            measured = self._measured(step, found)
            wanted = measured.candidates([*self._steps(), step])
            if step in wanted:  # before the figures are logged: where they are, the weights are
                facts = self.facts(step).of_weights(step, found)
                self.saver.adapter(facts, f"{BEST}/step-{step:06d}")
        self.metrics.log(step, **found)
        main_does(self.saver.accelerator, lambda: self._forget(lambda each: each not in wanted))
        for sentence in fallen(measured, step) if step < self.config.steps else ():  # `finish` says the last
            say(self.saver.accelerator, f"{self.saver.run}: {sentence}")

    def _measured(self, step: int = 0, found: Mapping[str, float] | None = None) -> Measured:
        """The figures until now, and those `found` after `step`: the same on every process."""
        tables = {name: self.metrics.of(name) for name in self.measures}
        for name, value in (found or {}).items():
            tables[name][step] = value
        return of_tables(tables, self.config.recipe)

    def _steps(self) -> list[int]:
        """The steps whose weights are there: the same on every process."""
        return main_does(self.saver.accelerator, lambda: sorted(self._folders()))

    def _folders(self) -> dict[int, Path]:
        found = (self.saver.run / BEST).glob("step-*")
        return {int(folder.name.removeprefix("step-")): folder for folder in found}

    def _forget(self, which: Callable[[int], bool]) -> None:
        for step, folder in self._folders().items():
            if which(step):
                discard(folder)

    def _copy(self, kept: int, facts: provenance.Provenance) -> None:
        best = self._folders()[kept]
        its = read_provenance(best)
        whole = replace(facts, **its.measured)
        with atomic_folder(self.saver.run / "adapter") as folder:
            own_files.write_tensors(folder / WEIGHTS, read_weights(best))
            own_files.write_json(
                folder / FACTS, provenance.trained(whole, its.lora_config, its.text_lora_config)
            )
