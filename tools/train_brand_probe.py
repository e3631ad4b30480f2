"""Train the probe that reads pictures in the brand styles as well as the embedded world's own.

    python tools/train_brand_probe.py

Object, colour and pattern of a picture in any of the styles of `brand_looks.py` or in none: what a base
with a brand's LoRA on it is asked for. Starts from the shipped probe; nothing that a model drew is in its
training. Writes lcm_kit/assets/brand-probe and prints its accuracy on new pictures. The state lies in
cache/brand-probe, from which a stopped training continues. Minutes on one CPU core.
"""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path

import numpy as np
import torch
from brand_looks import LOOKS
from torch import Tensor
from torch.nn.functional import avg_pool2d, cross_entropy, interpolate

from lcm_kit.tiny import world
from lcm_kit.tiny.fit import fit, one_cycle
from lcm_kit.tiny.probe import Probe, load_probe, new_probe, save_probe

ROOT = Path(__file__).resolve().parent.parent
OUTPUT, WORK = ROOT / "lcm_kit" / "assets" / "brand-probe", ROOT / "cache" / "brand-probe"
STEPS, BATCH, WORLD, COPIES, SEED = 500, 48, 3000, 6, 3


def renders(world_count: int, copies: int, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Pictures [N, 3, 64, 64], 8 bits, and the class of each by attribute: the world's, then each style's.

    A look's picture has a plain ground in its caption, whatever the style makes of it.
    """
    rng, net = np.random.default_rng(seed), new_probe()
    scenes = [world.random_scene(rng) for _ in range(world_count)]
    drawn = [np.asarray(world.render(scene)) for scene in scenes]
    for draw, tones in LOOKS.values():
        for name, tone, size in list(product(world.objects(), tones, world.SIZES)) * copies:
            scenes.append(world.Scene(name, tone, "plain", size))
            drawn.append(np.asarray(draw(name, tone, size, rng).resize((world.SIZE, world.SIZE), 1)))
    labels = {
        key: torch.tensor([names.index(getattr(scene, key)) for scene in scenes])
        for key, names in net.classes.items()
    }
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).contiguous(), labels


def spoiled(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Pixels [B, 3, 64, 64], half of them blurred, all noised: so that no single pixel decides."""
    blurred = interpolate(avg_pool2d(pixels, 2), scale_factor=2, mode="bilinear")
    some = torch.rand(len(pixels), 1, 1, 1, generator=generator) < 0.5
    size = 0.15 * torch.rand(len(pixels), 1, 1, 1, generator=generator)
    return torch.where(some, blurred, pixels) + size * torch.randn(pixels.shape, generator=generator)


@torch.no_grad()
def accuracy(net: Probe, pictures: Tensor, labels: dict[str, Tensor]) -> dict[str, float]:
    """Share of pictures read right, by attribute."""
    logits = [net(part / 127.5 - 1) for part in pictures.split(256)]
    return {
        key: float((torch.cat([part[key] for part in logits]).argmax(1) == wanted).float().mean())
        for key, wanted in labels.items()
    }


def main() -> int:
    """Render, train, save, and say how well it reads."""
    pictures, labels = renders(WORLD, COPIES, SEED)
    torch.manual_seed(SEED)
    net = load_probe().train().requires_grad_(True)  # that reads the world's own pictures already
    WORK.mkdir(parents=True, exist_ok=True)

    def loss_at(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(SEED * 1_000_003 + step)
        index = torch.randint(len(pictures), (BATCH,), generator=generator)
        logits = net(spoiled(pictures[index] / 127.5 - 1, generator))
        return torch.stack([cross_entropy(logits[key], labels[key][index]) for key in labels]).sum()

    rate = 1e-3
    fit("probe", WORK, net, loss_at, steps=STEPS, rate=lambda k: rate * one_cycle(k, STEPS), every=100)
    save_probe(net.eval(), OUTPUT)
    fresh, truth = renders(600, 1, SEED + 1)
    parts = {"world": slice(0, 600)}
    size = (len(fresh) - 600) // len(LOOKS)
    parts |= {name: slice(600 + k * size, 600 + (k + 1) * size) for k, name in enumerate(LOOKS)}
    for name, part in parts.items():
        found = accuracy(net, fresh[part], {key: value[part] for key, value in truth.items()})
        print(name, {key: round(value, 4) for key, value in found.items()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
