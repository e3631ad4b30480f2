"""The update of a step: made where its loss and gradients are numbers, and told of when they are known here.

On a GPU the host does not wait for a step. Whether its update is made is decided there: torch's fused AdamW
takes the flag `found_inf` as a tensor, by which its kernel leaves weights, moments and its count of steps as
they are, and the average of the weights follows by a factor of 0. Loss, norm and losses are copied into
pinned memory meanwhile and read when the next step has been given to the GPU: then it is said what was left
out, and a run that diverged stops, one step late, with nothing of that on its weights. What writes a step's
figures or weights reads them first (`Guard.settle`). An optimizer without that flag, as that in 8 bits, is
called or not by what the host has read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from lcm_kit.adapter.trained_weights import update_ema
from lcm_kit.config import schema
from lcm_kit.core.flat import alike
from lcm_kit.core.transfer import sent
from lcm_kit.errors import UserError
from lcm_kit.training import run_files
from lcm_kit.training.processes import say
from lcm_kit.training.run_metrics import Metrics
from lcm_kit.training.runtime import gathered
from lcm_kit.training.stepping import Step

MOST_SKIPPED = 10  # steps in a row whose loss is not finite, before training stops anyway
# Updates in a row that float16's scaler leaves out, before training stops: its scale begins at 2^16 and is
# halved each time, so that gradients that fit in float16 at all have fitted for long
MOST_OVERFLOWS = 24
_NAMED = 16  # records that a message names; more are counted
_AT_ONCE = 64  # tensors of the average that are moved at once: a copy of so many is held meanwhile


class Figures(NamedTuple):
    """A step's, as numbers."""

    loss: float
    norm: float
    losses: list[float]


class _Underway(NamedTuple):
    """A step's figures on their way to the host."""

    number: int
    ids: Sequence[str]
    figures: Tensor  # [2 + share] on the host: loss, norm, losses
    arrived: Any  # None: they have

    @classmethod
    def of(cls, number: int, ids: Sequence[str], figures: Tensor) -> _Underway:
        """Send `figures` off."""
        host = torch.empty(figures.shape, dtype=figures.dtype, pin_memory=figures.is_cuda)
        host.copy_(figures, non_blocking=True)
        arrived = torch.cuda.Event() if figures.is_cuda else None
        if arrived:
            arrived.record()
        return cls(number, ids, host, arrived)

    def read(self) -> Figures:
        """Wait for them."""
        if self.arrived:
            self.arrived.synchronize()
        loss, norm, *losses = self.figures.tolist()
        return Figures(loss, norm, losses)


@dataclass
class Guard:
    """Makes the updates, but none whose loss or gradient is NaN or Inf: `config.non_finite` says how."""

    accelerator: Accelerator
    config: schema.Training
    metrics: Metrics
    optimizer: Any
    weights: Sequence[Tensor]  # that it trains
    ema: Sequence[Tensor] = ()  # their average; none: there is no average
    window: list[float] = field(default_factory=list)  # losses since the last logged line
    updates: int = 0  # that were made, those before a continuation among them
    skipped: int = 0  # steps in a row
    overflowed: int = 0  # updates in a row that float16's scaler left out
    left_out: int = 0  # all of them, by this process
    last: Figures = Figures(math.nan, math.nan, [])  # of the last step that is known
    _underway: _Underway | None = None

    def update(self, number: int, step: Step, ids: Sequence[str]) -> None:
        """Make the update of step `number` (from 1), whose records are `ids` on this process, if it is good.

        Where it is to be skipped there are a warning and a line in metrics.jsonl, by the next call or by
        `settle`. These raise `UserError` where it is to stop, or has skipped `MOST_SKIPPED` steps in a row.
        With float16 a gradient alone that is not finite is no fault: its scaler finds the scale by that. They
        are counted: `UserError` after `MOST_OVERFLOWS` in a row, or where the last step made the first update
        of all and left it out.
        """
        self.settle()
        norm = sent(step.norm, step.loss.device)
        figures = torch.cat([torch.stack([step.loss.float(), norm.float()]), step.losses.float()])
        underway = _Underway.of(number, ids, figures)
        if self._flagged:
            self._underway = underway
            self._make_unless(figures[:2].isfinite().all().logical_not().float())
        elif self._judge(underway):
            self.optimizer.step()
            if self.ema and math.isfinite(self.last.norm):
                update_ema(self.ema, self.weights, self.config.ema)
        elif self.accelerator.scaler:
            # clipping has told it of these gradients, and it wants a step after that
            self.accelerator.scaler.update()

    def settle(self) -> None:
        """Wait until the last update is known, and tell of it. Raises `UserError` as `update` says."""
        underway, self._underway = self._underway, None
        if underway:
            self._judge(underway)

    def mean(self) -> float:
        """The mean of the losses in the window, which is empty then."""
        mean = sum(self.window) / len(self.window)
        self.window = []
        return mean

    # -- On the device ---------------------------------------------------------------------------------------

    @property
    def _flagged(self) -> bool:
        """Whether the optimizer takes a flag on the device: torch's fused ones."""
        return getattr(self._plain, "_step_supports_amp_scaling", False)

    @property
    def _plain(self) -> Any:
        """The optimizer without accelerate around it."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def _make_unless(self, bad: Tensor) -> None:
        """The update where `bad`, on the device, is 0; nothing where it is 1."""
        plain = self._plain
        plain.found_inf, plain.grad_scale = bad, None  # as `GradScaler.step` does, after clipping unscaled
        try:
            plain.step()
        finally:
            del plain.found_inf, plain.grad_scale
        if self.accelerator.scaler:
            self.accelerator.scaler.update()
        if self.ema:
            _follow(self.ema, self.weights, (1.0 - self.config.ema) * (1.0 - bad))

    # -- On the host -----------------------------------------------------------------------------------------

    def _judge(self, underway: _Underway) -> bool:
        """Whether a step's update is made, and what is to be said of that."""
        number, ids = underway.number, underway.ids
        self.last = underway.read()
        what = self._fault()
        if what is None:
            self._count(number)
            self.skipped = 0
            self.window.append(self.last.loss)
            return True
        self.skipped += 1
        which = f"the {what} at step {number}, records {self._records(ids)}"
        if self.config.non_finite == "stop" or self.skipped == MOST_SKIPPED:
            raise UserError(self._last_words(which))
        say(self.accelerator, f"warning: {which}; this step's update is left out")
        self.metrics.log(number, skipped=1)
        return False

    def _fault(self) -> str | None:
        if not math.isfinite(self.last.loss):
            return f"loss is {self.last.loss}"
        if not math.isfinite(self.last.norm) and not self.accelerator.scaler:
            return f"gradient's norm is {self.last.norm}"
        return None

    def _count(self, number: int) -> None:
        over = self.accelerator.scaler is not None and not math.isfinite(self.last.norm)
        self.overflowed = self.overflowed + 1 if over else 0
        self.left_out += over
        self.updates += not over
        end = number == self.config.steps
        if self.overflowed == MOST_OVERFLOWS or (end and not self.updates):
            raise UserError(
                f"the gradients of the last {self.overflowed} steps until step {number} overflowed in "
                f"float16, at a scale of {self._scale():g} as well, and no update was made by them; train "
                "again with precision=bfloat16 or float32, or with a lower optimizer.lr"
            )
        if end and self.left_out:
            say(
                self.accelerator,
                f"{self.left_out} updates were left out, since their gradients overflowed in float16; a few "
                "while the scale is found are usual",
            )

    def _scale(self) -> float:
        """By which the gradients of a step that overflowed were multiplied: it may be smaller by now."""
        scaler = self.accelerator.scaler
        return scaler.get_scale() / (scaler.get_backoff_factor() if self._flagged else 1.0)

    def _records(self, ids: Sequence[str]) -> str:
        """The records with such a loss, of all processes; all of the batch if it is the gradient alone."""
        broken = [id for id, loss in zip(ids, self.last.losses, strict=True) if not math.isfinite(loss)]
        found = gathered(self.accelerator, broken) or gathered(self.accelerator, list(ids))
        more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
        return ", ".join(found[:_NAMED]) + more

    def _last_words(self, which: str) -> str:
        states = run_files.folders(Path(self.config.output))
        good = f"the last good checkpoint is {states[-1]}" if states else "there is no checkpoint yet"
        on = "train again, which goes on from there, with a" if states else "train again with a"
        times = f", the {self.skipped}th in a row" if self.skipped > 1 else ""
        return (
            f"{which}{times}: training diverged ({good}); {on} lower optimizer.lr, a lower "
            "optimizer.grad_clip or more optimizer.warmup_steps, with bfloat16 where precision is float16, "
            "or with non_finite=skip, which leaves such steps out"
        )


@torch.no_grad()
def _follow(average: Sequence[Tensor], parameters: Sequence[Tensor], rate: Tensor) -> None:
    """In place: average += rate (parameters - average), for a rate that the device alone knows."""
    averages, weights = alike(average, parameters)
    for first in range(0, len(averages), _AT_ONCE):
        some = averages[first : first + _AT_ONCE]
        way = torch._foreach_sub(weights[first : first + _AT_ONCE], some)
        torch._foreach_mul_(way, rate)
        torch._foreach_add_(some, way)
