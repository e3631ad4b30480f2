"""Control prompts and held-out pictures in both recipes: the figures again from the files; what they do."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from lcm_kit import bases, sample
from lcm_kit.adapter.adapted_unet import AdaptedUNet
from lcm_kit.config.load import load
from lcm_kit.data.batches import generator_at
from lcm_kit.data.cache import Cache
from lcm_kit.data.split import split
from lcm_kit.errors import UserError
from lcm_kit.report import style
from lcm_kit.report.build import write_report
from lcm_kit.training import validation
from lcm_kit.training.control import Control, StyleControl
from lcm_kit.training.held_out import BestCheckpoint, HeldOut
from lcm_kit.training.overtraining import TOLERANCE
from lcm_kit.training.validation import StyleValidation, Validation
from tests.recipes.small import configure
from tests.runs import load_adapter
from train import distill, finetune

Keys = dict[str, Any]
PROMPTS = ("a red ball", "blue", "a tree")
TIGHT = 0.01  # tolerance: whatever is done to a random base, its loss stays near 1
NAMES = {"train/finetune": "control_loss", "train/distill": "control_distance"}


@pytest.fixture(autouse=True)
def _cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setitem(TOLERANCE, "control_loss", TIGHT)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("control") / "control.txt"
    file.write_text("\n".join(PROMPTS))
    return str(file)


def train(keys: Keys, output: Path, recipe: str, control: str | None, **changes: Any) -> Path:
    """A run that draws one prompt at once, and measures on two control prompts if there are any."""
    mine = {key: value for key, value in keys.items() if recipe == "train/distill" or key != "guidance"}
    measured = {
        "control": control, "control_count": 2, "count": 1, "guidance_scale": 3.0, "every": 1,
        "held_out": 0.0, **changes.pop("validation", {}),
    }  # fmt: skip
    config = configure({**mine, "recipe": recipe}, output, validation=measured, **changes)
    return {"train/distill": distill, "train/finetune": finetune}[recipe].main(config)


def lines(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def figures(run: Path, name: str) -> dict[int, float]:
    return {int(line["step"]): line[name] for line in lines(run) if name in line}


def facts(run: Path) -> dict[str, Any]:
    return json.loads((run / "adapter/adapter.json").read_text())


def weights(run: Path, folder: str = "adapter") -> dict[str, Tensor]:
    return load_file(run / folder / "lora.safetensors")


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# -- The figures, written again ------------------------------------------------------------------------------


def drawn(pipe: Any, prompt: str, i: int, **how: Any) -> Tensor:
    """One picture, alone in its batch."""
    return sample.latents(pipe, [prompt], seed=1234, first=i, size=64, **how)


@pytest.mark.slow
def test_control_loss_from_the_files(distill_keys: Keys, prompts: str, tmp_path: Path) -> None:
    from diffusers import DDPMScheduler
    from diffusers.training_utils import compute_snr

    run = train(distill_keys, tmp_path / "run", "train/finetune", prompts, steps=2, validation={"every": 2})
    base = bases.inspect_base(distill_keys["base"]["path"])
    pipe = sample.pipeline(base.path)
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    pictures = [
        drawn(pipe, p, i, sampler="ddim", steps=30, guidance_scale=3.0) for i, p in enumerate(PROMPTS[:2])
    ]
    ids = pipe.tokenizer(list(PROMPTS), padding="max_length", truncation=True, return_tensors="pt").input_ids
    told = pipe.text_encoder(ids)[0].detach()

    @torch.no_grad()
    def control_loss() -> float:
        errors = []
        for slot in range(16):
            t = torch.tensor([int((slot % 8 + 0.5) * 125)])
            noise = torch.randn(1, 4, 16, 16, generator=generator_at(0, 0, slot, "held out"))
            x_t, i = scheduler.add_noise(pictures[slot // 8], noise, t), slot // 8
            output = pipe.unet(x_t, t, told[i : i + 1]).sample
            snr = compute_snr(scheduler, t)
            errors.append(float((output - noise).square().mean() * snr.clamp(max=5.0) / snr))
        return sum(errors) / 16

    found = figures(run, "control_loss")
    assert list(found) == [0, 2]
    assert found[0] == pytest.approx(control_loss(), rel=1e-4)
    load_adapter(run / "adapter", pipe.unet)
    assert found[2] == pytest.approx(control_loss(), rel=1e-4)
    assert abs(found[2] / found[0] - 1) > 1e-3
    assert facts(run)["control_loss"] == found[2]


@pytest.mark.slow
def test_sdxl_is_told_pooled_texts_and_sizes(
    distill_keys: Keys, sdxl_base: Path, prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StyleControl, "teacher_steps", 1)
    keys = {**{k: v for k, v in distill_keys.items() if k != "guidance"}, "recipe": "train/finetune"}
    given = {"control": prompts, "control_count": 4, "count": 3, "guidance_scale": 1.0}
    config = configure({**keys, "base": {"path": str(sdxl_base)}}, tmp_path, validation=given)
    base = bases.inspect_base(str(sdxl_base))
    adapted = AdaptedUNet(bases.load_unet(base))
    adapted.add_lora(config.adapter)
    found = StyleControl.prepare(config, base.base_hash).pictures(adapted)
    told = bases.family_of(base).encode_text(bases.load_text(base), [*PROMPTS, PROMPTS[0]])
    condition = found.condition(range(4))
    assert torch.equal(condition.embeds, told.embeds) and torch.equal(condition.pooled, told.pooled)
    assert condition.time_ids.tolist() == [[64, 64, 0, 0, 64, 64]] * 4
    assert len({float(x.sum()) for x in found.latents(range(4))}) == 4  # the first prompt again, other noise
    again = StyleControl.prepare(config, base.base_hash).pictures(None)  # from the file
    assert torch.equal(again.latents([2, 0]), found.latents([2, 0]))


@pytest.mark.slow
def test_control_distance_from_the_files(distill_keys: Keys, prompts: str, tmp_path: Path) -> None:
    run = train(distill_keys, tmp_path / "run", "train/distill", prompts, steps=2, validation={"every": 2})
    pipe = sample.pipeline(distill_keys["base"]["path"])

    def far(student: Any) -> float:
        total = 0.0
        for i, prompt in enumerate(PROMPTS[:2]):
            wanted = drawn(pipe, prompt, i, sampler="ddim", steps=50, guidance_scale=3.0)
            got = drawn(student, prompt, i, sampler="lcm", steps=1, guidance_scale=1.0)
            total += float((got - wanted).square().mean())
        return (total / 2) ** 0.5

    found, other = figures(run, "control_distance"), sample.pipeline(distill_keys["base"]["path"])
    assert list(found) == [0, 2]
    assert found[0] == pytest.approx(far(pipe), rel=1e-4)
    load_adapter(run / "adapter", other.unet)
    assert found[2] == pytest.approx(far(other), rel=1e-4) and abs(found[2] / found[0] - 1) > 1e-3
    assert facts(run)["control_distance"] == found[2]


@pytest.mark.slow
def test_the_held_out_consistency_loss_from_the_files(
    distill_keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[str] = set()
    step_randomness = distill.step_randomness

    def look(config: Any, method: Any, schedule: Any, batch: Any, step: int) -> Any:
        if step >= 0:  # trained on, not measured
            seen.update(batch.ids)
        return step_randomness(config, method, schedule, batch, step)

    monkeypatch.setattr(distill, "step_randomness", look)
    changes: Keys = {"steps": 5, "grid": {"steps": 20, "steps_start": 5}, "teacher": {"weight": 0.0}}
    changes["loss"] = {"adaptive": True}  # c is 0.001 on the last grid, which this is measured on
    keys = {key: value for key, value in distill_keys.items() if key != "guidance"}
    run = train(keys, tmp_path / "run", "train/distill", None, validation={"held_out": 0.25}, **changes)
    config = load(run / "config.yaml")
    base = bases.inspect_base(config.base.path)
    cache = Cache.open(config.data.cache, base=base, data=config.data)
    _, held = split(cache, 0.25, 0)
    assert len(held) == 2 and seen == set(cache.ids) - set(held.ids)
    # arXiv:2303.01469, algorithm 3, on the last grid: 20 intervals of 50 timesteps
    unet = bases.load_unet(base)
    load_adapter(run / "adapter", unet)
    abar = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).cumprod(0)

    @torch.no_grad()
    def f(x0: Tensor, noise: Tensor, t: int, text: Tensor) -> Tensor:
        x = abar[t] ** 0.5 * x0 + (1 - abar[t]) ** 0.5 * noise
        found = (x - (1 - abar[t]) ** 0.5 * unet(x, t, text).sample) / abar[t] ** 0.5
        return 0.25 / (100 * t**2 + 0.25) * x + 10 * t / (100 * t**2 + 0.25) ** 0.5 * found

    losses = []
    for slot in range(16):
        x0, text = held.latents([slot // 8]), held.condition([slot // 8]).embeds
        noise = torch.randn(1, 4, 16, 16, generator=generator_at(0, -1, slot, "noise"))
        index = int(torch.randint(20, (1,), generator=generator_at(0, -1, slot, "times")))
        t, s = index * 50 + 49, index * 50 - 1 if index else 0
        gap = f(x0, noise, t, text) - f(x0, noise, s, text)
        losses.append(float(((gap**2 + 1e-6) ** 0.5 - 1e-3).mean()))
    found = figures(run, "held_out_loss")
    assert list(found) == [0, 1, 2, 3, 4, 5]
    step = facts(run)["step"]
    assert step == min(range(1, 6), key=found.__getitem__)
    assert found[step] == pytest.approx(sum(losses) / 16, rel=1e-3) == facts(run)["held_out_loss"]


# -- What they do --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=list(NAMES))
def forgetting(
    request: pytest.FixtureRequest, distill_keys: Keys, prompts: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """A run whose rate is far too high, every step of it measured and its state saved; and what it said."""
    output, said = tmp_path_factory.mktemp("forgetting") / "run", io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setitem(TOLERANCE, "control_loss", TIGHT)
        run = train(
            distill_keys, output, request.param, prompts, steps=3, optimizer={"lr": 0.3},
            checkpoint={"every": 1, "keep": 9},
        )  # fmt: skip
    return run, said.getvalue()


def test_forgetting_is_said_and_not_kept(forgetting: tuple[Path, str]) -> None:
    run, said = forgetting
    name = NAMES[load(run / "config.yaml").recipe]
    found, step = figures(run, name), facts(run)["step"]
    limit = min(found.values()) * (1 + TOLERANCE[name])
    good = [each for each in range(1, 4) if found[each] <= limit]
    assert found[3] > limit, found  # or this test would show nothing
    assert step == (max(good) if good else min(range(1, 4), key=found.__getitem__))
    assert same(weights(run), weights(run, f"state/step-{step:06d}"))
    assert facts(run)[name] == found[step] and facts(run)["steps"] == 3
    sentence = f"control prompts degrade: {name} is {found[3] / min(found.values()) - 1:.0%} higher at step 3"
    assert sentence in said and f"holds step {step}" in said
    assert sentence in "".join(
        style.verdict_sentences(style.figures(lines(run), load(run / "config.yaml").recipe), step)
    )


def test_the_style_report_has_the_curve_and_the_sentence(forgetting: tuple[Path, str]) -> None:
    run, _ = forgetting
    if load(run / "config.yaml").recipe == "train/distill":
        return  # its report needs an evaluation
    page = write_report(run).read_text()
    assert "Warning: control prompts degrade: control_loss is " in page and "Loss on what the base" in page
    assert page.count("data:image/svg+xml") == 2  # the loss and the control curve


@pytest.mark.parametrize("kind", [Validation, StyleValidation])
def test_the_picture_has_rows_of_control_prompts(
    kind: Any, distill_keys: Keys, prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns = 2 if kind is StyleValidation else 4
    for each in (Control, kind):
        monkeypatch.setattr(each, "teacher_steps", 1)
    monkeypatch.setattr(validation, "STYLE_STEPS", 2)
    given = {"prompts": prompts, "count": 1, "control": prompts, "control_count": 3, "guidance_scale": 1.0}
    config = configure(distill_keys, tmp_path, validation=given)
    adapted = AdaptedUNet(bases.load_unet(bases.inspect_base(config.base.path)))
    adapted.add_lora(config.adapter)
    alone = kind.prepare(config, "hash")(adapted, 1)
    assert kind.prepare(config, "hash", Control.prepare(config, "hash"))(adapted, 2) == alone
    sizes = [Image.open(tmp_path / f"validation/step-00000{k}.png").size for k in (1, 2)]
    assert sizes == [(columns * 68 - 4, 14 + 64), (columns * 68 - 4, 14 + 64 + 14 + 2 * 68 - 4)]


@pytest.mark.parametrize("recipe", NAMES)
def test_measuring_changes_nothing_and_a_healthy_run_is_not_warned(
    recipe: str, distill_keys: Keys, prompts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    healthy: Keys = {"steps": 3, "ema": 0.5, "optimizer": {"lr": 1e-5}}
    seen = train(distill_keys, tmp_path / "seen", recipe, prompts, **healthy)
    assert "degrade" not in capsys.readouterr().out and facts(seen)["step"] == 3
    assert len(figures(seen, NAMES[recipe])) == 4
    unseen = train(distill_keys, tmp_path / "unseen", recipe, None, **healthy)
    assert same(weights(seen), weights(unseen)) and figures(seen, "loss") == figures(unseen, "loss")
    assert same(weights(seen, "state/step-000003"), weights(unseen, "state/step-000003"))
    assert not (unseen / "best").exists() and not (unseen / "validation").exists()
    assert NAMES[recipe] not in facts(unseen)


@pytest.mark.slow  # as in test_finetune and test_resume, with more measured
@pytest.mark.parametrize("recipe", NAMES)
def test_a_stopped_run_continues_bit_for_bit(
    recipe: str, distill_keys: Keys, prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module: Any = {"train/distill": distill, "train/finetune": finetune}[recipe]
    changes: Keys = {"steps": 5, "checkpoint": {"every": 2}, "validation": {"held_out": 0.25}}
    straight = train(distill_keys, tmp_path / "straight", recipe, prompts, **changes)
    run, step_randomness = tmp_path / "run", module.step_randomness

    def stop(*given: Any) -> Any:
        if given[4 if recipe == "train/distill" else 3] == 3:
            raise KeyboardInterrupt
        return step_randomness(*given)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "step_randomness", stop)
        train(distill_keys, run, recipe, prompts, **changes)
    # As a stop between the state of step 2 and its measurement would leave the run
    told = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in told if not (json.loads(line)["step"] == 2 and NAMES[recipe] in line)]
    assert len(kept) == len(told) - 1
    (run / "metrics.jsonl").write_text("".join(kept))
    others = tmp_path / "others.txt"
    others.write_text("quite other prompts")
    with pytest.raises(UserError, match="was measured on other control prompts"):
        train(distill_keys, run, recipe, str(others), **changes)
    torch.manual_seed(12345)
    train(distill_keys, run, recipe, prompts, **changes)
    assert facts(run) == facts(straight) and same(weights(run), weights(straight))
    for name in ("loss", "held_out_loss", NAMES[recipe]):
        assert figures(run, name) == figures(straight, name)
    left, right = ({f.name for f in (folder / "best").iterdir()} for folder in (run, straight))
    assert left == right and f"step-{facts(run)['step']:06d}" in left


def test_weights_of_steps_that_are_done_again_are_forgotten(
    tmp_path: Path, sd_base: Callable[..., Path]
) -> None:
    from accelerate import Accelerator

    for step in (3, 8):
        (tmp_path / f"best/step-{step:06d}").mkdir(parents=True)
    saver: Any = SimpleNamespace(run=tmp_path, accelerator=Accelerator())
    unread: Any = None
    measuring = BestCheckpoint(unread, saver, unread, unread, {}, None)
    for done, left in ((8, ["step-000003", "step-000008"]), (7, ["step-000003"]), (2, [])):
        measuring.start(done)
        assert sorted(folder.name for folder in (tmp_path / "best").iterdir()) == left


def test_no_pictures_no_figure() -> None:
    nothing: Any = SimpleNamespace(ids=[])
    assert HeldOut(nothing, 0, 1000, 2).measures(lambda _: torch.zeros(0)) == {}


def test_held_out_pictures_need_images(distill_keys: Keys, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="validation.held_out is of images, and data.source is teacher"):
        configure(distill_keys, tmp_path, data={"source": "teacher"}, validation={"held_out": 0.1})
