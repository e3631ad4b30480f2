"""Train the embedded base, tiny-sd, from pictures that the kit draws itself.

    lcm-kit train configs/pretrain/tiny_sd.yaml     # a little over two hours on 2 CPU cores, minutes on a GPU
    lcm-kit train configs/pretrain/tiny_sd_v.yaml   # its v-prediction twin, from its weights: an hour

Order: renders -> probe -> VAE -> latents -> text encoder and UNet together -> a pipeline folder in float16.
Every stage leaves its result in `work`, so the same command continues where it was stopped.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lcm_kit import assets
from lcm_kit.config.pretrain import PretrainTiny
from lcm_kit.core.prediction import from_x0_eps
from lcm_kit.core.schedule import Schedule, add_noise
from lcm_kit.core.step import snr_weight
from lcm_kit.io.files import atomic_file, atomic_write, make_folder, require_writable
from lcm_kit.io.locks import alone
from lcm_kit.tiny import manners, models, principal, probe, training_set, world
from lcm_kit.tiny.fit import fit, one_cycle

CROP = 32  # pixels: what the VAE is trained on
COMPONENTS = 2000  # pictures of each kind that its encoder's components are of


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


def train_vae(
    config: PretrainTiny,
    work: Path,
    found: principal.Components,
    renders: np.ndarray,
    studio_pictures: np.ndarray,
) -> Any:
    """The VAE: an encoder of principal components, and a decoder that is trained on its latents.

    On crops of 32x32 pixels (it has no attention, so it draws whole pictures as well), half of the world,
    half of the studio's pictures: what it never saw, no adapter can draw. A little noise on the latents,
    because those that a UNet draws are never quite those of a picture.
    """
    torch.manual_seed(config.seed)
    vae, half = models.build_vae(), config.vae_batch_size // 2
    principal.set_encoder(vae, found)
    decoder = nn.ModuleDict({"post_quant_conv": vae.post_quant_conv, "decoder": vae.decoder})

    def loss_at(step: int) -> Tensor:
        rng = np.random.default_rng((config.seed, 2, step))
        y, x = rng.integers(0, world.SIZE - CROP + 1, 2)
        crops = [source[rng.integers(0, len(source), half)] for source in (renders, studio_pictures)]
        images = pixels(np.concatenate(crops)[:, y : y + CROP, x : x + CROP])
        latents = principal.encode(found, images)
        noise = torch.from_numpy(rng.standard_normal(tuple(latents.shape), np.float32))
        error = vae.decode(latents + config.vae_noise * noise).sample - images
        return error.abs().mean() + 10 * error.pow(2).mean()

    total = config.vae_steps
    fit(
        "vae", work, decoder, loss_at,
        steps=total, rate=lambda k: config.vae_lr * one_cycle(k, total), every=200,
    )  # fmt: skip
    return vae.eval().requires_grad_(False)


def encode(work: Path, found: principal.Components, renders: np.ndarray) -> Tensor:
    """Latents of all renders as the encoder gives them, float32 [N, LATENT, 16, 16].

    Made once, by the encoder's map itself, which is a hundred times as fast as the encoder.
    """
    path = work / "latents.pt"
    if not path.exists():
        parts = (renders[k : k + 80] for k in range(0, len(renders), 80))
        raw = torch.cat([principal.encode(found, pixels(part)) for part in parts])
        with atomic_file(path) as temporary:
            torch.save(raw, temporary)
    return torch.load(path, weights_only=True)


def train_unet(
    config: PretrainTiny,
    work: Path,
    latents: Tensor,
    seen: Tensor,
    drawn: list[world.Scene],
    ends: list[str],
    start: models.Parts | None,
) -> dict[str, Any]:
    """Text encoder and UNet together, by the denoising loss with min-SNR weights; returns the EMA's parts.

    `seen` [C, 1, 1]: how much each channel of the latents weighs in the loss. `start`: what they go on from,
    if not from nothing.
    """
    torch.manual_seed(config.seed)
    if start:
        tokenizer, text, unet = start.tokenizer, start.text_encoder, start.unet
    else:
        # of the words at the ends it learns no merges: a style's word is spelt, as a studio's trigger is
        plain = (manners.styled(scene.prompt, "") for scene in drawn)
        tokenizer = models.build_tokenizer(plain, work / "tokenizer")
        text, unet = models.build_text_encoder(tokenizer), models.build_unet()
    ids, empty = training_set.captions(drawn, ends, tokenizer), models.token_ids(tokenizer, [""])[0]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    unet, text = unet.to(device), text.to(device)
    kind, scheduler = config.prediction_type, models.build_scheduler(config.prediction_type)
    schedule = Schedule.from_config(scheduler.config).to(device)
    weight = snr_weight(schedule, kind, config.min_snr_gamma)
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
        return ((error.pow(2) * seen).mean((1, 2, 3)) * weight[t]).mean()

    def rate(step: int) -> float:
        return config.unet_lr * min(1, (step + 1) / 200, (config.unet_steps - step) / config.decay_steps)

    fit(
        f"unet-{kind}", work, nn.ModuleDict({"unet": unet, "text": text}), loss_at, steps=config.unet_steps,
        rate=rate, every=config.checkpoint_every, betas=(0.9, 0.999), ema_decay=config.ema,
    )  # fmt: skip
    return {"unet": unet.cpu(), "text_encoder": text.cpu(), "tokenizer": tokenizer, "scheduler": scheduler}


@alone("train", lambda config: config.work)
def main(config: PretrainTiny) -> Path:
    """Run every stage that is not done yet; returns the pipeline's folder."""
    from diffusers import StableDiffusionPipeline

    work, output = Path(config.work), Path(config.output)
    make_folder(work)
    require_writable(output)  # hours before it is written
    start = models.parts_of(config.start) if config.start else None
    drawn, ends = training_set.scenes(config), training_set.words(config)
    renders = training_set.draw(config, work, drawn, ends)
    if start:
        vae, found = start.vae, principal.of_encoder(start.vae)
    else:
        # pictures without a manner: a colour turned into another one is no longer that colour
        reader = train_probe(config, work, renders[: config.renders], drawn[: config.renders])
        probe.save_probe(reader, output.parent / "probe")
        studio_pictures = training_set.draw_studio(config, work)
        some = np.concatenate([source[:COMPONENTS] for source in (renders, studio_pictures)])
        found = principal.components(pixels(some), models.LATENT)
        vae = train_vae(config, work, found, renders, studio_pictures)
    raw = encode(work, found, renders)
    if not start:
        vae.register_to_config(scaling_factor=round(1 / raw.std().item(), 5))
    latents = raw * vae.config.scaling_factor
    seen = found.deviations / found.deviations.mean()
    parts = train_unet(config, work, latents, seen[:, None, None], drawn, ends, start)

    pipeline = StableDiffusionPipeline(
        vae=vae, **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipeline.to(dtype=torch.float16).save_pretrained(output)
    if config.start:  # this one remembers where it lay, and how it was called
        copytree(assets.place(config.start) / "tokenizer", output / "tokenizer", dirs_exist_ok=True)
    atomic_write(output / "prompts.txt", "\n".join(training_set.held_out(config)) + "\n")
    atomic_write(output / "training.json", json.dumps(asdict(config), indent=1) + "\n")
    return output
