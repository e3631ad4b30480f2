"""The fine-tuning recipe: its losses against a straight-line script, and what each key does, in numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier, get_ident
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from lcm_kit import bases, sample
from lcm_kit.bases.condition import Condition
from lcm_kit.config.finetune import Finetune
from lcm_kit.config.load import dump
from lcm_kit.data import prior
from lcm_kit.data.batches import Batch, Batches, generator_at
from lcm_kit.data.cache import Cache
from lcm_kit.data.split import split
from lcm_kit.errors import UserError
from lcm_kit.export.run import export_run
from lcm_kit.io import own_files, own_shapes
from lcm_kit.report.build import write_report
from lcm_kit.share import Share
from lcm_kit.training import checkpoints
from tests.recipes.small import configure, launch, prepare
from tests.runs import load_adapter
from train import distill, finetune

Keys = dict[str, Any]
ALONE: Keys = {"prompts": None, "held_out": 0.0}  # validation that measures nothing


@pytest.fixture(autouse=True)
def _cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def tuning(keys: Keys) -> Keys:
    """The keys of a small fine-tuning over the cache of a small distillation."""
    kept = {key: value for key, value in keys.items() if key != "guidance"}
    return {**kept, "recipe": "train/finetune"}


@pytest.fixture(scope="module")
def keys(distill_keys: Keys) -> Keys:
    """With five pictures of the base's own, drawn and encoded."""
    folder = Path(distill_keys["data"]["cache"]).parent
    (folder / "general.txt").write_text("a cat\na dog\na tree\n")
    found = tuning(distill_keys)
    wanted = {"prompts": str(folder / "general.txt"), "count": 5, "steps": 2, "weight": 0.5}
    prior.encode(configure(found, folder / "none", prior=wanted), progress=False)
    return {**found, "_prior": wanted}


def config(keys: Keys, output: Path, *, own: bool = False, **changes: Any) -> Finetune:
    """`own`: with the base's own pictures."""
    given = {key: value for key, value in keys.items() if key != "_prior"}
    return configure(given | ({"prior": keys["_prior"]} if own else {}), output, **changes)


def metrics(run: Path, name: str = "loss") -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


def weights(run: Path, folder: str = "adapter") -> dict[str, Tensor]:
    return load_file(run / folder / "lora.safetensors")


def facts(run: Path) -> dict[str, Any]:
    return json.loads((run / "adapter/adapter.json").read_text())


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# -- The algorithm, written again: diffusers, peft and formulas, no function of ours but the random streams --


def straight_line(wanted: Finetune) -> list[float]:
    """The losses of `wanted` (arXiv:2006.11239, 2303.09556, 2208.12242), with diffusers' own arithmetic."""
    from diffusers import DDPMScheduler, UNet2DConditionModel
    from diffusers.training_utils import compute_snr
    from peft import LoraConfig

    unet = UNet2DConditionModel.from_pretrained(wanted.base.path, subfolder="unet").requires_grad_(False)
    scheduler = DDPMScheduler.from_pretrained(wanted.base.path, subfolder="scheduler")
    kind, gamma = scheduler.config.prediction_type, wanted.loss.min_snr_gamma
    torch.manual_seed(wanted.seed)
    targets = bases.lora_targets("lcm")
    unet.add_adapter(
        LoraConfig(r=wanted.adapter.rank, lora_alpha=wanted.adapter.alpha, target_modules=targets)
    )
    parameters = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=wanted.optimizer.lr, weight_decay=0.0)
    base = bases.inspect_base(wanted.base.path)
    cache = Cache.open(wanted.data.cache, base=base, data=wanted.data)
    sides = [("", 1.0, Batches(cache, wanted.batch_size, wanted.seed))]
    if wanted.prior.prompts:
        data = prior.data_of(wanted)
        drawn = Cache.open(data.cache, base=base, data=data)
        sides.append(("prior ", wanted.prior.weight, Batches(drawn, wanted.batch_size, wanted.seed + 1)))

    def one_side(step: int, whose: str, batches: Batches) -> Tensor:
        batch = batches.at(step)

        def streams(purpose: str) -> list[torch.Generator]:
            return [generator_at(wanted.seed, step, slot, whose + purpose) for slot in batch.slots]

        noise = torch.stack([torch.randn(4, 16, 16, generator=g) for g in streams("noise")])
        constant = torch.stack([torch.randn(4, 1, 1, generator=g) for g in streams("offset")])
        noise = noise + wanted.loss.noise_offset * constant
        t = torch.stack([torch.randint(1000, (), generator=g) for g in streams("times")])
        condition, empty = batch.condition, cache.empty()
        for i, g in enumerate(streams("dropout")):
            if torch.rand((), generator=g) < wanted.caption_dropout:
                condition.embeds[i] = empty.embeds[0]
                if condition.pooled is not None and empty.pooled is not None:
                    condition.pooled[i] = empty.pooled[0]
        more = {}
        if condition.pooled is not None:
            more = {"added_cond_kwargs": {"text_embeds": condition.pooled, "time_ids": condition.time_ids}}
        x0 = batch.latents
        output = unet(scheduler.add_noise(x0, noise, t), t, condition.embeds, **more).sample
        target = noise if kind == "epsilon" else scheduler.get_velocity(x0, noise, t)
        error = (output - target).square().mean((1, 2, 3))
        snr = compute_snr(scheduler, t)
        unit = snr if kind == "epsilon" else snr + 1
        weight = torch.ones_like(snr) if gamma is None else snr.clamp(max=gamma) / unit
        return (torch.maximum(weight, wanted.loss.snr_floor / unit) * error).mean()

    losses = []
    for step in range(wanted.steps):
        loss = sum(weight * one_side(step, whose, batches) for whose, weight, batches in sides)
        assert isinstance(loss, Tensor)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, wanted.optimizer.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize(
    ("kind", "gamma"), [("epsilon", None), ("epsilon", 2.0), ("v_prediction", None), ("v_prediction", 2.0)]
)
def test_first_losses_equal_a_straight_line_script(
    kind: str, gamma: float | None, keys: Keys, sd_base: Callable[..., Path], tmp_path: Path
) -> None:
    found = keys if kind == "epsilon" else tuning(prepare(tmp_path / "v", sd_base(kind)))
    loss = {"min_snr_gamma": gamma, "noise_offset": 0.3, "snr_floor": 1.5}
    wanted = config(
        found, tmp_path / "run", steps=3, validation=ALONE, loss=loss, caption_dropout=0.5,
        own=kind == "epsilon",
    )  # fmt: skip
    losses = straight_line(wanted)
    assert list(metrics(finetune.main(wanted)).values()) == pytest.approx(losses, rel=2e-5)
    # Each key is seen by this: without one of them the losses are others.
    for changed in (
        {"loss": replace(wanted.loss, noise_offset=0.0)},
        {"loss": replace(wanted.loss, min_snr_gamma=100.0)},
        {"loss": replace(wanted.loss, snr_floor=0.0)},
        {"caption_dropout": 0.0},
    ):
        other = straight_line(replace(wanted, steps=2, **changed))
        assert max(abs(a / b - 1) for a, b in zip(other, losses, strict=False)) > 1e-3, changed


@pytest.mark.slow
def test_sdxl_is_told_pooled_texts_and_sizes(sdxl_base: Path, tmp_path: Path) -> None:
    found = tuning(prepare(tmp_path / "xl", sdxl_base))
    wanted = config(found, tmp_path / "run", steps=2, validation=ALONE, caption_dropout=0.5)
    losses = straight_line(wanted)
    assert list(metrics(finetune.main(wanted)).values()) == pytest.approx(losses, rel=2e-4)


# -- What the keys do ----------------------------------------------------------------------------------------


def test_captions_are_left_out_at_the_rate_that_is_asked_for(keys: Keys, tmp_path: Path) -> None:
    wanted = config(keys, tmp_path, caption_dropout=0.2)
    empty = Condition(torch.zeros(1, 1, 1))
    batch = Batch(torch.zeros(100, 4, 1, 1), empty.expand(100), [""] * 100, range(100))
    dropped = torch.cat([finetune.step_randomness(wanted, 1000, batch, step).dropped for step in range(40)])
    assert abs(float(dropped.float().mean()) - 0.2) < 4 * (0.2 * 0.8 / 4000) ** 0.5
    own = torch.cat(
        [finetune.step_randomness(wanted, 1000, batch, step, "prior ").dropped for step in range(40)]
    )
    assert 0.02 < float((dropped & own).float().mean()) < 0.06  # 0.04 of both: drawn apart from each other
    none = finetune.step_randomness(replace(wanted, caption_dropout=0.0), 1000, batch, 0)
    assert not none.dropped.any()


def test_times_are_uniform_and_the_offset_is_one_constant_a_channel(keys: Keys, tmp_path: Path) -> None:
    plain = config(keys, tmp_path)
    offset = replace(plain, loss=replace(plain.loss, noise_offset=0.5))
    batch = Batch(torch.zeros(200, 4, 2, 2), Condition(torch.zeros(200, 1, 1)), [""] * 200, range(200))
    pairs = [
        (
            finetune.step_randomness(plain, 1000, batch, step),
            finetune.step_randomness(offset, 1000, batch, step),
        )
        for step in range(10)
    ]
    t = torch.cat([a.t for a, _ in pairs])
    assert int(t.min()) < 10 and int(t.max()) > 989
    assert abs(float(t.float().mean()) - 499.5) < 4 * 288.7 / 2000**0.5
    shift = torch.cat([b.noise - a.noise for a, b in pairs])
    assert float((shift - shift[..., :1, :1]).abs().max()) < 1e-6
    assert float(shift.std()) == pytest.approx(0.5, rel=0.05)


def test_the_prior_counts_by_its_weight_and_batches_may_be_split(keys: Keys, tmp_path: Path) -> None:
    def first(name: str, **changes: Any) -> float:
        return metrics(finetune.main(config(keys, tmp_path / name, steps=1, validation=ALONE, **changes)))[1]

    def weighing(weight: float) -> Keys:
        return {"own": True, "prior": {"weight": weight}}

    without, half = first("without"), first("half", **weighing(0.5))
    whole = first("whole", **weighing(1.0))
    assert half - without > 0.05
    assert whole - without == pytest.approx(2 * (half - without), rel=1e-4)
    assert first("split", **weighing(0.5), batch_size=1, accumulation=2) == pytest.approx(half, rel=1e-5)


def test_the_bases_own_pictures_are_drawn_once(keys: Keys, tmp_path: Path) -> None:
    (tmp_path / "general.txt").write_text("a cat\na dog\na tree\n")
    wanted = {"prompts": str(tmp_path / "general.txt"), "count": 3, "steps": 2}
    keys = {**keys, "_prior": wanted, "data": {**keys["data"], "cache": str(tmp_path / "brand")}}
    three = config(keys, tmp_path, own=True)
    base = bases.inspect_base(three.base.path)
    with pytest.raises(UserError, match="not there or were drawn otherwise"):
        prior.open_cache(three, base)
    prior.encode(three, progress=False)
    folder = tmp_path / "brand-prior/pictures"
    times = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert sorted(times) == [*(f"0000{i}.{end}" for i in range(3) for end in ("png", "txt")), "drawn.json"]
    assert prior.encode(three, progress=False).encoded == 0
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == times
    # Picture 4 is the second prompt again, from the noise of its own number.
    five = config(keys, tmp_path, own=True, prior={"count": 5})
    with pytest.raises(UserError, match=r"has 3 pictures and prior\.count is 5"):
        prior.open_cache(five, base)
    prior.encode(five, progress=False)
    found = prior.open_cache(five, base)
    assert found is not None and found.captions == ["a cat", "a dog", "a tree", "a cat", "a dog"]
    pipe = sample.pipeline(three.base.path)
    again = sample.sample(
        pipe, ["a dog"], sampler="ddim", steps=2, guidance_scale=5.0, seed=0, first=4, size=64
    )
    told, seen = sample.to_pil(again)[0], Image.open(folder / "00004.png").convert("RGB")
    gap = [abs(a - b) for a, b in zip(told.tobytes(), seen.tobytes(), strict=True)]
    assert max(gap) <= 1  # of 255: sums of another batch size
    # Fewer are wanted, or from other noise.
    prior.encode(three, progress=False)
    assert len(list(folder.glob("*.png"))) == 3
    first = (folder / "00000.png").read_bytes()
    prior.encode(config(keys, tmp_path, own=True, prior={"seed": 1}), progress=False)
    assert (folder / "00000.png").read_bytes() != first


def test_processes_share_the_drawing_of_the_bases_own_pictures(
    keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "general.txt").write_text("a cat\na dog\na tree\n")
    wanted = {"prompts": str(tmp_path / "general.txt"), "count": 17, "steps": 1}
    rank_of: dict[int, int] = {}  # by thread: here a process is one
    # each its own, and loaded one after the other, which no two threads could do
    pipes = [sample.pipeline(keys["base"]["path"]) for _ in range(2)]
    monkeypatch.setattr(sample, "pipeline", lambda *_, **__: pipes[rank_of[get_ident()]])
    seen: list[tuple[int, int]] = []
    real, together = sample.sample, Barrier(2, timeout=60)

    def watched(pipe: Any, prompts: Any, **more: Any) -> Tensor:
        seen.append((rank_of[get_ident()], more["first"][0]))
        return real(pipe, prompts, **more)

    monkeypatch.setattr(sample, "sample", watched)

    def drawn_in(name: str, *shares: Share) -> tuple[dict[str, bytes], list[tuple[int, int]]]:
        """The files, and who drew from which number on."""
        data = {**keys["data"], "cache": str(tmp_path / name)}
        made = config({**keys, "_prior": wanted, "data": data}, tmp_path, own=True)

        def work(share: Share) -> None:
            rank_of[get_ident()] = share.rank
            prior.draw(made, progress=False, share=share)

        seen.clear()
        with ThreadPoolExecutor(len(shares)) as pool:
            list(pool.map(work, shares))
        folder = Path(prior.data_of(made).path)
        return {file.name: file.read_bytes() for file in folder.iterdir()}, sorted(seen)

    alone, one = drawn_in("alone", Share())
    shared, two = drawn_in("shared", *(Share(rank, 2, together.wait) for rank in (0, 1)))
    assert one == [(0, 0), (0, 8), (0, 16)] and two == [(0, 0), (0, 16), (1, 8)]
    assert alone == shared and len(alone) == 2 * 17 + 1


def test_pictures_of_the_base_that_are_not_finite_are_refused(
    keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "general.txt").write_text("a cat\na dog\n")
    wanted = {"prompts": str(tmp_path / "general.txt"), "count": 2, "steps": 1}
    data = {**keys["data"], "cache": str(tmp_path / "own")}
    made = config({**keys, "_prior": wanted, "data": data}, tmp_path, own=True)
    monkeypatch.setattr(sample, "sample", lambda *_, **__: torch.tensor([0.0, math.nan]).view(2, 1, 1, 1))
    with pytest.raises(UserError, match="nothing finite for 'a dog', picture 1 of prior; lower prior.guid"):
        prior.draw(made, progress=False)
    assert not [*Path(prior.data_of(made).path).glob("*.png")]


def test_regularisation_is_trained_on_and_held_out_pictures_never(
    keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[str] = set()
    step_randomness = finetune.step_randomness

    def look(wanted: Finetune, timesteps: int, batch: Batch, step: int, whose: str = "") -> Any:
        seen.update(batch.ids)
        return step_randomness(wanted, timesteps, batch, step, whose)

    monkeypatch.setattr(finetune, "step_randomness", look)
    wanted = config(keys, tmp_path, steps=5, validation={"held_out": 0.25})
    finetune.main(wanted)
    cache = Cache.open(wanted.data.cache, base=bases.inspect_base(wanted.base.path), data=wanted.data)
    _, held = split(cache, 0.25, wanted.seed)
    assert len(held) == 2 and seen == set(cache.ids) - set(held.ids)


# -- Validation and the best weights -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def overtrained(keys: Keys, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose rate is far too high, every step of it saved and measured."""
    wanted = config(
        keys, tmp_path_factory.mktemp("overtrained") / "my-look", steps=5, optimizer={"lr": 0.1},
        validation={"every": 1, "held_out": 0.25}, checkpoint={"every": 1, "keep": 9},
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        return finetune.main(wanted)


def test_the_adapter_is_the_one_with_the_lowest_held_out_loss(overtrained: Path) -> None:
    losses = metrics(overtrained, "held_out_loss")
    assert list(losses) == [0, 1, 2, 3, 4, 5]
    trained = {step: loss for step, loss in losses.items() if step}
    best = min(trained, key=trained.__getitem__)
    assert best < 5 and losses[5] > 1.02 * losses[best]  # or this test would show nothing
    assert same(weights(overtrained), weights(overtrained, f"state/step-{best:06d}"))
    assert not same(weights(overtrained), weights(overtrained, "state/step-000005"))
    assert (facts(overtrained)["step"], facts(overtrained)["steps"]) == (best, 5)
    assert facts(overtrained)["held_out_loss"] == losses[best]


@torch.no_grad()
def test_the_held_out_loss_again_from_the_files(overtrained: Path, keys: Keys) -> None:
    from diffusers import DDPMScheduler
    from diffusers.training_utils import compute_snr

    wanted = config(keys, overtrained)
    base = bases.inspect_base(wanted.base.path)
    cache = Cache.open(wanted.data.cache, base=base, data=wanted.data)
    _, held = split(cache, 0.25, 0)
    scheduler = DDPMScheduler.from_pretrained(wanted.base.path, subfolder="scheduler")
    unet = bases.load_unet(base)
    load_adapter(overtrained / "adapter", unet)
    errors = []
    for slot in range(16):
        x0, text = held.latents([slot // 8]), held.condition([slot // 8]).embeds
        t = torch.tensor([int((slot % 8 + 0.5) * 125)])
        noise = torch.randn(1, 4, 16, 16, generator=generator_at(0, 0, slot, "held out"))
        output = unet(scheduler.add_noise(x0, noise, t), t, text).sample
        snr = compute_snr(scheduler, t)
        errors.append(float((output - noise).square().mean() * snr.clamp(max=5.0) / snr))
    assert facts(overtrained)["held_out_loss"] == pytest.approx(sum(errors) / 16, rel=1e-4)


def test_the_export_is_a_plain_style_lora_and_a_teacher_wears_it(
    overtrained: Path, keys: Keys, distill_keys: Keys, tmp_path: Path
) -> None:
    from safetensors import safe_open

    files = export_run(overtrained)
    verified = json.loads((overtrained / "export/verified.json").read_text())["files"]
    verdicts = {app: row["verdict"] for file in verified.values() for app, row in file["apps"].items()}
    assert len(verified) == 2 and set(verdicts.values()) == {"ok"}
    with safe_open(files["kohya"], framework="pt") as file:
        told = file.metadata()
    assert "lcm_kit.method" not in told and "lcm_kit.guidance_min" not in told
    assert told["lcm_kit.steps"] == told["ss_steps"] == str(facts(overtrained)["step"])
    card = (overtrained / "export/README.md").read_text()
    assert "It changes what is drawn and not how" in card and "LCMScheduler" not in card
    # Distillation with the run's folder as the teacher's style
    worn = {"adapters": [{"path": str(overtrained)}]}
    plain = distill.main(configure(distill_keys, tmp_path / "plain", steps=1))
    styled = distill.main(configure(distill_keys, tmp_path / "styled", steps=1, teacher=worn))
    assert facts(styled)["teacher"]["adapters"][0]["path"] == str(overtrained)
    assert abs(metrics(styled)[1] / metrics(plain)[1] - 1) > 1e-3


def test_the_report_needs_no_evaluation_and_says_over_trained(overtrained: Path) -> None:
    page = write_report(overtrained).read_text()
    losses, best = metrics(overtrained, "held_out_loss"), facts(overtrained)["step"]
    answer = f"Yes, at step {best}." if losses[best] < losses[0] else "No."
    assert f'<span class="verdict">{answer}</span>' in page
    assert f"Over-trained: the loss on held-out pictures was lowest at step {best}" in page
    assert page.count("data:image/svg+xml") == 2 and 'src="http' not in page  # two curves, nothing fetched


def test_without_held_out_pictures_the_last_weights_are_the_result(keys: Keys, tmp_path: Path) -> None:
    run = finetune.main(config(keys, tmp_path, steps=2, validation=ALONE))
    assert same(weights(run), weights(run, "state/step-000002")) and not (run / "best").exists()
    assert not metrics(run, "held_out_loss") and facts(run)["step"] == 2


def test_an_average_is_what_is_measured_and_saved(keys: Keys, tmp_path: Path) -> None:
    run = finetune.main(config(keys, tmp_path, steps=3, ema=0.5, checkpoint={"every": 1, "keep": 9}))
    average = {key: torch.zeros_like(t) if ".lora_B." in key else t for key, t in weights(run).items()}
    live = [weights(run, f"state/step-{step:06d}") for step in (1, 2, 3)]
    saved = load_file(run / "state/step-000003/ema.safetensors")
    down = next(key for key in live[0] if ".lora_B." in key)
    average = (live[0][down] / 2 + live[1][down]) / 4 + live[2][down] / 2  # up from zero
    torch.testing.assert_close(saved[down], average, atol=1e-7, rtol=1e-5)
    assert same(weights(run), saved) and not same(weights(run), live[2])
    assert facts(run)["held_out_loss"] == metrics(run, "held_out_loss")[3]


@pytest.mark.slow
def test_validation_draws_base_and_lora_and_disturbs_nothing(keys: Keys, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red ball\nblue\n")
    drawn = {"prompts": str(tmp_path / "prompts.txt"), "count": 2, "guidance_scale": 3.0}
    run = finetune.main(config(keys, tmp_path / "seen", steps=2, validation=drawn))
    plain = finetune.main(config(keys, tmp_path / "unseen", steps=2))
    assert same(weights(run), weights(plain))
    assert Image.open(run / "validation/step-000002.png").width == 2 * 64 + 4
    pipe = sample.pipeline(keys["base"]["path"])
    how: Keys = {"sampler": "ddim", "steps": 30, "guidance_scale": 3.0, "seed": 1234, "size": 64}
    base = sample.latents(pipe, ["a red ball", "blue"], **how)
    load_adapter(run / "adapter", pipe.unet)
    styled = sample.latents(pipe, ["a red ball", "blue"], **how)
    distance = float((styled - base).square().mean().sqrt())
    assert metrics(run, "distance_to_base")[2] == pytest.approx(distance, rel=1e-4)


# -- Going on ------------------------------------------------------------------------------------------------

RESUMED: Keys = {
    "steps": 7, "ema": 0.5, "optimizer": {"schedule": "cosine", "warmup_steps": 2},
    "validation": {"every": 2, "held_out": 0.25}, "logging": {"every": 3}, "checkpoint": {"every": 2},
}  # fmt: skip


def test_a_stopped_run_continues_bit_for_bit(
    keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    straight = finetune.main(config(keys, tmp_path / "straight", own=True, **RESUMED))
    run, step_randomness = tmp_path / "run", finetune.step_randomness

    def stop(wanted: Finetune, timesteps: int, batch: Batch, step: int, whose: str = "") -> Any:
        if step == 5:
            raise KeyboardInterrupt
        return step_randomness(wanted, timesteps, batch, step, whose)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(finetune, "step_randomness", stop)
        finetune.main(config(keys, run, own=True, **RESUMED))
    # As a stop before a measurement leaves the run, which saves the state of its step without it
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    assert (
        json.loads(lines[-1]).keys() == {"step", "held_out_loss", "hash"}
        and json.loads(lines[-1])["step"] == 4
    )
    (run / "metrics.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(UserError, match="of its 4 lines until step 4 3 are there"):  # it counted all
        finetune.main(config(keys, run, own=True, **RESUMED))
    state = run / "state/step-000004/manifest.json"
    counted = own_files.read_json(state, own_shapes.State, "")
    own_files.write_json(state, {**counted, "lines": 3})
    late = {**RESUMED, "validation": {"every": 2, "held_out": 0.5}}
    with pytest.raises(UserError, match=r"started with validation\.held_out 0\.25 and the config says 0\.5"):
        finetune.main(config(keys, run, own=True, **late))
    torch.manual_seed(12345)  # another process has another global random state
    finetune.main(config(keys, run, own=True, **RESUMED))
    assert "continuing after step 4 of 7" in capsys.readouterr().out
    assert facts(run) == facts(straight) and same(weights(run), weights(straight))
    for name in ("loss", "grad_norm", "held_out_loss"):
        assert metrics(run, name) == metrics(straight, name)
    a, b = (checkpoints.read(folder / "state/step-000007") for folder in (run, straight))
    assert same(a.lora, b.lora) and same(a.ema, b.ema)
    for index, moments in b.optimizers["adapter"]["state"].items():
        assert same(a.optimizers["adapter"]["state"][index], moments)
    finetune.main(config(keys, run, own=True, **RESUMED))
    assert "nothing to do" in capsys.readouterr().out


RANK = """
import sys
from pathlib import Path
from lcm_kit.config.load import load
from train import finetune
finetune.main(load(Path(sys.argv[1])))
"""


@pytest.mark.slow  # two processes that import torch anew
def test_two_ranks_equal_one_process_with_twice_the_batch(keys: Keys, tmp_path: Path) -> None:
    optimizer = {"eps": 1e-3}  # Adam's sign of a gradient of nothing would amplify float error
    both: Keys = {"own": True, "steps": 3, "optimizer": optimizer, "validation": {"every": 1}}
    two = config(keys, tmp_path / "two", batch_size=1, **both)
    (tmp_path / "config.yaml").write_text(dump(two))
    launch(RANK, tmp_path, tmp_path / "config.yaml")
    one = finetune.main(config(keys, tmp_path / "one", batch_size=2, **both))
    a, b = weights(tmp_path / "two"), weights(one)
    assert max(float((a[key] - b[key]).abs().max()) for key in b) < 1e-4
    for name in ("loss", "held_out_loss"):
        found, wanted = metrics(tmp_path / "two", name), metrics(one, name)
        assert list(found) == list(wanted) and [*found.values()] == pytest.approx(
            [*wanted.values()], rel=1e-4
        )
    assert facts(tmp_path / "two")["step"] == facts(one)["step"] > 0


def test_mistakes_are_found_before_training(keys: Keys, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="were drawn otherwise; run `lcm-kit encode`"):
        finetune.main(config(keys, tmp_path / "a", own=True, prior={"steps": 3}))
    with pytest.raises(UserError, match="there is no finished cache"):
        finetune.main(config(keys, tmp_path / "b", data={"cache": str(tmp_path / "none")}))
    with pytest.raises(UserError, match="training diverged"):
        finetune.main(config(keys, tmp_path / "c", optimizer={"lr": 1e9}))
