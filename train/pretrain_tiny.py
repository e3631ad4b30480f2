"""Train the embedded base, tiny-sd, from pictures that the kit draws itself.

    lcm-kit train configs/pretrain/tiny_sd.yaml     # a little over an hour on 2 CPU cores, minutes on a GPU
    lcm-kit train configs/pretrain/tiny_sd.yaml prediction_type=v_prediction output=runs/tiny-sd-v/tiny-sd-v

Order: renders -> probe -> VAE -> latents -> text encoder and UNet together -> a pipeline folder in float16.
Every stage leaves its result in `work`, so the same command continues where it was stopped.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lcm_kit.config.pretrain import PretrainTiny
from lcm_kit.core.prediction import from_x0_eps
from lcm_kit.core.schedule import Schedule, add_noise
from lcm_kit.core.step import min_snr_weight
from lcm_kit.io.files import atomic_file, atomic_write, make_folder, require_writable
from lcm_kit.io.locks import alone
from lcm_kit.tiny import models, probe, world
from lcm_kit.tiny.fit import fit, one_cycle


def scenes(seed: int, count: int) -> list[world.Scene]:
    """`count` random scenes."""
    rng = np.random.default_rng(seed)
    return [world.random_scene(rng) for _ in range(count)]


def draw(config: PretrainTiny, work: Path) -> tuple[np.ndarray, list[world.Scene]]:
    """The training pictures, uint8 [N, 64, 64, 3], and their scenes; drawn once."""
    drawn, path = scenes(config.seed, config.renders), work / "renders.npy"
    if not path.exists():
        with atomic_file(path) as temporary, temporary.open("wb") as handle:
            np.save(handle, np.stack([np.asarray(world.render(scene)) for scene in drawn]))
    return np.load(path), drawn


def pixels(renders: np.ndarray) -> Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(renders).permute(0, 3, 1, 2).float() / 127.5 - 1


def train_probe(
    config: PretrainTiny, work: Path, renders: np.ndarray, drawn: list[world.Scene]
) -> probe.Probe:
    """The attribute probe, on blurred and noised real renders."""
    torch.manual_seed(config.seed)
    net = probe.new_probe()
    labels = {n: torch.tensor([c.index(getattr(s, n)) for s in drawn]) for n, c in net.classes.items()}

    def loss_at(step: int) -> Tensor:
        rng = np.random.default_rng((config.seed, 1, step))
        index = rng.integers(0, len(drawn), config.probe_batch_size)
        images = pixels(renders[index])
        blur = torch.from_numpy(rng.uniform(0, 1, (len(index), 1, 1, 1)).astype(np.float32))
        images = images.lerp(F.avg_pool2d(images, 3, 1, 1, count_include_pad=False), blur)
        noise = torch.from_numpy(rng.standard_normal(tuple(images.shape), np.float32))
        logits = net(images + noise * float(rng.uniform(0, 0.1)))
        return sum((F.cross_entropy(logits[n], labels[n][index]) for n in labels), torch.zeros(()))

    total = config.probe_steps
    fit("probe", work, net, loss_at, steps=total, rate=lambda k: 2e-3 * one_cycle(k, total), every=250)
    return net.eval().requires_grad_(False)


def train_vae(config: PretrainTiny, work: Path, renders: np.ndarray) -> Any:
    """The VAE, on crops of 32x32 pixels (it has no attention, so it draws whole pictures as well)."""
    torch.manual_seed(config.seed)
    vae = models.build_vae()

    def loss_at(step: int) -> Tensor:
        rng = np.random.default_rng((config.seed, 2, step))
        index, (y, x) = rng.integers(0, len(renders), config.vae_batch_size), rng.integers(0, 33, 2)
        images = pixels(renders[index, y : y + 32, x : x + 32])
        posterior = vae.encode(images).latent_dist
        noise = torch.from_numpy(rng.standard_normal(tuple(posterior.mean.shape), np.float32))
        error = vae.decode(posterior.mean + posterior.std * noise).sample - images
        divergence = (posterior.mean.pow(2) + posterior.var - 1 - posterior.logvar).mean() / 2
        return error.abs().mean() + 2 * error.pow(2).mean() + 1e-3 * divergence

    total = config.vae_steps
    fit("vae", work, vae, loss_at, steps=total, rate=lambda k: config.vae_lr * one_cycle(k, total), every=200)
    return vae.eval().requires_grad_(False)


def encode(work: Path, vae: Any, renders: np.ndarray) -> tuple[Tensor, float]:
    """Latents of all renders at unit variance, float32 [N, 4, 16, 16], and the scaling factor; made once."""
    path = work / "latents.pt"
    if not path.exists():
        with torch.no_grad():
            raw = torch.cat(
                [vae.encode(pixels(chunk)).latent_dist.mean for chunk in np.array_split(renders, 400)]
            )
        with atomic_file(path) as temporary:
            torch.save(raw, temporary)
    raw = torch.load(path, weights_only=True)
    factor = round(1 / raw.std().item(), 5)
    return raw * factor, factor


def captions(drawn: list[world.Scene], tokenizer: Any) -> Tensor:
    """Token ids of each scene's four captions (size and place said or not): int64 [N, 4, TOKENS]."""
    texts = [
        replace(scene, size=size, place=place).prompt
        for scene in drawn
        for size, place in ((scene.size, scene.place), ("", scene.place), (scene.size, ""), ("", ""))
    ]
    return models.token_ids(tokenizer, texts).view(len(drawn), 4, models.TOKENS)


def train_unet(config: PretrainTiny, work: Path, latents: Tensor, drawn: list[world.Scene]) -> dict[str, Any]:
    """Text encoder and UNet together, by the denoising loss with min-SNR weights; returns the EMA's parts."""
    torch.manual_seed(config.seed)
    tokenizer = models.build_tokenizer((scene.prompt for scene in drawn), work / "tokenizer")
    ids, empty = captions(drawn, tokenizer), models.token_ids(tokenizer, [""])[0]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    unet, text = models.build_unet().to(device), models.build_text_encoder(tokenizer).to(device)
    kind, scheduler = config.prediction_type, models.build_scheduler(config.prediction_type)
    schedule = Schedule.from_config(scheduler.config).to(device)
    weight = min_snr_weight(schedule, kind, config.min_snr_gamma)
    size = config.unet_batch_size

    def loss_at(step: int) -> Tensor:
        rng = np.random.default_rng((config.seed, 3, step))
        index = torch.from_numpy(rng.integers(0, len(latents), size))
        said = torch.from_numpy(rng.choice(4, size, p=(9 / 16, 3 / 16, 3 / 16, 1 / 16)))
        tokens = ids[index, said]
        tokens[torch.from_numpy(rng.uniform(size=size) < config.caption_dropout)] = empty
        # One time in each of `size` equal intervals: less variance than free draws.
        times = ((rng.permutation(size) + rng.uniform(size=size)) / size * schedule.steps).astype(np.int64)
        noise = torch.from_numpy(rng.standard_normal((size, *latents.shape[1:]), np.float32)).to(device)
        clean, t = latents[index].to(device), torch.from_numpy(times).to(device)
        output = unet(
            add_noise(schedule, clean, noise, t), t, text(tokens.to(device)).last_hidden_state
        ).sample
        error = output - from_x0_eps(schedule, kind, clean, noise, t)
        return (error.pow(2).mean((1, 2, 3)) * weight[t]).mean()

    def rate(step: int) -> float:
        return config.unet_lr * min(1, (step + 1) / 200, (config.unet_steps - step) / config.decay_steps)

    fit(
        f"unet-{kind}", work, nn.ModuleDict({"unet": unet, "text": text}), loss_at, steps=config.unet_steps,
        rate=rate, every=config.checkpoint_every, betas=(0.9, 0.999), ema_decay=config.ema,
    )  # fmt: skip
    return {"unet": unet.cpu(), "text_encoder": text.cpu(), "tokenizer": tokenizer, "scheduler": scheduler}


def held_out(config: PretrainTiny, drawn: list[world.Scene]) -> list[str]:
    """Full captions that no training picture has, in random order: `config.prompts` at the most."""
    attributes = (world.objects(), world.COLOURS, world.PATTERNS, world.SIZES, world.PLACES)
    unseen = {world.Scene(*names).prompt for names in product(*attributes)} - {
        scene.prompt for scene in drawn
    }
    order = np.random.default_rng((config.seed, 4)).permutation(sorted(unseen))
    return [str(prompt) for prompt in order[: config.prompts]]


@alone("train", lambda config: config.work)
def main(config: PretrainTiny) -> Path:
    """Run every stage that is not done yet; returns the pipeline's folder."""
    from diffusers import StableDiffusionPipeline

    work, output = Path(config.work), Path(config.output)
    make_folder(work)
    require_writable(output)  # hours before it is written
    renders, drawn = draw(config, work)
    reader = train_probe(config, work, renders, drawn)
    vae = train_vae(config, work, renders)
    latents, factor = encode(work, vae, renders)
    vae.register_to_config(scaling_factor=factor)
    parts = train_unet(config, work, latents, drawn)

    pipeline = StableDiffusionPipeline(
        vae=vae, **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipeline.to(dtype=torch.float16).save_pretrained(output)
    probe.save_probe(reader, output.parent / "probe")
    atomic_write(output / "prompts.txt", "\n".join(held_out(config, drawn)) + "\n")
    atomic_write(output / "training.json", json.dumps(asdict(config), indent=1) + "\n")
    return output
