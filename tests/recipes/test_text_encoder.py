"""Fine-tuning with a LoRA on the text encoders: held against plain diffusers, peft and torch throughout."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lcm_kit import bases, sample
from lcm_kit.adapter import folder as adapter
from lcm_kit.adapter import text as text_lora
from lcm_kit.adapter.adapted_unet import AdaptedUNet
from lcm_kit.adapter.text import TextLora
from lcm_kit.config.finetune import Finetune, TextEncoder
from lcm_kit.config.load import dump
from lcm_kit.data import prior
from lcm_kit.data.batches import Batch, Batches, generator_at
from lcm_kit.data.cache import Cache
from lcm_kit.data.captions import live
from lcm_kit.data.images import encode
from lcm_kit.data.split import split
from lcm_kit.errors import UserError
from lcm_kit.export.run import export_run
from lcm_kit.lora import provenance
from lcm_kit.training import checkpoints
from tests.recipes.small import configure, launch, prepare
from tests.recipes.test_finetune import RANK, metrics, same, tuning, weights
from tests.runs import load_adapter
from train import finetune

Keys = dict[str, Any]
CPU = torch.device("cpu")
TEXT: Keys = {"rank": 2, "alpha": 6.0, "lr": 3e-2}


@pytest.fixture(autouse=True)
def _cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


@pytest.fixture(scope="module")
def keys(distill_keys: Keys) -> Keys:
    # eps: Adam's step is then as large as the gradient is, not its sign alone
    optimizer = {**distill_keys["optimizer"], "eps": 1e-2}
    return {**tuning(distill_keys), "text_encoder": TEXT, "optimizer": optimizer}


@pytest.fixture(scope="module")
def sdxl_keys(keys: Keys, sdxl_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Keys:
    made = tuning(prepare(tmp_path_factory.mktemp("text-xl"), sdxl_base))
    return {**keys, "base": made["base"], "data": made["data"]}


def config(keys: Keys, output: Path, **changes: Any) -> Finetune:
    return configure(keys, output, **changes)


def opened(wanted: Finetune) -> tuple[bases.BaseInfo, Cache, TextLora]:
    base = bases.inspect_base(wanted.base.path)
    text = text_lora.load(base, wanted, CPU)
    assert text is not None
    return base, Cache.open(wanted.data.cache, base=base, data=wanted.data), text


def plain(wanted: Finetune) -> Any:
    """diffusers' pipeline of the base."""
    return sample.pipeline(wanted.base.path)


def encoded(pipe: Any, captions: list[str]) -> tuple[Tensor, Tensor | None]:
    """Embeddings and pooled embeddings, as the pipeline itself makes them, with gradient."""
    found = pipe.encode_prompt(
        prompt=captions, device=CPU, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    return found[0], found[2] if len(found) == 4 else None


# -- The same numbers as in the cache ------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_at_first_captions_are_encoded_as_they_were_cached(
    family: str, keys: Keys, sdxl_keys: Keys, tmp_path: Path
) -> None:
    wanted = config(keys if family == "sd" else sdxl_keys, tmp_path)
    _, cache, text = opened(wanted)
    assert list(text.encoders) == ["text_encoder", "text_encoder_2"][: 1 + (family == "sdxl")]
    rows, dropped = [5, 0, 3], torch.tensor([False, True, False])
    heard, stored = live(cache, text), cache
    found = heard.condition(rows).to(CPU, torch.float32).replaced(dropped, heard.empty())
    known = stored.condition(rows).replaced(dropped, stored.empty())
    for part in (slice(0, 3), slice(1, 2), [2, 1]):
        told, wished = found[part].kwargs(), known[part].kwargs()
        torch.testing.assert_close(told, wished, atol=1e-6, rtol=0)
        states = told["encoder_hidden_states"]
        assert isinstance(states, Tensor) and states.requires_grad
        assert ("added_cond_kwargs" in told) == (family == "sdxl")
    a, b = (side.empty(2).kwargs()["encoder_hidden_states"] for side in (heard, stored))
    torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    half = heard.condition([1]).to(CPU, torch.bfloat16).kwargs()["encoder_hidden_states"]
    assert isinstance(half, Tensor) and half.dtype == torch.bfloat16
    assert live(cache, None) is cache and live(None, text) is None


def test_without_a_rank_nothing_is_loaded(keys: Keys, tmp_path: Path) -> None:
    off = config({**keys, "text_encoder": {}}, tmp_path)
    assert text_lora.load(bases.inspect_base(off.base.path), off, CPU) is None
    for key, value in (("alpha", 4.0), ("lr", 1e-3)):
        with pytest.raises(ValueError, match=f"{key} has no effect without rank"):
            config({**keys, "text_encoder": {key: value}}, tmp_path)


# -- The algorithm, written again with diffusers' own pipeline -----------------------------------------------


def straight_line(wanted: Finetune) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """Losses, gradient norms, and the B weights of the text encoders after the last step."""
    from diffusers import DDPMScheduler
    from peft import LoraConfig, inject_adapter_in_model

    pipe = plain(wanted)
    scheduler = DDPMScheduler.from_pretrained(wanted.base.path, subfolder="scheduler")
    torch.manual_seed(wanted.seed)
    pipe.unet.requires_grad_(False)
    how: Keys = {"r": wanted.adapter.rank, "lora_alpha": wanted.adapter.alpha}
    pipe.unet.add_adapter(LoraConfig(**how, target_modules=bases.lora_targets("lcm")))
    encoders = {name: getattr(pipe, name, None) for name in ("text_encoder", "text_encoder_2")}
    encoders = {name: encoder for name, encoder in encoders.items() if encoder is not None}
    ends = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
    for k, (name, encoder) in enumerate(encoders.items()):
        torch.manual_seed(wanted.seed + 1 + k)
        encoder.requires_grad_(False)
        # SDXL sees the second to last state of the first encoder, so the last of its two layers does nothing
        some: Keys = {"layers_to_transform": [0]} if len(encoders) == 2 and name == "text_encoder" else {}
        how = {"r": wanted.text_encoder.rank, "lora_alpha": wanted.text_encoder.alpha or 2.0}
        # not transformers' own add_adapter: 5.24 wants a peft that is not published
        inject_adapter_in_model(LoraConfig(**how, target_modules=ends, **some), encoder)
    unet_own = [p for p in pipe.unet.parameters() if p.requires_grad]
    text_own = [p for encoder in encoders.values() for p in encoder.parameters() if p.requires_grad]
    o = wanted.optimizer
    groups = [{"params": unet_own, "lr": o.lr}, {"params": text_own, "lr": wanted.text_encoder.lr or o.lr}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, eps=o.eps)
    base = bases.inspect_base(wanted.base.path)
    cache = Cache.open(wanted.data.cache, base=base, data=wanted.data)
    captions = dict(zip(cache.ids, cache.captions, strict=True))
    batches, losses, norms = Batches(cache, wanted.batch_size, wanted.seed), [], []
    for step in range(wanted.steps):
        batch = batches.at(step)

        def streams(purpose: str) -> list[torch.Generator]:
            return [generator_at(wanted.seed, step, slot, purpose) for slot in batch.slots]  # noqa: B023

        noise = torch.stack([torch.randn(4, 16, 16, generator=g) for g in streams("noise")])
        t = torch.stack([torch.randint(1000, (), generator=g) for g in streams("times")])
        dropped = [bool(torch.rand((), generator=g) < wanted.caption_dropout) for g in streams("dropout")]
        told = ["" if gone else captions[id] for id, gone in zip(batch.ids, dropped, strict=True)]
        embeds, pooled = encoded(pipe, told)
        more = {}
        if pooled is not None:
            stays = ~torch.tensor(dropped)  # SDXL takes zeros for no caption
            embeds, pooled = embeds * stays.view(-1, 1, 1), pooled * stays.view(-1, 1)
            more = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": batch.condition.time_ids}}
        output = pipe.unet(scheduler.add_noise(batch.latents, noise, t), t, embeds, **more).sample
        loss = (output - noise).square().mean()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_([*unet_own, *text_own], o.grad_clip)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    ups = {
        f"{part}.text_model.{name.removeprefix('text_model.').replace('.default', '')}": p.detach()
        for part, encoder in encoders.items()
        for name, p in encoder.named_parameters()
        if "lora_B" in name
    }
    return losses, norms, ups


def text_ups(run: Path) -> dict[str, Tensor]:
    return {key: w for key, w in weights(run).items() if key.startswith("text_") and "lora_B" in key}


def compare(run: Path, wanted: Finetune, modules: int) -> None:
    """The run's numbers with the straight line's; and that the text encoders made the difference."""
    losses, norms, ups = straight_line(wanted)
    assert [*metrics(run).values()] == pytest.approx(losses, rel=2e-4)
    assert [*metrics(run, "grad_norm").values()] == pytest.approx(norms, rel=2e-4)
    found = text_ups(run)
    assert found.keys() == ups.keys() and len(found) == modules
    for key, up in ups.items():
        assert float(up.abs().max()) > 1e-6, key  # all of them learned
        torch.testing.assert_close(found[key], up, atol=2e-3 * float(up.abs().max()), rtol=0)


@pytest.fixture(scope="module")
def trained(keys: Keys, tmp_path_factory: pytest.TempPathFactory) -> tuple[Finetune, Path]:
    folder = tmp_path_factory.mktemp("trained")
    (folder / "prompts.txt").write_text("a red ball\nblue\n")
    drawn = {"prompts": str(folder / "prompts.txt"), "count": 2, "guidance_scale": 3.0, "held_out": 0.25}
    wanted = config(
        keys, folder / "look", steps=3, validation=drawn, caption_dropout=0.4,
        loss={"min_snr_gamma": None},
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        return wanted, finetune.main(wanted)


def test_losses_and_gradients_equal_a_straight_line_script(keys: Keys, tmp_path: Path) -> None:
    wanted = config(
        keys, tmp_path / "run", steps=3, validation={"prompts": None, "held_out": 0.0}, caption_dropout=0.4,
        loss={"min_snr_gamma": None},
    )  # fmt: skip
    compare(finetune.main(wanted), wanted, modules=12)
    none = replace(wanted, output=str(tmp_path / "off"), text_encoder=TextEncoder())
    without = metrics(finetune.main(none))
    with_it = metrics(tmp_path / "run")
    assert with_it[1] == pytest.approx(without[1], rel=1e-6)
    assert abs(without[3] / with_it[3] - 1) > 1e-4  # what the text encoders learned is seen


def test_a_gradient_equals_finite_differences(keys: Keys, tmp_path: Path) -> None:
    """Of one weight behind the tokens, in float64, through the recipe's own `Captions`."""
    wanted = config(keys, tmp_path)
    base, cache, text = opened(wanted)
    unet = bases.load_unet(base).double()
    text.encoders["text_encoder"].double()
    condition = live(cache, text).condition([0, 1]).to(CPU, torch.float64)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn((2, 4, 16, 16), generator=generator).double()
    named = dict(text.encoders["text_encoder"].named_parameters())
    for name, p in named.items():
        if "lora_B" in name:
            p.data = torch.randn(p.shape, generator=generator).double() * 0.1

    def loss() -> Tensor:
        return unet(x, torch.tensor([500, 20]), **condition.kwargs()).sample.square().mean()

    loss().backward()
    for end in ("layers.0.self_attn.q_proj.lora_A.adapter.weight", "layers.1.mlp.fc1.lora_B.adapter.weight"):
        p = next(p for name, p in named.items() if name.endswith(end))
        assert p.grad is not None
        place = divmod(int(p.grad.abs().argmax()), p.shape[1])
        sides = []
        for step in (1e-4, -1e-4):
            with torch.no_grad():
                p[place] += step
                sides.append(float(loss()))
                p[place] -= step
        assert float(p.grad[place]) == pytest.approx((sides[0] - sides[1]) / 2e-4, rel=1e-5)


# -- What comes out ------------------------------------------------------------------------------------------


def ours(wanted: Finetune, run: Path) -> TextLora:
    """The text encoders with the adapter of `run`, as training has them."""
    base, _, text = opened(wanted)
    adapted = AdaptedUNet(bases.load_unet(base))
    adapted.add_lora(wanted.adapter)
    text_lora.joined(adapted, text, wanted)
    adapted.load_state(weights(run))
    return text


def same_embeddings(wanted: Finetune, run: Path, pipe: Any, weight_name: str) -> None:
    """`pipe`, after `load_lora_weights` of an exported float32 file, encodes as training does."""
    prompts = ["a red ball", ""]
    before, _ = encoded(pipe, prompts)
    pipe.load_lora_weights(str(run / "export"), weight_name=weight_name)
    with torch.no_grad():
        embeds, pooled = encoded(pipe, prompts)
        found = ours(wanted, run).encode(prompts)
    torch.testing.assert_close(found.embeds, embeds, atol=1e-5, rtol=1e-5)
    assert float((embeds - before).norm() / before.norm()) > 1e-3  # it does change them
    if pooled is not None:
        torch.testing.assert_close(found.pooled, pooled, atol=1e-5, rtol=1e-5)


def verdicts(run: Path) -> set[str]:
    said = json.loads((run / "export/verified.json").read_text())["files"]
    return {row["verdict"] for file in said.values() for row in file["apps"].values()}


def test_the_files_give_diffusers_what_was_trained_and_measured(trained: tuple[Finetune, Path]) -> None:
    """Embeddings, the held-out loss and the distance to the base, all by plain diffusers from the files."""
    from diffusers import DDPMScheduler

    wanted, run = trained
    files = export_run(run, dtype="float32")
    assert verdicts(run) == {"ok"} and len(files) == 2
    same_embeddings(wanted, run, plain(wanted), files["kohya"].name)
    pipe = plain(wanted)
    how: Keys = {"sampler": "ddim", "steps": 30, "guidance_scale": 3.0, "seed": 1234, "size": 64}
    prompts = ["a red ball", "blue"]
    base = sample.latents(pipe, prompts, **how)
    kept = load_file(next((run / "validation").glob("teacher-*.safetensors")))["latents"]
    torch.testing.assert_close(kept, base, atol=1e-4, rtol=1e-4)  # the base's column has no LoRA at all
    same_embeddings(wanted, run, pipe, files["diffusers"].name)
    styled = sample.latents(pipe, prompts, **how)
    distance = float((styled - base).square().mean().sqrt())
    assert metrics(run, "distance_to_base")[3] == pytest.approx(distance, rel=1e-4)

    scheduler = DDPMScheduler.from_pretrained(wanted.base.path, subfolder="scheduler")
    _, cache, _ = opened(wanted)
    _, held = split(cache, 0.25, wanted.seed)
    captions, total = dict(zip(cache.ids, cache.captions, strict=True)), 0.0
    with torch.no_grad():
        for slot in range(8 * len(held)):
            picture, place = divmod(slot, 8)
            t = torch.tensor([(2 * place + 1) * 1000 // 16])
            x0, generator = held.latents([picture]), generator_at(wanted.seed, 0, slot, "held out")
            noise = torch.randn((1, *x0.shape[1:]), generator=generator)
            embeds, _ = encoded(pipe, [captions[held.ids[picture]]])
            output = pipe.unet(scheduler.add_noise(x0, noise, t), t, embeds).sample
            total += float((output - noise).square().mean())
    assert metrics(run, "held_out_loss")[3] == pytest.approx(total / (8 * len(held)), rel=1e-4)

    facts = adapter.read_provenance(run / "adapter")
    assert facts.text_encoder == provenance.TextEncoder(**TEXT)
    assert facts.text_lora_config["text_encoder"]["lora_alpha"] == 6.0
    assert "text encoder" in (run / "export/README.md").read_text()
    unet = bases.load(wanted.base.path, parts=["unet"]).unet
    load_adapter(run / "adapter", unet)  # the UNet's share alone, which is whole


@pytest.mark.slow  # all 788 layers of SDXL
def test_both_encoders_of_sdxl_are_trained_and_exported(sdxl_keys: Keys, tmp_path: Path) -> None:
    wanted = config(
        sdxl_keys, tmp_path / "xl", steps=2, validation={"prompts": None, "held_out": 0.0},
        caption_dropout=0.5, loss={"min_snr_gamma": None}, text_encoder={"alpha": None, "lr": None},
        optimizer={"eps": 1e-4},  # what is behind the pooled embedding alone has small gradients
    )  # fmt: skip
    run = finetune.main(wanted)
    compare(run, wanted, modules=6 + 12)
    files = export_run(run, style="diffusers", dtype="float32")
    assert verdicts(run) == {"ok"}
    same_embeddings(wanted, run, plain(wanted), files["diffusers"].name)


# -- Around it -----------------------------------------------------------------------------------------------


def test_the_teacher_is_the_base_in_its_text_encoders_too(keys: Keys, tmp_path: Path) -> None:
    wanted = config(keys, tmp_path)
    base, _, text = opened(wanted)
    adapted = AdaptedUNet(bases.load_unet(base))
    adapted.add_lora(wanted.adapter)
    parameters = text_lora.joined(adapted, text, wanted)[1]["params"]
    with torch.no_grad():
        for p in parameters:
            p.add_(0.1)
        on = text.encode(["blue"]).embeds
        with adapted.teacher():
            off = text.encode(["blue"]).embeds
        known = bases.family_of(base).encode_text(bases.load_text(base), ["blue"]).embeds
    assert torch.equal(off, known) and float((on - off).norm() / off.norm()) > 0.1


def test_recomputed_activations_give_the_same_weights(keys: Keys, tmp_path: Path) -> None:
    alone = {"prompts": None, "held_out": 0.0}
    runs = [
        finetune.main(config(keys, tmp_path / str(on), steps=2, validation=alone, gradient_checkpointing=on))
        for on in (False, True)
    ]
    a, b = (text_ups(run) for run in runs)
    assert all(float(up.abs().max()) > 0 for up in b.values())
    for key, up in a.items():
        torch.testing.assert_close(b[key], up, atol=1e-6, rtol=1e-4)


RESUMED: Keys = {
    "steps": 5, "ema": 0.5, "optimizer": {"schedule": "cosine", "warmup_steps": 2},
    "validation": {"every": 2, "held_out": 0.25}, "checkpoint": {"every": 2}, "caption_dropout": 0.4,
}  # fmt: skip


@pytest.mark.slow  # as in test_finetune, of text encoders
def test_a_stopped_run_continues_bit_for_bit(
    keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "general.txt"
    folder.write_text("a cat\na dog\n")
    cache = {**keys["data"], "cache": str(tmp_path / "cache")}
    found = {**keys, "data": cache, "prior": {"prompts": str(folder), "count": 2, "steps": 2}}
    encode(config(found, tmp_path), progress=False)
    prior.encode(config(found, tmp_path), progress=False)
    straight = finetune.main(config(found, tmp_path / "straight", **RESUMED))
    run, step_randomness = tmp_path / "run", finetune.step_randomness

    def stop(wanted: Finetune, timesteps: int, batch: Batch, step: int, whose: str = "") -> Any:
        if step == 3:
            raise KeyboardInterrupt
        return step_randomness(wanted, timesteps, batch, step, whose)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(finetune, "step_randomness", stop)
        finetune.main(config(found, run, **RESUMED))
    torch.manual_seed(12345)
    finetune.main(config(found, run, **RESUMED))
    assert same(weights(run), weights(straight))
    kept = [sorted(folder.name for folder in (each / "best").iterdir()) for each in (run, straight)]
    assert kept[0] == kept[1] and kept[0]
    for name in kept[0]:
        assert same(weights(run, f"best/{name}"), weights(straight, f"best/{name}"))
    for name in ("loss", "grad_norm", "held_out_loss"):
        assert metrics(run, name) == metrics(straight, name)
    a, b = (checkpoints.read(each / "state/step-000005") for each in (run, straight))
    assert same(a.lora, b.lora) and same(a.ema, b.ema)
    assert sum(key.startswith("text_encoder.") for key in b.lora) == 24 and a.ema.keys() == a.lora.keys()
    rates = [group["lr"] for group in b.optimizers["adapter"]["param_groups"]]
    assert rates[1] == pytest.approx(3 * rates[0]) and rates == [
        group["lr"] for group in a.optimizers["adapter"]["param_groups"]
    ]
    for index, moments in b.optimizers["adapter"]["state"].items():
        assert same(a.optimizers["adapter"]["state"][index], moments)
    other = {**found, "text_encoder": {"rank": 4}}
    with pytest.raises(UserError, match=r"started with text_encoder\.alpha 6\.0"):
        finetune.main(config(other, run, **RESUMED))


@pytest.mark.slow  # two processes that import torch anew
def test_two_ranks_equal_one_process_with_twice_the_batch(keys: Keys, tmp_path: Path) -> None:
    both: Keys = {"steps": 3, "validation": {"every": 1}, "caption_dropout": 0.5}
    two = config(keys, tmp_path / "two", batch_size=1, **both)
    (tmp_path / "config.yaml").write_text(dump(two))
    launch(RANK, tmp_path, tmp_path / "config.yaml")
    one = finetune.main(config(keys, tmp_path / "one", batch_size=2, **both))
    a, b = weights(tmp_path / "two"), weights(one)
    assert a.keys() == b.keys() and max(float((a[key] - b[key]).abs().max()) for key in b) < 1e-4
    for name in ("loss", "held_out_loss"):
        found, known = metrics(tmp_path / "two", name), metrics(one, name)
        assert list(found) == list(known)
        assert [*found.values()] == pytest.approx([*known.values()], rel=1e-4)
    # and what two processes began, one ends
    longer = config(keys, tmp_path / "two", batch_size=1, **{**both, "steps": 4})
    assert 4 in metrics(finetune.main(longer))
