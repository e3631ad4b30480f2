"""What ships: sizes, names, and that held-out prompts are held out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lcm_kit import assets
from lcm_kit.drawing.canvas import Canvas
from lcm_kit.errors import UserError
from lcm_kit.tiny import world
from lcm_kit.tiny.probe import load_probe


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_sizes() -> None:
    assert sum(size(assets.path(name)) for name in assets.NAMES) <= 33e6
    assert size(assets.path("brand")) <= 2e6


def test_the_brand_set_is_whole_and_its_prompts_are_held_out() -> None:
    pictures = sorted(assets.path("brand").glob("*.png"))
    assert 60 <= len(pictures) <= 120
    captions = {path.with_suffix(".txt").read_text().strip() for path in pictures}
    assert all(world.parse(caption) for caption in captions)
    held_out = assets.prompts("asset:brand")
    assert len(held_out) >= 24 and not captions & set(held_out)
    assert all(world.parse(prompt) for prompt in held_out)
    drawn = {world.parse(caption).object for caption in captions}  # type: ignore[union-attr]
    assert {world.parse(prompt).object for prompt in held_out} - drawn  # type: ignore[union-attr]


def test_held_out_prompts_of_the_base() -> None:
    prompts = assets.prompts("asset:tiny-sd")
    assert len(prompts) == len(set(prompts)) >= 1000
    assert all(world.parse(prompt) for prompt in prompts)


def test_the_probe_reads_real_renders_that_it_has_not_seen() -> None:
    rng = np.random.default_rng(4711)
    scenes = [world.random_scene(rng) for _ in range(600)]
    pictures = np.stack([np.asarray(world.render(scene)) for scene in scenes])
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    seen = load_probe().read(images)
    right = [all(got[n] == getattr(s, n) for n in got) for got, s in zip(seen, scenes, strict=True)]
    assert np.mean(right) >= 0.99


@pytest.mark.parametrize(
    ("name", "most", "world_least", "brand_least"),
    [("preview", 0.2e6, 30, 23), ("consistency", 1.7e6, 31, 26)],
)
def test_the_decoders_of_the_base_give_pictures_back(
    name: str, most: float, world_least: float, brand_least: float
) -> None:
    """Decibels between pictures that no training has seen and what is decoded of their latents."""
    from lcm_kit import sample
    from lcm_kit.bases import inspect_base
    from lcm_kit.drawing import editing
    from lcm_kit.drawing.how import How

    rng = np.random.default_rng(4712)
    drawn = [world.render(world.random_scene(rng)) for _ in range(24)]
    shipped = [Image.open(path).convert("RGB") for path in sorted(assets.path("brand").glob("*.png"))[:24]]
    how = How.of(inspect_base("asset:tiny-sd"), f"asset:tiny-sd-{name}", False, False)
    pipe = sample.pipeline("asset:tiny-sd", how=how)
    for pictures, least in ((drawn, world_least), (shipped, brand_least)):
        pixels = torch.cat([Canvas.of(each.resize((64, 64), 1), 8).pixels for each in pictures])
        found = sample.decode(pipe, editing.encode(pipe, pixels), seed=1)
        error = ((found - pixels) / 2).square().mean((1, 2, 3))
        assert float((-10 * error.log10()).mean()) >= least
    assert size(assets.path(f"tiny-sd-{name}")) <= most


def test_what_trains_the_consistency_decoder_is_what_diffusers_draws_with() -> None:
    """The two steps of its `decode` written out, on tiny-sd's own, whose encoder is that of the VAE."""
    from diffusers import AutoencoderKL, ConsistencyDecoderVAE

    from lcm_kit.tiny import decoders

    model = ConsistencyDecoderVAE.from_pretrained(assets.path("tiny-sd-consistency"))
    vae = AutoencoderKL.from_pretrained(assets.path("tiny-sd") / "vae", dtype=torch.float32)
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        raw = vae.encode(pixels).latent_dist.mean
        torch.testing.assert_close(model.encode(pixels).latent_dist.mean, raw, rtol=0, atol=1e-4)
        latents = raw * vae.config.scaling_factor
        # as the README says for diffusers alone
        told = json.loads((assets.path("tiny-sd-consistency") / "config.json").read_text())
        for name, key in (("means", "latents_mean"), ("stds", "latents_std")):
            setattr(model, name, torch.tensor(told[key]).view(1, -1, 1, 1))
        drawn = model.decode(raw, torch.Generator().manual_seed(5)).sample
        generator = torch.Generator().manual_seed(5)
        scheduler, seen = model.decoder_scheduler, (latents - model.means) / model.stds
        noisy = scheduler.sqrt_one_minus_alphas_cumprod[1008] * torch.randn(2, 3, 64, 64, generator=generator)
        first = decoders.denoised(model, noisy, seen, 1008)
        noise = torch.randn(2, 3, 64, 64, generator=generator)
        noisy = scheduler.sqrt_alphas_cumprod[512] * first
        noisy = noisy + scheduler.sqrt_one_minus_alphas_cumprod[512] * noise
        torch.testing.assert_close(decoders.denoised(model, noisy, seen, 512), drawn, rtol=0, atol=1e-4)


def test_names_that_are_not_shipped() -> None:
    with pytest.raises(UserError, match="big-sd.*tiny-sd"):
        assets.path("big-sd")
    with pytest.raises(UserError, match="no such file"):
        assets.prompts("/nowhere/prompts.txt")
    assert assets.resolve("some/hub-id") == "some/hub-id"


def test_prompt_files_skip_blanks_and_comments(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("# comment\n\n  a cat  \na dog\n")
    assert assets.prompts(str(file)) == ["a cat", "a dog"]
    file.write_bytes("\ufeffa cat\n".encode())  # as Notepad saves it
    assert assets.prompts(str(file)) == ["a cat"]
    file.write_bytes("ärger\n".encode("latin-1"))
    with pytest.raises(UserError, match="save it as UTF-8"):
        assets.prompts(str(file))
    file.write_text("# nothing\n")
    with pytest.raises(UserError, match="no prompt"):
        assets.prompts(str(file))


def test_general_pictures_leave_the_held_out_prompts_out() -> None:
    from lcm_kit.config.schema import Data
    from lcm_kit.data.records import open_records

    records, bad = open_records(Data(path="asset:general"))
    assert len(records) == 384 and not bad
    captions = {record.caption for record in records}
    assert all(world.parse(caption) for caption in captions)
    assert not captions & set(assets.prompts("asset:tiny-sd"))


@pytest.mark.parametrize(("base", "guidance_brings"), [("tiny-sd", 0.05), ("tiny-sd-v", 0.02)])
def test_the_base_is_as_good_as_its_card_says(base: str, guidance_brings: float) -> None:
    """`quality.json` is what `lcm-kit evaluate evaluation/tiny_base` measured (see the card)."""
    import json

    rows = json.loads((assets.path(base) / "quality.json").read_text())["rows"]
    teacher = {row["guidance_scale"]: row for row in rows if row["kind"] == "teacher"}
    assert teacher[5.0]["samples"] >= 500 and teacher[5.0]["prompt_adherence"] >= 0.95
    assert teacher[1.0]["prompt_adherence"] <= teacher[5.0]["prompt_adherence"] - guidance_brings
    plain = [row for row in rows if row["kind"] == "plain" and row["guidance_scale"] == 5.0]
    assert {row["sampler"] for row in plain if row["unet_calls"] == 4} == {"ddim", "dpmpp_2m"}
    for row in plain:
        if row["unet_calls"] == 4:
            assert row["prompt_adherence"] <= teacher[5.0]["prompt_adherence"] - 0.20
    card = (assets.path(base) / "README.md").read_text()
    assert f"{teacher[5.0]['prompt_adherence']:.1%}" in card


def test_a_place_is_an_asset_or_a_path_from_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert assets.place("~/a") == tmp_path / "a" and assets.place("b/~") == Path("b/~")
    assert assets.place("asset:brand") == assets.path("brand")
    assert assets.place("~no-such-user/a") == Path("~no-such-user/a")
    (tmp_path / "p.txt").write_text("a fox\n")
    assert assets.prompts("~/p.txt") == ["a fox"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"a fox\n\x1b[2Ja cat\n", r", line 2: prompt holds a control character, '\x1b'; take it out"),
        (b"x" * 20_001, ", line 1: prompt is too long: 20,001 characters of at most 20,000; take it out"),
        (b"# a\n \n", ": the file holds no prompt; write one a line"),
        (b"\xff\xfe\x00", ": the file cannot be read ("),
        (b"a\n" * 2**25 + b"a", ": more than 67,108,864 bytes, which no file of prompts has; "),
    ],
    ids=["control", "long", "none", "bytes", "large"],
)
def test_what_is_no_file_of_prompts(tmp_path: Path, content: bytes, sentence: str) -> None:
    file = tmp_path / "p.txt"
    file.write_bytes(content)
    with pytest.raises(UserError) as caught:
        assets.prompts(str(file))
    assert str(caught.value).startswith(f"prompts {str(file)!r}{sentence}")


def test_prompts_as_editors_save_them(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes("a\tfox  runs\r\n\r\n# no\r\nan\u2028owl\rb".encode("utf-16"))
    assert assets.prompts(str(tmp_path / "p.txt")) == ["a fox runs", "an owl", "b"]
