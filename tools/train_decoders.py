"""Train tiny-sd's other decoders: a preview's (AutoencoderTiny), and a consistency decoder.

    python -m tools.train_decoders

Both learn to give pictures back from the latents of tiny-sd's own encoder, on the kinds of picture that its
VAE was trained on. The consistency decoder learns what it sees in noise at the two times at which diffusers
calls it, each by itself: latents leave so little open that the mean of the pictures that they may be of is
nearly each of them. Writes lcm_kit/assets/tiny-sd-preview and tiny-sd-consistency. The state lies in
cache/tiny-decoders, from which a stopped training continues. Half an hour on one CPU core;
`python -m studies.decoders` says how good they are.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lcm_kit.config.pretrain import PretrainTiny
from lcm_kit.io.files import atomic_write
from lcm_kit.tiny import decoders, models, principal, training_set, world
from lcm_kit.tiny.fit import fit, one_cycle
from train.pretrain_tiny import CROP, pixels

ROOT = Path(__file__).resolve().parent.parent
ASSETS, WORK = ROOT / "lcm_kit" / "assets", ROOT / "cache" / "tiny-decoders"
CONFIG = PretrainTiny("train/pretrain_tiny", str(WORK), seed=7, renders=6000, manners=2000, studio=4000)
STEPS, BATCH = {"preview": 3000, "consistency": 2000}, {"preview": 24, "consistency": 16}
RATE = 2e-3


class Latents:
    """Crops of the training pictures, and their latents as the base's UNet sees them."""

    def __init__(self, vae: Any) -> None:  # noqa: D107
        scenes, ends = training_set.scenes(CONFIG), training_set.words(CONFIG)
        self.sources = (
            training_set.draw(CONFIG, WORK, scenes, ends),
            training_set.draw_studio(CONFIG, WORK),
        )
        self.components, self.scale = principal.of_encoder(vae), vae.config.scaling_factor
        some = torch.cat([self.of(pixels(source[:1000])) for source in self.sources])
        self.mean = some.mean((0, 2, 3), keepdim=True)
        self.deviation = some.std((0, 2, 3), keepdim=True)

    def of(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> [B, C, H / 4, W / 4]."""
        return principal.encode(self.components, images) * self.scale

    def batch(self, rng: np.random.Generator, size: int) -> tuple[Tensor, Tensor]:
        """Half of each source, with a little noise on the latents: a UNet's are never quite a picture's."""
        y, x = rng.integers(0, world.SIZE - CROP + 1, 2)
        crops = [source[rng.integers(0, len(source), size // 2)] for source in self.sources]
        images = pixels(np.concatenate(crops)[:, y : y + CROP, x : x + CROP])
        latents = self.of(images)
        return images, latents + CONFIG.vae_noise * normal(rng, latents)


def normal(rng: np.random.Generator, like: Tensor) -> Tensor:
    """Noise of the shape of `like`."""
    return torch.from_numpy(rng.standard_normal(tuple(like.shape), np.float32))


def distance(found: Tensor, images: Tensor) -> Tensor:
    """As the VAE's decoder was trained."""
    error = found - images
    return error.abs().mean() + 10 * error.pow(2).mean()


def learn(name: str, module: nn.Module, loss_at: Any) -> None:
    """Muon, one cycle of the rate."""
    total = STEPS[name]
    fit(name, WORK, module, loss_at, steps=total, rate=lambda k: RATE * one_cycle(k, total), every=250)


def preview(data: Latents) -> Any:
    """The AutoencoderTiny: its decoder on latents, its encoder on what the base's gives."""
    torch.manual_seed(CONFIG.seed)
    model = decoders.build_preview()

    def loss_at(step: int) -> Tensor:
        images, latents = data.batch(np.random.default_rng((CONFIG.seed, 7, step)), BATCH["preview"])
        encoded = (model.encode(images).latents - data.of(images)).pow(2).mean()
        return distance(model.decode(latents).sample, images) + encoded

    learn("preview", model, loss_at)
    return model


def consistency(data: Latents, vae: Any) -> Any:
    """The ConsistencyDecoderVAE: its UNet, by turns at the two times."""
    torch.manual_seed(CONFIG.seed)
    model = decoders.build_consistency(vae)
    scheduler = model.decoder_scheduler

    def loss_at(step: int) -> Tensor:
        rng = np.random.default_rng((CONFIG.seed, 8, step))
        time = decoders.TIMES[step % 2]
        images, latents = data.batch(rng, BATCH["consistency"])
        noisy = scheduler.sqrt_alphas_cumprod[time] * images
        noisy = noisy + scheduler.sqrt_one_minus_alphas_cumprod[time] * normal(rng, images)
        told = (latents - data.mean) / data.deviation
        return distance(decoders.denoised(model, noisy, told, time), images)

    learn("consistency", model.decoder_unet, loss_at)
    return model


def save(model: Any, name: str, **more: list[float]) -> None:
    """In float16, with more in its config.json than diffusers' class has keys for."""
    folder = ASSETS / f"tiny-sd-{name}"
    model.eval().to(torch.float16).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)
    atomic_write(folder / "config.json", json.dumps({**config, **more}, indent=2) + "\n")


def by_channel(values: Tensor) -> list[float]:
    """To four digits."""
    return [round(float(value), 4) for value in values.flatten()]


def main() -> int:
    """Draw, train and save both."""
    WORK.mkdir(parents=True, exist_ok=True)
    vae = models.parts_of("asset:tiny-sd").vae.eval().requires_grad_(False)
    data = Latents(vae)
    save(preview(data), "preview")
    save(
        consistency(data, vae), "consistency",
        latents_mean=by_channel(data.mean), latents_std=by_channel(data.deviation),
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
