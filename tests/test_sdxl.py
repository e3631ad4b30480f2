"""SDXL: conditions as its pipeline makes them, sizes that follow the crop, and the cache of both."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lcm_kit import bases, sample
from lcm_kit.bases import sdxl
from lcm_kit.bases.condition import Condition, Framing
from lcm_kit.config import schema
from lcm_kit.data.buckets import cut
from lcm_kit.data.cache import Cache
from lcm_kit.data.images import encode
from lcm_kit.data.transforms import to_pixels
from tests.bases import build_sdxl

PROMPTS = ["a red fox", "two owls, at night, in the snow, on a long branch of an old tree", ""]


@pytest.fixture(scope="module")
def pipe(sdxl_base: Path) -> Any:
    return sample.pipeline(str(sdxl_base))


def test_the_condition_is_the_pipelines_own(sdxl_base: Path, pipe: Any) -> None:
    text = bases.load(str(sdxl_base), parts=["text"]).text
    found = sdxl.encode_text(text, PROMPTS)
    embeds, _, pooled, _ = pipe.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    torch.testing.assert_close(found.embeds, embeds, rtol=0, atol=0)
    torch.testing.assert_close(found.pooled, pooled, rtol=0, atol=0)
    assert found.embeds.shape == (3, 24, 64) and found.pooled.shape == (3, 32)


@pytest.mark.parametrize("zeros", [True, False])
def test_the_empty_condition_is_what_guidance_uses(tmp_path: Path, zeros: bool) -> None:
    """diffusers takes zeros where the base says so (force_zeros_for_empty_prompt), else encodes it."""
    base = str(build_sdxl(tmp_path / "base", zeros_when_empty=zeros))
    parts = bases.load(base, parts=["text"])
    assert parts.info.zeros_when_empty is zeros
    empty = sdxl.empty_condition(parts.text, 2)
    _, embeds, _, pooled = sample.pipeline(base).encode_prompt(["a", "b"], do_classifier_free_guidance=True)
    torch.testing.assert_close(empty.embeds, embeds, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(empty.pooled, pooled, rtol=1e-5, atol=1e-5)
    assert bool((empty.embeds == 0).all()) is zeros


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("size", [(100, 60), (61, 200), (64, 64), (333, 129)])
def test_sizes_are_the_pipelines_and_follow_crop_and_mirror(
    pipe: Any, size: tuple[int, int], mirrored: bool
) -> None:
    """A picture whose pixels hold their own place: what the square shows is where the corner says."""
    width, height = size
    framed = cut(size, (32, 32)).framing(mirrored)
    wanted = pipe._get_add_time_ids(framed.original, framed.corner, framed.target, torch.float32, 32)
    assert torch.equal(sdxl.sizes([framed]), wanted)
    assert framed.original == (height, width) and framed.target == (32, 32)

    scale = 32 / min(size)
    full = (max(32, round(width * scale)), max(32, round(height * scale)))
    x, y = (torch.linspace(-1, 1, n) for n in full)
    ramp = torch.stack([x.expand(full[1], -1), y[:, None].expand(-1, full[0]), torch.zeros(full[1], full[0])])
    array = ((ramp.permute(1, 2, 0) + 1) * 127.5).round().to(torch.uint8).numpy()
    picture = Image.fromarray(array).resize(size, Image.Resampling.BICUBIC)
    seen = to_pixels(picture, cut(size, (32, 32)), mirrored)
    if mirrored:  # as it is seen, x falls from left to right
        ramp = ramp.flip(-1)
    top, left = framed.corner
    off = (seen - ramp[:, top : top + 32, left : left + 32])[:2, 2:-2, 2:-2].abs().max()
    assert float(off) < 0.03


def test_odd_margins_mirror_to_the_other_side() -> None:
    assert cut((37, 32), (32, 32)).framing() == Framing((32, 37), (0, 2), (32, 32))
    assert cut((37, 32), (32, 32)).framing(mirrored=True).corner == (0, 3)


def config(base: Path, tmp_path: Path, **data: Any) -> schema.Distill:
    folder = tmp_path / "images"
    folder.mkdir(exist_ok=True)
    for k, size in enumerate([(80, 64), (64, 100), (64, 64)]):
        Image.effect_noise(size, 60).convert("RGB").save(folder / f"{k}.png")
        (folder / f"{k}.txt").write_text(PROMPTS[k] or "a plain one")
    images = schema.Data(str(folder), kind="folder", cache=str(tmp_path / "cache"), resolution=64, **data)
    return schema.Distill(
        recipe="train/distill", output=str(tmp_path / "run"), base=schema.Base(path=str(base)), data=images
    )


def test_the_cache_holds_the_whole_condition(sdxl_base: Path, tmp_path: Path) -> None:
    settings = config(sdxl_base, tmp_path, flip=True, shapes=schema.Shapes("square"), chunks=1)
    encode(settings, progress=False)
    parts = bases.load(str(sdxl_base), parts=["text", "vae"])
    cache = Cache.open(settings.data.cache, base=parts.info, data=settings.data)
    assert len(cache) == 6
    held = cache.condition([0, 1, 2, 3])
    wanted = sdxl.encode_text(parts.text, [cache.captions[k] for k in range(4)])
    torch.testing.assert_close(held.embeds, wanted.embeds)
    torch.testing.assert_close(held.pooled, wanted.pooled)
    assert held.time_ids is not None
    assert held.time_ids.tolist() == [
        [64, 80, 0, 8, 64, 64], [64, 80, 0, 8, 64, 64], [100, 64, 18, 0, 64, 64], [100, 64, 18, 0, 64, 64]
    ]  # fmt: skip
    empty = cache.empty(2)
    assert empty.time_ids is None and empty.pooled is not None and not empty.embeds.any()
    both = Condition.cat([empty.sized_as(held[:2]), held[:2]])
    assert both.time_ids is not None and torch.equal(both.time_ids[:2], both.time_ids[2:])
    assert both.kwargs().keys() == {"encoder_hidden_states", "added_cond_kwargs"}
    unet = bases.load(str(sdxl_base), parts=["unet"]).unet
    with torch.no_grad():
        assert unet(cache.latents([0, 1]).repeat(2, 1, 1, 1), 999, **both.kwargs()).sample.shape == (
            4,
            4,
            16,
            16,
        )


def test_a_cache_for_another_second_encoder_is_refused(sdxl_base: Path, tmp_path: Path) -> None:
    settings = config(sdxl_base, tmp_path)
    encode(settings, progress=False)
    shutil.copytree(sdxl_base, tmp_path / "other")
    other = build_sdxl(tmp_path / "new", seed=1)
    shutil.rmtree(tmp_path / "other" / "text_encoder_2")
    shutil.copytree(other / "text_encoder_2", tmp_path / "other" / "text_encoder_2")
    base = bases.inspect_base(str(tmp_path / "other"))
    with pytest.raises(Exception, match="the second text encoder of the base"):
        Cache.open(settings.data.cache, base=base, data=settings.data)


@pytest.mark.parametrize("fixture", ["sdxl_base", "ssd1b_base"])
def test_pictures_are_the_pipelines_own(request: pytest.FixtureRequest, fixture: str) -> None:
    """`sample` and a bare StableDiffusionXLPipeline from the same noise."""
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline

    base = request.getfixturevalue(fixture)
    found = sample.latents(
        sample.pipeline(str(base)), ["a fox"], sampler="ddim", steps=3, guidance_scale=4.0, seed=5
    )
    own = StableDiffusionXLPipeline.from_pretrained(base, add_watermarker=False)
    own.scheduler = DDIMScheduler.from_config(
        own.scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False
    )
    noise = torch.randn((4, 16, 16), generator=sample.generators(5, 0, 1)[0])[None]
    wanted = own(
        "a fox", num_inference_steps=3, guidance_scale=4.0, latents=noise, output_type="latent"
    ).images
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
