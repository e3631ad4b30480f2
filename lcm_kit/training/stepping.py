"""One optimizer step's gradients, however little memory there is, and what to do if they are no numbers."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from lcm_kit.config import schema
from lcm_kit.core.flat import clip_grad_norm_, whole
from lcm_kit.core.sharding import full_tensor
from lcm_kit.errors import UserError
from lcm_kit.training import run_files
from lcm_kit.training.out_of_memory import out_of_memory
from lcm_kit.training.processes import say
from lcm_kit.training.run_metrics import Metrics
from lcm_kit.training.runtime import any_of, gathered, sharded

MOST_SKIPPED = 10  # steps in a row whose loss is not finite, before training stops anyway
# Updates in a row that float16's scaler leaves out, before training stops: its scale begins at 2^16 and is
# halved each time, so that gradients that fit in float16 at all have fitted for long
MOST_OVERFLOWS = 24
_NAMED = 16  # records that a message names; more are counted
_BUCKET = 2**24  # gradients that are averaged over processes at once
_HELP = (
    "run the same command again with gradient_checkpointing=true, it continues; or start another run with "
    "memory.quantize=nf4, with a smaller data.resolution or adapter.rank"
)

# -- Gradients -----------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """What the passes of one optimizer step gave; the gradients lie in the parameters, clipped."""

    loss: float  # mean over the samples of all processes
    norm: float  # L2 of all gradients before clipping
    losses: Tensor  # [share] of this process's samples


@dataclass
class Passes:
    """Forwards and backwards of a step: `micro` samples at once, fewer for good after memory ran out.

    The gradients are those of the mean over the samples of all processes, whatever the split. Processes
    average them here, after the last backward, and not inside it as DistributedDataParallel does: one that
    runs out of memory in a backward would leave the others waiting for it.
    """

    accelerator: Accelerator
    model: Any  # as `runtime.prepare` gives it
    parameters: Sequence[Tensor]
    share: int  # samples of a step on this process
    micro: int  # samples a forward, at most
    grad_clip: float

    def __call__(self, step: int, losses_of: Callable[[slice], Tensor]) -> Step:
        """Run `losses_of` (a part of this process's samples -> their losses [n]) over all of them.

        Where CUDA runs out of memory the same step starts again with half the samples a forward. Raises
        `UserError` if one sample is too many, or if parameters are sharded: then processes cannot agree.
        """
        while True:
            done = self._try(losses_of)
            if not any_of(self.accelerator, done is None):
                break
            self._halve(step)
        assert done is not None
        loss, losses = done
        self._average()
        norm = self._clip()
        mean = self.accelerator.reduce(loss, "mean")
        return Step(float(mean), float(full_tensor(norm)), losses)

    def _try(self, losses_of: Callable[[slice], Tensor]) -> tuple[Tensor, Tensor] | None:
        """The loss and each sample's, gradients being in place; None, and no gradients, if memory ran out."""
        try:
            return self._run(losses_of)
        except RuntimeError as error:
            if not out_of_memory(error) or sharded(self.accelerator):
                raise
        for p in self.parameters:  # out of the handler: the exception holds what the passes held
            p.grad = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None

    def _run(self, losses_of: Callable[[slice], Tensor]) -> tuple[Tensor, Tensor]:
        total, found = torch.zeros((), device=self.accelerator.device), []
        for first in range(0, self.share, self.micro):
            last = first + self.micro >= self.share
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                losses = losses_of(slice(first, first + self.micro))
                loss = losses.mean() / (self.share / len(losses))
                self.accelerator.backward(loss)
            total += loss.detach()
            found.append(losses.detach())
        return total, torch.cat(found)

    def _halve(self, step: int) -> None:
        if self.micro == 1:
            raise UserError(f"out of memory at step {step} with one sample a forward; {_HELP}")
        self.micro = (self.micro + 1) // 2
        say(
            self.accelerator,
            f"out of memory at step {step}: going on with {self.micro} samples a forward and "
            f"{math.ceil(self.share / self.micro)} forwards a step, which changes nothing else",
        )

    def _average(self) -> None:
        """The mean of the gradients over processes, unless a sharded model's backward has made it."""
        world = self.accelerator.num_processes
        if world == 1 or sharded(self.accelerator):
            return
        one = whole(self._grads())
        if one is not None:
            torch.distributed.all_reduce(one)
            one /= world
            return
        for bucket in _buckets(self._grads()):
            flat = torch.cat([grad.flatten() for grad in bucket])
            torch.distributed.all_reduce(flat)
            for grad, mean in zip(bucket, (flat / world).split([g.numel() for g in bucket]), strict=True):
                grad.copy_(mean.view_as(grad))

    def _clip(self) -> Tensor:
        """The L2 norm of all gradients, which are then no longer than `grad_clip`; float16's are unscaled."""
        if sharded(self.accelerator):
            return torch.as_tensor(self.accelerator.clip_grad_norm_(self.parameters, self.grad_clip))
        self.accelerator.unscale_gradients()
        return clip_grad_norm_(self.parameters, self.grad_clip)

    def _grads(self) -> list[Tensor]:
        return [p.grad for p in self.parameters if p.grad is not None]


def _buckets(grads: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    for grad in grads:
        if bucket and sum(g.numel() for g in bucket) + grad.numel() > _BUCKET:
            yield bucket
            bucket = []
        bucket.append(grad)
    if bucket:
        yield bucket


@contextmanager
def oom_as_user_error(run: Path) -> Iterator[None]:
    """Within the block memory that runs out where no smaller batch helps is a sentence: `UserError`."""
    try:
        yield
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise UserError(
            f"{run}: out of memory ({str(error).partition('. ')[0]}); lower batch_size and raise "
            f"accumulation as much, or {_HELP}"
        ) from error


# -- Losses that are no numbers ------------------------------------------------------------------------------


@dataclass
class Guard:
    """Keeps an update away whose loss or gradient is NaN or Inf: `config.non_finite` says how."""

    accelerator: Accelerator
    config: schema.Training
    metrics: Metrics
    updates: int = 0  # that were made, those before a continuation among them
    skipped: int = 0  # steps in a row
    overflowed: int = 0  # updates in a row that float16's scaler left out
    left_out: int = 0  # all of them, by this process

    def accepts(self, number: int, step: Step, ids: Sequence[str]) -> bool:
        """Whether to make the update of step `number` (from 1), whose records are `ids` on this process.

        False, with a warning and a line in metrics.jsonl, where it is to be skipped. Raises `UserError` where
        it is to stop, or has skipped `MOST_SKIPPED` steps in a row. With float16 a gradient alone that is not
        finite is accepted: its scaler, which finds the scale by that, leaves the update out itself. They are
        counted: `UserError` after `MOST_OVERFLOWS` in a row, or where the last step comes and none was made.
        """
        what = self._fault(step)
        if what is None:
            self._count(number, step)
            self.skipped = 0
            return True
        self.skipped += 1
        which = f"the {what} at step {number}, records {self._records(step, ids)}"
        if self.config.non_finite == "stop" or self.skipped == MOST_SKIPPED:
            raise UserError(self._last_words(which))
        say(self.accelerator, f"warning: {which}; this step's update is left out")
        self.metrics.log(number, skipped=1)
        if self.accelerator.scaler:  # clipping has told it of these gradients, and it wants a step after that
            self.accelerator.scaler.update()
        return False

    def _count(self, number: int, step: Step) -> None:
        over = self.accelerator.scaler is not None and not math.isfinite(step.norm)
        self.overflowed = self.overflowed + 1 if over else 0
        self.left_out += over
        self.updates += not over
        last = number == self.config.steps
        if self.overflowed == MOST_OVERFLOWS or (last and not self.updates):
            scale = self.accelerator.scaler.get_scale()
            raise UserError(
                f"the gradients of the last {self.overflowed} steps until step {number} overflowed in "
                f"float16, at a scale of {scale:g} as well, and no update was made by them; train again with "
                "precision=bfloat16 or float32, or with a lower optimizer.lr"
            )
        if last and self.left_out:
            say(
                self.accelerator,
                f"{self.left_out} updates were left out, since their gradients overflowed in float16; a few "
                "while the scale is found are usual",
            )

    def _fault(self, step: Step) -> str | None:
        if not math.isfinite(step.loss):
            return f"loss is {step.loss}"
        if not math.isfinite(step.norm) and not self.accelerator.scaler:
            return f"gradient's norm is {step.norm}"
        return None

    def _records(self, step: Step, ids: Sequence[str]) -> str:
        """The records with such a loss, of all processes; all of the batch if it is the gradient alone."""
        broken = [id for id, loss in zip(ids, step.losses.tolist(), strict=True) if not math.isfinite(loss)]
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
