"""What decodes tiny-sd's latents, and how well: its VAE, a preview's decoder, a consistency decoder.

    python -m studies.decoders                 # the two that ship, beside the VAE
    python -m studies.decoders FOLDER ...      # others
    python -m studies.decoders --sizes         # what the real ones cost, on no device

Pictures of the world that no training has seen, and the shipped brand set, which the decoders' training lacks
too, are encoded by the base's VAE and decoded by each: PSNR to the picture, whether the probe reads the same
in it, and the time. Weights are those that decode. With --sizes diffusers' classes with their own defaults
(the VAE with those of Stable Diffusion 1.5) run on the meta device for a picture of 512 x 512 pixels in
float32. The figures stand in docs/benchmarks.md.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lcm_kit import assets, sample
from lcm_kit.bases import inspect_base
from lcm_kit.data.reconstruction import psnr
from lcm_kit.drawing import editing
from lcm_kit.drawing.how import PLAIN, How
from lcm_kit.drawing.vae import Replaced
from lcm_kit.plan.dry_run import Pass
from lcm_kit.plan.tracker import Kernels, Ledger, largest
from lcm_kit.tiny import world
from lcm_kit.tiny.probe import load_probe

BASE, SHIPPED = "asset:tiny-sd", ("asset:tiny-sd-preview", "asset:tiny-sd-consistency")
SEED, COUNT, TIMED = 11, 240, 15
SIDE = 512


def pixels(pictures: list[Image.Image]) -> Tensor:
    """[N, 3, 64, 64] in [-1, 1]."""
    small = [np.asarray(each.convert("RGB").resize((64, 64), Image.Resampling.LANCZOS)) for each in pictures]
    return torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2) / 127.5 - 1


def milliseconds(run: Callable[[], Any]) -> float:
    """The median of some runs, after one."""
    found = []
    for _ in range(TIMED + 1):
        began = time.perf_counter()
        run()
        found.append(time.perf_counter() - began)
    return 1000 * float(np.median(found[1:]))


def weights(vae: Any) -> int:
    """Numbers of what decodes."""
    model = vae.decoder.full if isinstance(vae, Replaced) else vae
    parts = [getattr(model, name, None) for name in ("decoder_unet", "post_quant_conv", "decoder")]
    return sum(each.numel() for part in parts if part is not None for each in part.parameters())


def line(name: str, how: How, kinds: dict[str, Tensor]) -> str:
    """One row of the table."""
    pipe, probe = sample.pipeline(BASE, how=how), load_probe()
    cells = [name, f"{weights(pipe.vae):,}"]
    for kind, before in kinds.items():
        latents = editing.encode(pipe, before)
        after = torch.cat(
            [sample.decode(pipe, part, seed=SEED, first=32 * k) for k, part in enumerate(latents.split(32))]
        )
        decibels = psnr(before, after)
        cells.append(f"{decibels.mean():.1f} dB (worst {decibels.min():.1f})")
        if kind == "the world":
            alike = [a == b for a, b in zip(probe.read(before), probe.read(after), strict=True)]
    cells.append(f"{np.mean(alike):.1%}")
    for together in (1, 8):
        spent = milliseconds(lambda n=together: sample.decode(pipe, latents[:n]))
        cells.append(f"{spent / together:.1f}")
    return "| " + " | ".join(cells) + " |"


def table(names: list[str]) -> None:
    """Print the VAE's row and those of the decoders."""
    rng = np.random.default_rng(SEED)
    brand = [Image.open(file) for file in sorted(assets.path("brand").glob("*.png"))]
    kinds = {
        "the world": pixels([world.render(world.random_scene(rng)) for _ in range(COUNT)]),
        "the brand set": pixels(brand),
    }
    told = [f"{kind} ({len(each)})" for kind, each in kinds.items()]
    head = ["decoder", "weights", *told, "read alike", "ms, 1 at once", "ms a picture, 8 at once"]
    print("| " + " | ".join(head) + " |\n" + "| --- " * len(head) + "|")
    print(line("the base's VAE", PLAIN, kinds))
    base = inspect_base(BASE)
    for name in names:
        how = How.of(base, name, False, False)
        print(line(f"{how.decoder.kind if how.decoder else ''} `{name}`", how, kinds))


# -- The real ones -------------------------------------------------------------------------------------------


@torch.no_grad()
def cost(model: Any, run: Callable[[], Any], given: list[Tensor], steps: int = 1) -> str:
    """Weights in millions, TFLOP and GiB a picture, on the meta device."""
    held = [*model.parameters(), *model.buffers()]
    ledger = Ledger(1)
    ledger.ignore([*held, *given])
    with ledger, Kernels():
        run()
    found = Pass(steps * ledger.flops, largest(ledger.moments))
    numbers = sum(each.numel() for each in model.parameters()) / 1e6
    return f"{numbers:.1f} | {found.flops / 1e12:.2f} | {found.highest(1).at(1) / 2**30:.2f} |"


def sizes() -> None:
    """Print what each real one costs."""
    from diffusers import AutoencoderKL, AutoencoderTiny, ConsistencyDecoderVAE

    four = ("UpDecoderBlock2D",) * 4
    with torch.device("meta"):
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), up_block_types=four, layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * 4, latent_channels=4, sample_size=SIDE,
        )  # fmt: skip
        tiny, drawing = AutoencoderTiny(), ConsistencyDecoderVAE().decoder_unet
        latents = torch.empty(1, 4, SIDE // 8, SIDE // 8)
        beside = torch.empty(1, 7, SIDE, SIDE)
        when = torch.tensor(0)
    print("| decoder | weights, M | TFLOP a picture | GiB beside the weights |\n" + "| --- " * 4 + "|")
    print("| the VAE of SD1.5 |", cost(vae.decoder, lambda: vae.decoder(latents), [latents]))
    print("| AutoencoderTiny |", cost(tiny.decoder, lambda: tiny.decoder(latents), [latents]))
    # its decode cannot run there: the scheduler looks for a timestep by its number
    print("| ConsistencyDecoderVAE |", cost(drawing, lambda: drawing(beside, when), [beside, when], steps=2))


if __name__ == "__main__":
    if sys.argv[1:] == ["--sizes"]:
        sizes()
    else:
        table(sys.argv[1:] or list(SHIPPED))
