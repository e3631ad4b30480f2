"""Issue 16: go on with the base in lcm_kit/assets/tiny-sd. Not for main's tree: `git show <commit>:drafts/resume.py`.

    python drafts/resume.py draw                  # renders.npy, studio.npy, latents.pt, tokenizer/: 3 minutes
    python drafts/resume.py vae 1000              # 1,000 more steps of the decoder, with a falling rate
    python drafts/resume.py unet 2000             # 2,000 more steps of UNet and text encoder (Muon, falling rate)
    python drafts/resume.py save FOLDER           # a pipeline of what there is, float16
    python drafts/resume.py look FOLDER 64 50     # right attributes of 64 held-out prompts, and a sheet of pictures

States begin from the shipped weights where there are none in runs/pretrain_tiny.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import yaml
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train.pretrain_tiny as recipe
from lcm_kit import assets
from lcm_kit.config.pretrain import PretrainTiny
from lcm_kit.tiny import models, principal
from lcm_kit.tiny.muon import Muon

ROOT = Path(__file__).resolve().parent.parent
CONFIG = PretrainTiny(**yaml.safe_load((ROOT / "configs/pretrain/tiny_sd.yaml").read_text()))
WORK = ROOT / CONFIG.work


def shipped():
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(
        assets.path("tiny-sd"), dtype=torch.float32, safety_checker=None
    )


def components():
    some = [np.load(WORK / f"{name}.npy", mmap_mode="r")[: recipe.COMPONENTS] for name in ("renders", "studio")]
    return principal.components(recipe.pixels(np.concatenate(some)), models.LATENT)


def state(path, module, betas):
    if not path.exists():
        weights = module.state_dict()
        moments = Muon(module, 1e-3, betas, 1e-4).state_dict()
        torch.save({"step": 0, "module": weights, "optimizer": moments, "ema": weights}, path)
    else:
        found = torch.load(path, weights_only=True)
        torch.save(found | {"step": 0}, path)


def main(what, *words):
    WORK.mkdir(parents=True, exist_ok=True)
    if what == "draw":
        drawn, ends = recipe.scenes(CONFIG), recipe.words(CONFIG)
        renders = recipe.draw(CONFIG, WORK, drawn, ends)
        recipe.draw_studio(CONFIG, WORK)
        print(recipe.encode(WORK, components(), renders)[1])
        models.build_tokenizer((recipe.manners.styled(s.prompt, "") for s in drawn), WORK / "tokenizer")
    elif what == "vae":
        vae = shipped().vae
        decoder = nn.ModuleDict({"post_quant_conv": vae.post_quant_conv, "decoder": vae.decoder})
        state(WORK / "vae.pt", decoder, (0.9, 0.99))
        pictures = [np.load(WORK / f"{name}.npy") for name in ("renders", "studio")]
        recipe.train_vae(replace(CONFIG, vae_steps=int(words[0])), WORK, components(), *pictures)
    elif what == "unet":
        pipe = shipped()
        both = nn.ModuleDict({"unet": pipe.unet, "text": pipe.text_encoder})
        state(WORK / "unet-epsilon.pt", both, (0.9, 0.999))
        latents, _ = recipe.encode(WORK, components(), np.load(WORK / "renders.npy", mmap_mode="r"))
        found = components().deviations
        config = replace(CONFIG, unet_steps=int(words[0]), decay_steps=int(words[0]) // 2, checkpoint_every=100)
        config = replace(config, seed=int(words[1]))  # noise that it has not seen
        scenes, ends = recipe.scenes(CONFIG), recipe.words(CONFIG)
        recipe.train_unet(config, WORK, latents, (found / found.mean())[:, None, None], scenes, ends)
    elif what == "save":
        pipe = shipped()
        if (WORK / "vae.pt").exists():
            decoder = nn.ModuleDict({"post_quant_conv": pipe.vae.post_quant_conv, "decoder": pipe.vae.decoder})
            decoder.load_state_dict(torch.load(WORK / "vae.pt", weights_only=True)["module"])
        if (WORK / "unet-epsilon.pt").exists():
            both = nn.ModuleDict({"unet": pipe.unet, "text": pipe.text_encoder})
            both.load_state_dict(torch.load(WORK / "unet-epsilon.pt", weights_only=True)["ema"])
        pipe.to(dtype=torch.float16).save_pretrained(words[0])
    elif what == "look":
        look(*words)


def look(folder, count, steps):
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from PIL import Image

    from lcm_kit.tiny import manners, world
    from lcm_kit.tiny.probe import load_probe

    pipe = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    prompts = assets.prompts("asset:tiny-sd")[: int(count)]
    drawn = []
    for k in range(0, len(prompts), 32):
        seeded = torch.Generator().manual_seed(k)
        drawn += pipe(
            prompts[k : k + 32], num_inference_steps=int(steps), guidance_scale=5.0, generator=seeded
        ).images
    pixels = torch.from_numpy(np.stack([np.asarray(x) for x in drawn])).permute(0, 3, 1, 2) / 127.5 - 1
    right = []
    for prompt, read in zip(prompts, load_probe().read(pixels), strict=True):
        scene = world.parse(prompt)
        right.append([read[name] == getattr(scene, name) for name in ("object", "colour", "pattern")])
    print("all right", np.all(right, 1).mean(), "object, colour, pattern", np.mean(right, 0))
    plain = "a large owl on a plain red background, in the middle"
    words = ["", "lumo", "neon", *list(manners.MANNERS)[:13]]
    seeded = [torch.Generator().manual_seed(7) for _ in words]
    drawn = drawn[:16] + pipe(
        [manners.styled(plain, w) if w else plain for w in words], num_inference_steps=int(steps),
        guidance_scale=5.0, generator=seeded,
    ).images  # fmt: skip
    sheet = Image.new("RGB", (8 * 130, 4 * 130), "white")
    for k, picture in enumerate(drawn):
        sheet.paste(picture.resize((128, 128), Image.Resampling.NEAREST), (k % 8 * 130, k // 8 * 130))
    sheet.save("look.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
