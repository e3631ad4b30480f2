"""Sampling: what a sample depends on, what it costs, and what is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import TCDScheduler
from PIL import Image

from lcm_kit import bases, sample, samplers
from lcm_kit.api import editing
from lcm_kit.errors import UserError

PROMPTS = ["a cat", "a dog", "an owl", "a fox", "a fish"]


@pytest.fixture(scope="module")
def pipe(sd_base: Callable[..., Path]) -> Any:
    return sample.pipeline(str(sd_base("epsilon")))


@pytest.mark.parametrize("sampler", samplers.names())
def test_batch_size_changes_no_picture(pipe: Any, sampler: str) -> None:
    together = sample.sample(pipe, PROMPTS, sampler=sampler, steps=3, seed=5)
    parts = [
        sample.sample(pipe, PROMPTS[a:b], sampler=sampler, steps=3, seed=5, first=a)
        for a, b in ((0, 2), (2, 5))
    ]
    assert together.shape == (5, 3, 64, 64)
    torch.testing.assert_close(torch.cat(parts), together, rtol=0, atol=2e-5)


def test_noise_is_a_function_of_seed_and_index() -> None:
    def draw(seed: int, first: int, count: int) -> list[torch.Tensor]:
        return [torch.randn(8, generator=g) for g in sample.generators(seed, first, count)]

    assert torch.equal(draw(0, 0, 4)[3], draw(0, 3, 1)[0])
    everything = torch.stack(draw(0, 0, 4) + draw(1, 0, 4))
    assert len(torch.unique(everything, dim=0)) == 8
    # a shared seed arithmetic (seed + index) would make sample 1 of seed 0 sample 0 of seed 1
    assert not torch.equal(draw(0, 1, 1)[0], draw(1, 0, 1)[0])


@pytest.mark.parametrize("sampler", samplers.names())
@pytest.mark.parametrize(("steps", "guidance_scale"), [(1, 1.0), (4, 1.0), (4, 5.0)])
def test_unet_calls(pipe: Any, sampler: str, steps: int, guidance_scale: float) -> None:
    """Counted in the pipeline: samples that pass through the UNet for one picture."""
    seen: list[int] = []
    hook = pipe.unet.register_forward_hook(lambda module, args, output: seen.append(args[0].shape[0]))
    try:
        sample.latents(pipe, PROMPTS[:2], sampler=sampler, steps=steps, guidance_scale=guidance_scale)
    finally:
        hook.remove()
    assert (
        sum(seen) / 2 == sample.unet_calls(steps, guidance_scale) == steps * (2 if guidance_scale > 1 else 1)
    )
    assert len(seen) == steps


def test_timesteps_are_trailing_and_lcms_own(pipe: Any) -> None:
    consistency, plain = [999, 759, 499, 259], [999, 749, 499, 249]
    expected = {"lcm": consistency, "tcd": consistency, "ddim": plain, "dpmpp_2m": plain}
    for sampler, timesteps in expected.items():
        scheduler = sample.scheduler(sampler, pipe.scheduler.config)
        scheduler.set_timesteps(4)
        assert scheduler.timesteps.tolist() == timesteps
    fifty = sample.scheduler("ddim", pipe.scheduler.config)
    fifty.set_timesteps(50)
    assert sorted(fifty.timesteps.tolist()) == list(
        range(19, 1000, 20)
    )  # the grid that the student is trained on


def test_one_ddim_step_is_the_predicted_clean_latent(pipe: Any) -> None:
    """From t = 999 to clean data in one step: x0 = (x - sigma eps) / alpha, with the pipeline's own UNet."""
    drawn = sample.latents(pipe, PROMPTS[:1], sampler="ddim", steps=1, seed=3)
    x = torch.randn((1, pipe.unet.config.in_channels, 16, 16), generator=sample.generators(3, 0, 1)[0])
    embeds = pipe.encode_prompt(PROMPTS[:1], "cpu", 1, False)[0]
    with torch.no_grad():
        eps = pipe.unet(x, torch.tensor(999), encoder_hidden_states=embeds).sample
    alpha_bar = pipe.scheduler.alphas_cumprod[999]
    torch.testing.assert_close(
        drawn, (x - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt(), rtol=1e-4, atol=1e-3
    )


SAMPLING = {
    "use_karras_sigmas": True, "use_exponential_sigmas": True, "use_beta_sigmas": True,
    "use_lu_lambdas": True, "solver_order": 3, "solver_type": "heun", "lower_order_final": False,
    "euler_at_final": True, "thresholding": True, "sample_max_value": 0.5, "dynamic_thresholding_ratio": 0.9,
    "clip_sample_range": 0.5, "steps_offset": 7, "timestep_spacing": "linspace", "variance_type": "learned",
    "algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min", "lambda_min_clipped": -5.1,
    "clip_sample": True, "set_alpha_to_one": False, "original_inference_steps": 10, "timestep_scaling": 3.0,
    "flow_shift": 3.0, "use_dynamic_shifting": True,
}  # fmt: skip


@pytest.mark.parametrize("sampler", samplers.names())
@pytest.mark.parametrize("zero_snr", [False, True])
def test_how_the_bases_own_scheduler_samples_is_not_taken_over(sampler: str, zero_snr: bool) -> None:
    noise = {
        "beta_start": 0.001, "beta_end": 0.011, "beta_schedule": "scaled_linear", "num_train_timesteps": 800,
        "prediction_type": "v_prediction", "rescale_betas_zero_snr": zero_snr,
    }  # fmt: skip
    bare, full = sample.scheduler(sampler, noise), sample.scheduler(sampler, noise | SAMPLING)
    assert dict(full.config) == dict(bare.config)
    assert {key: full.config[key] for key in noise} == noise
    generator = torch.Generator().manual_seed(0)
    x, outputs = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(4, 1, 4, 8, 8, generator=generator)
    drawn = []
    for made in (bare, full):
        made.set_timesteps(4)
        now, stream = x, torch.Generator().manual_seed(1)
        for t, output in zip(made.timesteps, outputs, strict=True):
            now = made.step(output, t, now, generator=stream).prev_sample
        drawn.append(now)
    assert bare.timesteps.tolist() == full.timesteps.tolist() and torch.equal(*drawn)
    assert float(bare.alphas_cumprod[-1]) == pytest.approx(0.0, abs=1e-7) if zero_snr else True


def test_decoding_is_the_vaes_of_latents_without_scale_and_shift(sd_base: Callable[..., Path]) -> None:
    pipe = sample.pipeline(str(sd_base("epsilon")))
    pipe.vae.register_to_config(shift_factor=0.25)
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():  # scaling_factor 0.5 of tests/bases.py
        expected = pipe.vae.decode(latents / 0.5 + 0.25).sample.clamp(-1, 1)
    torch.testing.assert_close(sample.decode(pipe, latents), expected)
    assert (expected.abs() < 1).float().mean() > 0.9  # clipping hides next to nothing


def test_on_a_cpu_the_vae_stays_float32_in_float16(sdxl_base: Path, sd_base) -> None:
    """Another UNet stands in: SDXL's takes its time."""
    unet = bases.load(str(sd_base()), parts=("unet",), dtype=torch.float16).unet
    pipe = sample.pipeline(str(sdxl_base), dtype=torch.float16, unet=unet)
    assert {p.dtype for p in pipe.vae.parameters()} == {torch.float32}
    for model in (pipe.text_encoder, pipe.text_encoder_2):
        assert {p.dtype for p in model.parameters()} == {torch.float16}
    own = bases.load(str(sdxl_base), parts=("vae",)).vae  # loaded so, not rounded and then widened
    assert torch.equal(own.decoder.conv_in.weight, pipe.vae.decoder.conv_in.weight)


def test_the_pipeline_is_left_as_it_was(pipe: Any) -> None:
    before = pipe.scheduler
    sample.latents(pipe, PROMPTS[:1], sampler="lcm", steps=1)
    assert pipe.scheduler is before


def test_guidance_changes_the_picture_and_one_is_none(pipe: Any) -> None:
    plain, guided = (
        sample.latents(pipe, PROMPTS[:1], sampler="ddim", steps=2, guidance_scale=g) for g in (1.0, 5.0)
    )
    assert (plain - guided).abs().max() > 1e-3


def test_tcd_renews_as_much_noise_as_its_authors_do(pipe: Any) -> None:
    """arXiv:2402.19159's gamma, 0.3, is diffusers' `eta`; the rest is a plain call from the same noise."""
    found = sample.latents(pipe, PROMPTS[:2], sampler="tcd", steps=2, seed=5)
    streams = sample.generators(5, 0, 2)
    noise = torch.stack([torch.randn(4, 16, 16, generator=stream) for stream in streams])
    own = pipe.scheduler
    pipe.scheduler = TCDScheduler.from_config(own.config, clip_sample=False)
    plain = pipe(
        PROMPTS[:2], num_inference_steps=2, guidance_scale=1.0, generator=streams, latents=noise, eta=0.3,
        output_type="latent",
    )  # fmt: skip
    pipe.scheduler = own
    torch.testing.assert_close(found, plain.images, rtol=0, atol=1e-5)


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_an_adapter_acts_at_its_weight(weight: float) -> None:
    """peft's scaling of a layer is alpha / rank at weight 1; the embedded LoRA has 16 / 16."""
    pipe = sample.pipeline("asset:tiny-sd")
    sample.load_adapter(pipe, "asset:tiny-lcm-lora", weight)
    layers = [module for module in pipe.unet.modules() if hasattr(module, "lora_A")]
    assert len(layers) == 129 and {layer.scaling["lcm"] for layer in layers} == {weight}


def test_size(pipe: Any) -> None:
    assert sample.sample(pipe, PROMPTS[:1], sampler="lcm", steps=1, size=32).shape == (1, 3, 32, 32)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sampler": "lcm", "steps": 0}, "steps 0"),
        ({"sampler": "lcm", "steps": 51}, "1 to 50"),
        ({"sampler": "euler", "steps": 4}, "lcm, tcd, ddim, dpmpp_2m"),
        ({"sampler": "ddim", "steps": 4, "guidance_scale": 0.5}, "guidance_scale 0.5"),
    ],
)
def test_impossible_settings(pipe: Any, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        sample.latents(pipe, PROMPTS[:1], **settings)


def test_to_pil_rounds_and_clips() -> None:
    values = torch.tensor([-1.5, -1.0, 0.0, 1.0, 1.5])
    picture = sample.to_pil(values.expand(1, 3, 1, 5))[0]
    assert [picture.getpixel((x, 0))[0] for x in range(5)] == [0, 0, 128, 255, 255]


def test_contact_sheet_places_every_picture() -> None:
    colours = [(10 * k, 0, 0) for k in range(1, 6)]
    sheet = sample.contact_sheet([Image.new("RGB", (8, 6), c) for c in colours], columns=2, gap=2)
    assert sheet.size == (18, 22)
    assert [sheet.getpixel((k % 2 * 10 + 4, k // 2 * 8 + 3)) for k in range(5)] == colours
    assert sheet.getpixel((14, 19)) == (255, 255, 255)


def test_folder(sd_base: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("stays")
    sheet = sample.sample_to_folder(
        str(sd_base("epsilon")), ["A cat/..!", "ärger"], tmp_path, steps=1, seed=2
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "000-a-cat.png", "001-rger.png", "contact-sheet.png", "mine.txt",
    ]  # fmt: skip
    with Image.open(sheet) as opened:
        assert opened.size == (64 * 2 + 4, 64)


def test_several_pictures_of_a_prompt_and_other_sizes(sd_base: Callable[..., Path], tmp_path: Path) -> None:
    """The first of each are the same however many there are; the noise is of (seed, index) alone."""
    base, prompts = str(sd_base("epsilon")), ["a cat", "a dog"]
    sample.sample_to_folder(base, prompts, tmp_path / "one", steps=1, size=(32, 48))
    sheet = sample.sample_to_folder(
        base, prompts, tmp_path / "three", steps=1, size=(32, 48), count=3, batch_size=5
    )
    names = [f"00{k}-a-{what}-{n}.png" for k, what in enumerate(("cat", "dog")) for n in (1, 2, 3)]
    assert sorted(p.name for p in sheet.parent.iterdir()) == [*names, "contact-sheet.png"]
    with Image.open(sheet) as opened:
        assert opened.size == (3 * 48 + 2 * 4, 2 * 32 + 4)  # a row a prompt
    for alone, first in (("000-a-cat", "000-a-cat-1"), ("001-a-dog", "001-a-dog-1")):
        a, b = (Image.open(tmp_path / f"{name}.png") for name in (f"one/{alone}", f"three/{first}"))
        assert a.size == (48, 32)
        assert max(abs(x - y) for x, y in zip(a.tobytes(), b.tobytes(), strict=True)) <= 1  # batches of 2, 5
    drawn = {(tmp_path / "three" / name).read_bytes() for name in names}
    assert len(drawn) == 6


def test_a_negative_prompt_is_diffusers_own(sd_base: Callable[..., Path], tmp_path: Path) -> None:
    base = str(sd_base("epsilon"))
    pipe = sample.pipeline(base)
    found = sample.latents(
        pipe, ["a cat"], sampler="ddim", steps=2, guidance_scale=4.0, seed=3, negative_prompt="a dog"
    )
    noise = torch.randn((4, 16, 16), generator=sample.generators(3, 0, 1)[0])[None]
    pipe.scheduler = sample.scheduler("ddim", pipe.scheduler.config)
    wanted = pipe(
        "a cat", negative_prompt="a dog", num_inference_steps=2, guidance_scale=4.0, latents=noise,
        output_type="latent",
    ).images  # fmt: skip
    assert torch.equal(found, wanted)
    plain = sample.latents(pipe, ["a cat"], sampler="ddim", steps=2, guidance_scale=4.0, seed=3)
    assert (found - plain).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"negative_prompt": "a dog"}, "does nothing without guidance; give a guidance_scale above 1"),
        ({"size": (64, 60)}, "size 60 x 64: width and height must be multiples of 8"),
        ({"device": "nowhere"}, "device 'nowhere' cannot be used"),
    ],
)
def test_what_cannot_be_drawn_is_said_before_anything_is_loaded(
    wrong: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=sentence):
        sample.sample_to_folder("no such base", ["a"], tmp_path / "out", **wrong)
    assert not (tmp_path / "out").exists()


def test_missing_adapter_and_prompts(sd_base: Callable[..., Path], tmp_path: Path) -> None:
    base = str(sd_base("epsilon"))
    with pytest.raises(UserError, match="lcm-kit export"):
        sample.sample_to_folder(base, ["a"], tmp_path / "out", adapter=tmp_path)
    with pytest.raises(UserError, match="not a run's folder or a .safetensors file"):
        sample.sample_to_folder(base, ["a"], tmp_path / "out", adapter=tmp_path / "none.safetensors")
    with pytest.raises(UserError, match="no prompt"):
        sample.sample_to_folder(base, [], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_where_nothing_can_be_written_nothing_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr(sample, "draw_images", lambda *_, **__: pytest.fail("drawn"))
    monkeypatch.setattr(editing, "draw_edit", lambda *_: pytest.fail("drawn"))
    for draw in (
        lambda folder: sample.sample_to_folder("asset:tiny-sd", ["a red cat"], folder),
        lambda folder: editing.edit_to_folder(None, None, folder),  # type: ignore[arg-type]
    ):
        with pytest.raises(UserError, match="file"):
            draw(tmp_path / "file" / "drawn")
    assert (tmp_path / "file").read_text() == "no folder"
