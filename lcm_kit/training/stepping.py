"""One optimizer step's gradients, however little memory there is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from lcm_kit.bases.out_of_memory import free, out_of_memory
from lcm_kit.core.flat import clip_grad_norm_, whole
from lcm_kit.core.sharding import full_tensor
from lcm_kit.errors import UserError
from lcm_kit.training.processes import say
from lcm_kit.training.runtime import any_of, sharded

_BUCKET = 2**24  # gradients that are averaged over processes at once
_HELP = (
    "run the same command again with gradient_checkpointing=true, it continues; or start another run with "
    "memory.quantize=nf4, with a smaller data.resolution or adapter.rank"
)


class Step(NamedTuple):
    """What one optimizer step's passes gave, on the device; the gradients lie in the parameters, clipped.

    The host need not know any of it to go on (`updates.Guard`).
    """

    loss: Tensor  # [], mean over the samples of all processes
    norm: Tensor  # [], L2 of all gradients before clipping
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
        return Step(mean, full_tensor(norm), losses)

    def _try(self, losses_of: Callable[[slice], Tensor]) -> tuple[Tensor, Tensor] | None:
        """The loss and each sample's, gradients being in place; None, and no gradients, if memory ran out."""
        try:
            return self._run(losses_of)
        except RuntimeError as error:
            if not out_of_memory(error) or sharded(self.accelerator):
                raise
        for p in self.parameters:  # out of the handler: the exception holds what the passes held
            p.grad = None
        free()
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
