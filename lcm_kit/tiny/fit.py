"""A resumable training loop for the small models of the embedded world."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from lcm_kit.console import Progress, TimeElapsedColumn, TimeRemainingColumn, Words
from lcm_kit.io.files import append, atomic_file
from lcm_kit.tiny.muon import Muon


def one_cycle(step: int, total: int, warmup: float = 0.05) -> float:
    """Linear up over a `warmup` share of the steps, cosine down to 0: a factor in [0, 1]."""
    place = (step + 1) / total
    return (
        place / warmup if place < warmup else 0.5 * (1 + math.cos(math.pi * (place - warmup) / (1 - warmup)))
    )


def _follow(ema: dict[str, Tensor], module: nn.Module, decay: float) -> None:
    """ema <- decay ema + (1 - decay) weights."""
    for key, value in module.state_dict().items():
        if value.is_floating_point():
            ema[key].lerp_(value, 1 - decay)
        else:
            ema[key].copy_(value)


def fit(
    name: str,
    work: Path,
    module: nn.Module,
    loss_at: Callable[[int], Tensor],
    *,
    steps: int,
    rate: Callable[[int], float],
    every: int,
    betas: tuple[float, float] = (0.9, 0.99),
    ema_decay: float = 0.0,
) -> None:
    """Muon for `steps` steps on `loss_at(step)`, whose randomness must be a function of the step alone.

    `rate(step)` is the learning rate; gradients are clipped to norm 1. With `ema_decay` the module ends with
    the moving average of its weights. Every `every` steps the state goes to `work/NAME.pt`, from which the
    same call continues, and a line with the mean loss to `work/NAME.jsonl`.
    """
    state_path = work / f"{name}.pt"
    optimizer = Muon(module, rate(0), betas, 1e-4)
    ema = {key: value.detach().clone() for key, value in module.state_dict().items()} if ema_decay else {}
    first = 0
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        first = state["step"]
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        ema = state["ema"]
    losses: list[float] = []
    since = time.monotonic()
    columns = (*Progress.get_default_columns()[:3], TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, Words("{task.fields[loss]}")) as progress:
        bar = progress.add_task(name, total=steps, completed=first, loss="")
        for step in range(first, steps):
            for group in optimizer.param_groups:
                group["lr"] = rate(step)
            loss = loss_at(step)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            if ema:
                _follow(
                    ema, module, min(ema_decay, (1 + step) / (10 + step))
                )  # short while the weights still run
            losses.append(loss.item())
            progress.update(bar, advance=1)
            if (step + 1) % every and step + 1 != steps:
                continue
            mean = sum(losses) / len(losses)
            progress.update(bar, loss=f"loss {mean:.4f}")
            line = {"step": step + 1, "loss": mean, "seconds": time.monotonic() - since}
            append(work / f"{name}.jsonl", json.dumps(line))
            # given a path, torch hides that the disk is full
            with atomic_file(state_path) as temporary, temporary.open("wb") as handle:
                weights, moments = module.state_dict(), optimizer.state_dict()
                torch.save({"step": step + 1, "module": weights, "optimizer": moments, "ema": ema}, handle)
            losses, since = [], time.monotonic()
    if ema:
        module.load_state_dict(ema)
