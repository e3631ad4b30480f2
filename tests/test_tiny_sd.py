"""The shipped base: its VAE draws what it never saw, and its held-out prompts are held out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lcm_kit import assets
from lcm_kit.config.pretrain import PretrainTiny
from lcm_kit.data.reconstruction import psnr
from lcm_kit.tiny import training_set, world
from lcm_kit.tiny.probe import load_probe
from tools import tiny_card

COUNT = 64  # pictures of each kind


def of_world() -> tuple[list[Image.Image], list[world.Scene]]:
    rng = np.random.default_rng(99)
    scenes = [world.random_scene(rng) for _ in range(4 * COUNT)]
    return [world.render(scene) for scene in scenes], scenes


@pytest.fixture(scope="module")
def vae() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(assets.path("tiny-sd") / "vae", torch_dtype=torch.float32).eval()


@pytest.mark.parametrize(("look", "least"), [("lumo", 28.0), ("neon", 28.0)])
def test_the_vae_draws_styles_that_it_never_saw(look: str, least: float, vae: Any) -> None:
    images = tiny_card.pixels(tiny_card.of_style(look, COUNT))
    assert psnr(images, tiny_card.reconstructed(vae, images)).mean() >= least


def test_the_vae_draws_the_shipped_brand_set(vae: Any) -> None:
    files = sorted(assets.path("brand").glob("*.png"))
    images = tiny_card.pixels([Image.open(file) for file in files])
    found = psnr(images, tiny_card.reconstructed(vae, images))
    assert len(files) == 96 and found.mean() >= 28.0 and found.min() >= 24.0


def test_the_world_comes_back_as_the_probe_reads_it(vae: Any) -> None:
    renders, scenes = of_world()
    images = tiny_card.pixels(renders)
    again = tiny_card.reconstructed(vae, images)
    assert psnr(images, again).mean() >= 30.0
    probe = load_probe()
    named = [{name: getattr(scene, name) for name in probe.classes} for scene in scenes]
    for pictures in (images, again):
        right = [read == name for read, name in zip(probe.read(pictures), named, strict=True)]
        assert np.mean(right) >= 0.99


def test_scaled_latents_have_unit_variance(vae: Any) -> None:
    with torch.no_grad():
        latents = vae.encode(tiny_card.pixels(of_world()[0])).latent_dist.mean
    scaled = latents * vae.config.scaling_factor
    assert scaled.std().item() == pytest.approx(1, abs=0.05)


def test_no_training_picture_has_a_held_out_prompt() -> None:
    """Against the captions of all training pictures, made again from the config that the base was made by."""
    config = PretrainTiny(**json.loads((assets.path("tiny-sd") / "training.json").read_text()))
    scenes = training_set.scenes(config)
    prompts = assets.prompts("asset:tiny-sd")
    assert len(scenes) == config.renders + config.manners == 32_000
    assert len(set(prompts)) == len(prompts) >= 1000
    assert not set(prompts) & {scene.prompt for scene in scenes}
    assert all(world.parse(prompt) for prompt in prompts)


def test_the_recipe_names_the_files_it_writes() -> None:
    found = json.loads((assets.path("tiny-sd") / "training.json").read_text())
    assert not Path(found["output"]).is_absolute() and not Path(found["work"]).is_absolute()


@pytest.mark.slow
@pytest.mark.parametrize("base", ["tiny-sd", "tiny-sd-v"])
def test_held_out_prompts_are_drawn_right_by_plain_diffusers(base: str) -> None:
    """diffusers alone draws, 50 steps; guidance matters; nothing is right at 4 calls with it."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(
        assets.path(base), dtype=torch.float32, safety_checker=None
    )
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    pipe.set_progress_bar_config(disable=True)
    prompts = assets.prompts("asset:tiny-sd")[:96]
    scenes, probe = [world.parse(prompt) for prompt in prompts], load_probe()

    def right(steps: int, guidance_scale: float) -> float:
        seeded = torch.Generator().manual_seed(3)
        parts = [
            pipe(
                prompts[k : k + 32],
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                generator=seeded,
            ).images
            for k in range(0, len(prompts), 32)
        ]
        read = probe.read(tiny_card.pixels([image for part in parts for image in part]))
        return float(
            np.mean([all(r[n] == getattr(s, n) for n in r) for r, s in zip(read, scenes, strict=True)])
        )

    guided = right(50, 5.0)
    assert guided >= 0.95 and right(50, 1.0) < guided and right(2, 5.0) <= guided - 0.2
