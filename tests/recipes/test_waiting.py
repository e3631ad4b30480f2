"""The loops of the recipes on a device that is none: the host waits for it where figures are read, only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lcm_kit.training import ahead, runtime, stepping, updates
from lcm_kit.training.held_out import BestCheckpoint
from tests.recipes.small import configure
from tests.waiting import DEVICE, Watched, watched
from train import distill, finetune

Keys = dict[str, Any]
STEPS = 4
DISTILL: dict[str, Keys] = {
    "plain": {"ema": 0.9, "accumulation": 2},
    "by every plug": {"solver": "dpmpp_2s", "loss": {"name": "huber_norm", "weighting": "interval"}},
    "by a share of time": {
        "loss": {"name": "cauchy", "adaptive": True},
        "grid": {"steps": 20, "steps_start": 5, "sampling": "lognormal"},
    },
    "of distributions": {"method": {"name": "dmd", "steps": [2, 3], "sampler": "lcm", "fake_updates": 2}},
    "of data": {"teacher": {"weight": 0.5}, "gradient_checkpointing": True},
}
FINETUNE: dict[str, Keys] = {
    "plain": {"ema": 0.9, "accumulation": 2, "loss": {"noise_offset": 0.1}, "caption_dropout": 0.5},
    "with its text encoder": {"text_encoder": {"rank": 2}, "caption_dropout": 0.5},
}


def run(module: Any, config: Any, patch: pytest.MonkeyPatch, spoil: Any = lambda made: made) -> Watched:
    """Train on the fake device: noted are the waits from the first step until figures are to be read.

    `spoil`: what a loop does with what its passes gave, before the update.
    """
    patch.setenv("ACCELERATE_USE_CPU", "true")
    start, call, settle = runtime.start, stepping.Passes.__call__, updates.Guard.settle
    early = ahead.Ahead.__init__

    def start_there(config: Any) -> Any:
        accelerator = start(config)
        accelerator.state.device = DEVICE
        return accelerator

    def fused(parameters: Any, config: Any, device: Any) -> Any:  # as on a GPU
        how = {key: getattr(config, key) for key in ("lr", "betas", "eps", "weight_decay")}
        return torch.optim.AdamW(parameters, **how, fused=True)

    def prepared(self: Any, make: Any, steps: int, device: torch.device) -> None:
        early(self, make, steps, torch.device("cuda"))

    with watched(patch) as seen:
        count = [0]

        def passes(self: Any, step: int, losses_of: Any) -> Any:
            seen.on, count[0] = True, count[0] + 1
            return spoil(call(self, step, losses_of))

        def read(self: Any) -> None:
            """Of the last step it is asked for; those within `update` are late and have to be free."""
            last = self._underway is not None and self._underway.number == self.config.steps
            seen.on = seen.on and not last
            settle(self)

        patch.setattr(runtime, "start", start_there)
        patch.setattr(module, "make_optimizer", fused)
        patch.setattr(stepping.Passes, "__call__", passes)
        patch.setattr(updates.Guard, "settle", read)
        patch.setattr(ahead.Ahead, "__init__", prepared)
        # what follows the loop is the weights' way to the disk
        patch.setattr(BestCheckpoint, "finish", lambda self, steps: None)
        module.main(config)
    turns = 1 + getattr(getattr(config, "method", None), "fake_updates", 0)
    assert count[0] == turns * config.steps and seen.computed > 100 * config.steps and not seen.on
    return seen


def changed(keys: Keys, output: Path, changes: Keys) -> Any:
    """For a run that logs and saves after its last step alone."""
    quiet = {"steps": STEPS, "logging": {"every": 100}, "checkpoint": {"every": 100}}
    return configure(keys, output, **{**quiet, **changes})


def styled(keys: Keys) -> Keys:
    """The keys of `distill_keys` for a style LoRA."""
    return {k: v for k, v in keys.items() if k != "guidance"} | {"recipe": "train/finetune"}


@pytest.mark.parametrize("name", DISTILL)
def test_a_distillation_waits_for_nothing(
    name: str, distill_keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = run(distill, changed(distill_keys, tmp_path, DISTILL[name]), monkeypatch)
    assert seen.waits == []


def test_nor_does_one_with_two_teachers(
    mixed: tuple[Keys, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = run(distill, changed(mixed[0], tmp_path, {"batch_size": 4}), monkeypatch)
    assert seen.waits == []


@pytest.mark.parametrize("name", FINETUNE)
def test_a_style_waits_for_nothing(
    name: str, distill_keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = run(finetune, changed(styled(distill_keys), tmp_path, FINETUNE[name]), monkeypatch)
    assert seen.waits == []


SPOILERS = {  # by what is noted, something that would wait
    "_local_scalar_dense": lambda made: float(made.loss),
    "tolist": lambda made: made.losses.tolist(),
    "cpu": lambda made: made.losses.cpu(),
    "an index by a mask": lambda made: made.losses[made.losses > 0],
    "nonzero": lambda made: made.losses.nonzero(),
    "index.Tensor of tensors here and there": lambda made: made.losses[torch.tensor([1, 0])],
    "a copy to the device": lambda made: torch.ones(2).to(DEVICE),
    "a copy from the device": lambda made: torch.empty(2).copy_(made.losses),
}


def test_who_waits_is_seen(distill_keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each in a step of its own, put where a loop might read what its passes gave."""
    left = list(SPOILERS.values())

    def spoil(made: Any) -> Any:
        left.pop(0)(made)
        return made

    config = changed(distill_keys, tmp_path, {"steps": len(SPOILERS)})
    seen = run(distill, config, monkeypatch, spoil)
    assert [wait.rpartition(" at ")[0].removesuffix(".default") for wait in seen.waits] == list(SPOILERS)


def test_the_flag_and_the_early_batch_change_no_result(
    distill_keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the plain run on the CPU: losses are read late, and the same."""
    plain = distill.main(changed(distill_keys, tmp_path / "plain", {"ema": 0.9}))
    with monkeypatch.context() as patch:
        run(distill, changed(distill_keys, tmp_path / "there", {"ema": 0.9}), patch)
    told = [runtime.lines_of(tmp_path / name) for name in ("plain", "there")]
    assert told[0][0]["step"] == told[1][0]["step"] == STEPS and plain
    for key in ("loss", "grad_norm", "lr"):
        assert told[0][0][key] == pytest.approx(told[1][0][key], rel=1e-4)
