"""Over-training: the loss on pictures that are not trained on, and the weights that were best by it.

The rule: of the checkpoints that were measured, the one with the lowest held-out loss is the result. Noise
and timesteps are the same in every measurement, so that two differ by the weights alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lcm_kit.adapter import FACTS, WEIGHTS, read_facts
from lcm_kit.data.batches import draw
from lcm_kit.data.split import Rows
from lcm_kit.families.condition import Condition
from lcm_kit.files import atomic_folder
from lcm_kit.overtraining import NAME, verdict
from lcm_kit.runtime import Metrics, Saver, main_does

TIMES = 8  # timesteps at which each picture is measured, in the middles of as many equal parts
BEST = "best"  # folder of the run: the best weights so far, as in adapter/

LossesAt = Callable[[Tensor, Condition, Tensor, Tensor], Tensor]
"""(x0 [n, C, h, w], n conditions, noise [n, C, h, w], t int64 [n]) -> losses [n]."""


@dataclass(frozen=True)
class HeldOut:
    """The mean loss over held-out pictures, each at the same `TIMES` timesteps and with the same noise."""

    pictures: Rows
    seed: int
    timesteps: int  # T, of the schedule
    batch_size: int  # pictures a forward

    @torch.no_grad()
    def __call__(self, losses_at: LossesAt) -> float:
        """Measure the weights as they are now, through `losses_at`."""
        total, count = 0.0, len(self.pictures) * TIMES
        for first in range(0, count, self.batch_size):
            slots = range(first, min(first + self.batch_size, count))
            total += float(losses_at(*self._noised(slots)).sum())
        return total / count

    def _noised(self, slots: range) -> tuple[Tensor, Condition, Tensor, Tensor]:
        """What to measure: slot k is picture k // TIMES at the time k % TIMES."""
        pictures = [slot // TIMES for slot in slots]
        t = torch.tensor([(2 * (slot % TIMES) + 1) * self.timesteps // (2 * TIMES) for slot in slots])
        x0 = self.pictures.latents(pictures)
        noise = draw(self.seed, 0, slots, "held out", lambda g: torch.randn(x0.shape[1:], generator=g))
        return x0, self.pictures.condition(pictures), noise, t


@dataclass
class Best:
    """The best weights so far; all processes call it, and only the main one writes."""

    saver: Saver
    metrics: Metrics
    step: int = 0  # 0: nothing was measured yet
    loss: float = math.inf

    @classmethod
    def open(cls, saver: Saver, metrics: Metrics, done: int) -> Best:
        """As it was after `done` steps. What was found later is found again, since training goes on there."""
        folder = saver.run / BEST

        def look() -> tuple[int, float]:
            if not (folder / FACTS).is_file():
                return 0, math.inf
            facts = read_facts(folder)
            return (facts["step"], facts[NAME]) if facts["step"] <= done else (0, math.inf)

        return cls(saver, metrics, *main_does(saver.accelerator, look))

    def offer(self, step: int, loss: float, facts: Mapping[str, Any]) -> None:
        """Keep the weights as they are now, after `step` steps, if `loss` is the lowest so far."""
        if loss < self.loss:
            self.step, self.loss = step, loss
            self.saver.adapter({**facts, "step": step, NAME: loss}, BEST)

    def finish(self, facts: Mapping[str, Any]) -> None:
        """Write the run's adapter: the best weights, or those of now if nothing was measured. Say which."""
        if not self.step:
            self.saver.adapter({**facts, "step": facts["steps"]})
            return
        main_does(self.saver.accelerator, lambda: self._copy(facts))
        for sentence in verdict(self.metrics.of(NAME), self.step):
            self.saver.accelerator.print(f"{self.saver.run}: {sentence}")

    def _copy(self, facts: Mapping[str, Any]) -> None:
        best = self.saver.run / BEST
        with atomic_folder(self.saver.run / "adapter") as folder:
            (folder / WEIGHTS).write_bytes((best / WEIGHTS).read_bytes())
            text = json.dumps({**read_facts(best), **facts}, indent=2)
            (folder / FACTS).write_text(text + "\n", encoding="utf-8")
