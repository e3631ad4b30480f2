"""The distillation recipe: its losses against a straight-line script, and what each key does, in numbers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lcm_kit import bases, sample
from lcm_kit.adapter import roles
from lcm_kit.config.schema import Distill
from lcm_kit.data.batches import Batches, generator_at
from lcm_kit.data.cache import Cache
from lcm_kit.errors import UserError
from lcm_kit.training import stepping
from tests.recipes.small import configure, prepare
from tests.runs import load_adapter
from train import distill

Keys = dict[str, Any]


@pytest.fixture(autouse=True)
def _cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def metrics(run: Path, name: str = "loss") -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def weights(run: Path, step: int | None = None) -> dict[str, Tensor]:
    return load_file(run / (f"state/step-{step:06d}" if step else "adapter") / "lora.safetensors")


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[key] - b[key]).abs().max()) for key in a)


# -- The algorithm, written again: diffusers, peft and formulas, no function of ours but the random streams --


def straight_line(
    config: Distill, *, wrong_target: bool = False, teachers: Callable[[str], Any] | None = None
) -> list[float]:
    """The losses of `config` with the DDIM solver, pseudo-Huber on a grid of 50 (arXiv:2310.04378).

    `teachers`: the UNet that teaches the record of an id; None: the base teaches all.
    """
    from diffusers import DDIMScheduler, UNet2DConditionModel
    from peft import LoraConfig

    unet = UNet2DConditionModel.from_pretrained(config.base.path, subfolder="unet").requires_grad_(False)
    scheduler = DDIMScheduler.from_pretrained(config.base.path, subfolder="scheduler")
    abar, kind = scheduler.alphas_cumprod, scheduler.config.prediction_type
    torch.manual_seed(config.seed)
    targets = bases.lora_targets("lcm")
    unet.add_adapter(
        LoraConfig(r=config.adapter.rank, lora_alpha=config.adapter.alpha, target_modules=targets)
    )
    parameters = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.optimizer.lr, weight_decay=0.0)
    cache = Cache.open(config.data.cache, base=bases.inspect_base(config.base.path), data=config.data)
    batches, losses = Batches(cache, config.batch_size, config.seed), []

    def x0_eps(x: Tensor, t: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        a, s = abar[t].sqrt().view(-1, 1, 1, 1), (1 - abar[t]).sqrt().view(-1, 1, 1, 1)
        if kind == "v_prediction":
            return a * x - s * output, a * output + s * x
        return (x - s * output) / a, output

    def f(x: Tensor, t: Tensor, x0: Tensor) -> Tensor:
        scaled = 10.0 * t.view(-1, 1, 1, 1)
        return 0.25 / (scaled**2 + 0.25) * x + scaled / (scaled**2 + 0.25).sqrt() * x0

    purposes = ("noise", "times", "guidance")
    for step in range(config.steps):
        batch = batches.at(step)
        text, empty = batch.condition.embeds, cache.empty(config.batch_size).embeds
        streams = [[generator_at(config.seed, step, i, p) for i in batch.slots] for p in purposes]
        noise = torch.stack([torch.randn(4, 16, 16, generator=g) for g in streams[0]])
        index = torch.cat([torch.randint(50, (1,), generator=g) for g in streams[1]])
        t = index * 20 + 19
        s = torch.where(index > 0, t - 20, 0)
        low, high = config.guidance.min, config.guidance.max
        w = torch.cat([low + (high - low) * torch.rand(1, generator=g) for g in streams[2]]) - 1
        x_t = (
            abar[t].sqrt().view(-1, 1, 1, 1) * batch.latents + (1 - abar[t]).sqrt().view(-1, 1, 1, 1) * noise
        )
        with torch.no_grad():
            unet.disable_adapters()
            each = [teachers(id) if teachers else unet for id in batch.ids]
            cond, uncond = (
                torch.cat([u(x_t[i : i + 1], t[i], c[i : i + 1]).sample for i, u in enumerate(each)])
                for c in (text, empty)
            )
            x0, eps = x0_eps(x_t, t, cond + w.view(-1, 1, 1, 1) * (cond - uncond))
            x_s = abar[s].sqrt().view(-1, 1, 1, 1) * x0 + (1 - abar[s]).sqrt().view(-1, 1, 1, 1) * eps
            if not wrong_target:
                unet.enable_adapters()
            target = f(x_s, s, x0_eps(x_s, s, unet(x_s, s, text).sample)[0])
            unet.enable_adapters()
        landed = f(x_t, t, x0_eps(x_t, t, unet(x_t, t, text).sample)[0])
        loss = (((landed - target) ** 2 + config.loss.c**2).sqrt() - config.loss.c).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.optimizer.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_first_losses_equal_a_straight_line_script(
    kind: str, distill_keys: Keys, sd_base: Callable[..., Path], tmp_path: Path
) -> None:
    keys = distill_keys if kind == "epsilon" else prepare(tmp_path / "v", sd_base(kind))
    config = configure(keys, tmp_path / "run", steps=3)
    found, wanted = metrics(distill.main(config)), straight_line(config)
    assert found == pytest.approx(wanted, rel=2e-4)
    # The comparison would notice a target that is taken from the teacher, from the first trained weights on.
    wrong = straight_line(config, wrong_target=True)
    assert abs(wrong[1] / wanted[1] - 1) > 0.01 and abs(wrong[2] / wanted[2] - 1) > 0.01
    facts = json.loads((tmp_path / "run/adapter/adapter.json").read_text())
    assert (facts["prediction_type"], facts["steps"]) == (kind, 3)
    assert facts["base"]["hash"] == bases.inspect_base(str(keys["base"]["path"])).base_hash


@pytest.mark.parametrize("who", ["base", "adapters"])
def test_each_picture_has_its_own_teacher(who: str, mixed: tuple[Keys, Any], tmp_path: Path) -> None:
    """Brand pictures the styled base, general ones the base alone: fused UNets, row by row."""
    keys, fused = mixed
    small = {"optimizer": {"lr": 1e-3}}  # Adam's sign of a gradient of nothing amplifies float error
    changes = {"batch_size": 2, "accumulation": 2, "teacher": {"regularization": who}, **small}
    config = configure(keys, tmp_path / "run", **changes)
    plain = bases.load_unet(bases.inspect_base(config.base.path))
    alike = {"base": {True: plain, False: fused}, "adapters": {True: fused, False: fused}}
    asked: list[bool] = []

    def teachers(of: dict[bool, Any]) -> Callable[[str], Any]:
        def teacher(id: str) -> Any:
            asked.append(id.startswith("regularisation/"))
            return of[asked[-1]]

        return teacher

    found = metrics(distill.main(config))
    whole = replace(config, batch_size=4, accumulation=1)
    assert found == pytest.approx(straight_line(whole, teachers=teachers(alike[who])), rel=2e-4)
    assert len(set(map(tuple, np.array(asked).reshape(-1, 2)))) > 2  # mixed and unmixed micro-batches
    other = straight_line(whole, teachers=teachers(alike["base" if who == "adapters" else "adapters"]))
    assert all(abs(a / b - 1) > 0.01 for a, b in zip(found, other, strict=True))


def test_the_loss_on_held_out_pictures_is_by_the_styled_teacher(
    mixed: tuple[Keys, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, _ = mixed
    asked: list[list[bool]] = []
    real = roles.route_by_teacher

    def route_by_teacher(ask: Any, bases: list[bool], *more: Any, **options: Any) -> Tensor:
        asked.append(list(bases))
        return real(ask, bases, *more, **options)

    monkeypatch.setattr(roles, "route_by_teacher", route_by_teacher)
    run = distill.main(configure(keys, tmp_path / "run", steps=2, validation={"held_out": 0.25}))
    found = metrics(run, "held_out_loss")
    assert len(found) == 2 and all(np.isfinite(found))
    assert not any(asked[0]) and len(asked[0]) == 2  # measured before the first step, in batches of the run's


# -- What the keys do --------------------------------------------------------------------------------


@pytest.fixture
def stepped_norms() -> Iterator[list[float]]:
    """The norm of all gradients at each optimizer step, as the optimizer sees them."""
    norms: list[float] = []

    def look(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norms.append(float(torch.cat([g.flatten() for g in grads]).norm()))

    handle = register_optimizer_step_pre_hook(look)
    yield norms
    handle.remove()


def test_clipping_clips(
    distill_keys: Keys, tmp_path: Path, stepped_norms: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = distill.main(configure(distill_keys, tmp_path / "clipped", steps=2, optimizer={"grad_clip": 0.01}))
    assert min(metrics(run, "grad_norm")) > 0.1  # the norm before clipping
    assert stepped_norms == pytest.approx([0.01, 0.01], rel=1e-3)
    # Clipping that does not clip is seen by the check above.
    monkeypatch.setattr(stepping, "clip_grad_norm_", lambda parameters, most: torch.tensor(1.0))
    distill.main(configure(distill_keys, tmp_path / "unclipped", steps=1, optimizer={"grad_clip": 0.01}))
    assert stepped_norms[2] > 0.1


def test_accumulation_equals_the_larger_batch(distill_keys: Keys, tmp_path: Path) -> None:
    optimizer = {"eps": 1e-3}  # Adam's sign of a gradient of nothing would amplify float error
    whole = configure(distill_keys, tmp_path / "whole", steps=3, batch_size=4, optimizer=optimizer)
    parts = configure(distill_keys, tmp_path / "parts", steps=3, accumulation=2, optimizer=optimizer)
    a, b = distill.main(whole), distill.main(parts)
    assert metrics(b) == pytest.approx(metrics(a), rel=1e-4)
    assert metrics(b, "grad_norm") == pytest.approx(metrics(a, "grad_norm"), rel=1e-3)
    assert largest_difference(weights(a), weights(b)) < 1e-4
    assert (
        largest_difference(
            weights(a), weights(distill.main(configure(distill_keys, tmp_path / "half", steps=3)))
        )
        > 1e-2
    )


def test_with_reuse_a_batch_serves_n_steps_with_new_guidance_and_a_resume_is_exact(
    distill_keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five steps of two a group: the teacher is asked in each first one, and after a stop in the middle."""
    asked: list[int] = []
    real = distill.Roles._unguided

    def unguided(self: Any, given: Any, x: Tensor, t: Tensor) -> Tensor:
        asked.append(len(x))
        return real(self, given, x, t)

    monkeypatch.setattr(distill.Roles, "_unguided", unguided)
    drawn: list[Any] = []
    randomness = distill.step_randomness
    monkeypatch.setattr(
        distill, "step_randomness", lambda *args: drawn.append(randomness(*args)) or drawn[-1]
    )
    settings: Keys = {"steps": 5, "teacher": {"reuse": 2}, "checkpoint": {"every": 1, "keep": 9}}
    whole = distill.main(configure(distill_keys, tmp_path / "whole", **settings))
    assert len(asked) == 3
    for first, second in ((drawn[0], drawn[1]), (drawn[2], drawn[3])):
        assert torch.equal(first.noise, second.noise) and torch.equal(first.times.t, second.times.t)
        assert not torch.equal(first.guidance, second.guidance)
    assert not torch.equal(drawn[1].noise, drawn[2].noise)

    asked.clear()
    stopped = tmp_path / "stopped"
    shutil.copytree(whole, stopped)
    for gone in ("adapter", "state/step-000004", "state/step-000005"):
        shutil.rmtree(stopped / gone)
    distill.main(configure(distill_keys, stopped, **settings))
    assert len(asked) == 2  # for the second step of its group, and the first of the next
    assert largest_difference(weights(whole), weights(stopped)) == 0
    plain = distill.main(configure(distill_keys, tmp_path / "plain", steps=5))
    assert largest_difference(weights(whole), weights(plain)) > 0


def test_ema_gives_the_target_and_has_no_gradient(distill_keys: Keys, tmp_path: Path) -> None:
    each = {"every": 1, "keep": 9}
    run = distill.main(configure(distill_keys, tmp_path / "ema", steps=3, ema=0.75, checkpoint=each))
    plain = distill.main(configure(distill_keys, tmp_path / "plain", steps=3))
    assert metrics(run)[0] == metrics(plain)[0]  # the average starts as the weights
    assert abs(metrics(run)[1] / metrics(plain)[1] - 1) > 1e-3
    average = load_file(run / "state/step-000001/ema.safetensors")
    for step in (2, 3):
        now = weights(run, step)
        average = {key: 0.75 * average[key] + 0.25 * now[key] for key in now}
        found = load_file(run / f"state/step-{step:06d}/ema.safetensors")
        assert largest_difference(found, average) < 1e-6
    assert largest_difference(weights(run), weights(run, 3)) == 0  # the live weights are what is saved
    assert largest_difference(weights(run), average) > 1e-3


def test_checkpointing_and_bfloat16_change_the_cost_only(distill_keys: Keys, tmp_path: Path) -> None:
    def losses(name: str, **changes: Any) -> list[float]:
        return metrics(
            distill.main(configure(distill_keys, tmp_path / name, steps=2, solver="heun", **changes))
        )

    plain = losses("plain")
    assert losses("checkpointed", gradient_checkpointing=True) == pytest.approx(plain, rel=1e-5)
    assert losses("bfloat16", precision="bfloat16", gradient_checkpointing=True) == pytest.approx(
        plain, rel=0.1
    )
    saved = weights(tmp_path / "bfloat16")
    assert {t.dtype for t in saved.values()} == {torch.float32}
    assert largest_difference(saved, {key: t.bfloat16().float() for key, t in saved.items()}) > 0


def test_validation_measures_and_disturbs_nothing(distill_keys: Keys, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red ball\nblue\n")
    wanted = {"prompts": str(tmp_path / "prompts.txt"), "count": 2, "every": 1}
    logging = {"trackers": ["tensorboard"]}
    run = distill.main(
        configure(distill_keys, tmp_path / "seen", steps=2, validation=wanted, logging=logging)
    )
    plain = distill.main(configure(distill_keys, tmp_path / "unseen", steps=2))
    assert largest_difference(weights(run), weights(plain)) == 0
    assert list((run / "trackers").glob("events.out.tfevents.*"))
    pictures = sorted(run.glob("validation/step-*.png"))
    assert [p.name for p in pictures] == ["step-000001.png", "step-000002.png"]
    assert len(list(run.glob("validation/teacher-*.safetensors"))) == 1
    assert Image.open(pictures[0]).width == 4 * 64 + 3 * 4
    # The number again, from the files alone.
    pipe = sample.pipeline(distill_keys["base"]["path"])
    draw = {"prompts": ["a red ball", "blue"], "seed": 1234, "size": 64}
    teacher = sample.latents(pipe, sampler="ddim", steps=50, guidance_scale=5.0, **draw)
    load_adapter(run / "adapter", pipe.unet)
    student = sample.latents(pipe, sampler="lcm", steps=1, **draw)
    distance = float((student - teacher).square().mean().sqrt())
    assert metrics(run, "one_step_distance")[-1] == pytest.approx(distance, rel=1e-4)


def test_mistakes_are_found_before_training(
    distill_keys: Keys, tmp_path: Path, sd_base: Callable[..., Path]
) -> None:
    with pytest.raises(UserError, match="cache"):
        other = {"path": str(sd_base("v_prediction"))}
        distill.main(configure(distill_keys, tmp_path / "a", base=other, data={"resolution": 32}))
    with pytest.raises(UserError, match="no such file"):
        distill.main(
            configure(distill_keys, tmp_path / "b", validation={"prompts": str(tmp_path / "none.txt")})
        )
    with pytest.raises(UserError, match="training diverged"):
        distill.main(configure(distill_keys, tmp_path / "c", optimizer={"lr": 1e9}))
