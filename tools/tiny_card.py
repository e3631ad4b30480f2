"""Write the figures of an embedded base into its card and docs/tiny-sd.md, from its evaluations.

    lcm-kit evaluate evaluation/tiny_base
    lcm-kit evaluate evaluation/tiny_base guidance_scale=1 count=128 unet_calls=[] run=runs/tiny-base-g1
    lcm-kit evaluate evaluation/tiny_base guidance_scale=3 count=128 unet_calls=[] run=runs/tiny-base-g3
    lcm-kit evaluate evaluation/tiny_base guidance_scale=7.5 count=128 unet_calls=[] run=runs/tiny-base-g7.5
    python tools/tiny_card.py tiny-sd runs/tiny-base runs/tiny-base-g1 runs/tiny-base-g3 runs/tiny-base-g7.5

Each table stands between two comments: `<!-- quality -->` (on the page `<!-- quality-v -->` for tiny-sd-v)
and `<!-- end -->`. The VAE's, between `<!-- vae -->` and its end, is measured here; tiny-sd-v has the same.
`quality.json` has what the tests hold the base to.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lcm_kit import assets
from lcm_kit.data.reconstruction import psnr
from lcm_kit.evaluation import results
from lcm_kit.evaluation.result_shapes import Cell
from lcm_kit.io.files import atomic_write
from lcm_kit.samplers import title_of
from lcm_kit.tiny import world
from lcm_kit.tiny.probe import load_probe
from tools.brand_looks import LOOKS, pictures

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "tiny-sd.md"
BASES = ("tiny-sd", "tiny-sd-v")
FIGURES = {"prompt_adherence": ".1%", "frechet_biased": ".3f", "pixel_distance": ".3f", "saturation": ".2f"}
COUNT = 96  # pictures a kind that the VAE draws again


def rows(runs: list[Path]) -> list[dict[str, Any]]:
    """One row a cell of each evaluation."""
    found = []
    for run in runs:
        read = results.read(run / results.FILE)
        for cell in read["cells"]:
            row: dict[str, Any] = {key: results.value(cell, key) for key in FIGURES}
            row |= {"kind": cell["kind"], "sampler": cell["sampler"], "steps": cell["steps"]}
            row |= {"guidance_scale": cell["guidance_scale"], "unet_calls": cell["unet_calls"]}
            row |= {"samples": results.count(read), "line": line(cell, results.count(read))}
            found.append(row)
    return sorted(found, key=lambda row: (row["kind"] == "plain", row["unet_calls"], row["guidance_scale"]))


def line(cell: Cell, samples: int) -> str:
    """One line of the table."""
    name = f"{title_of(cell['sampler'])}, {cell['steps']} steps"
    setting = (name, f"{cell['guidance_scale']:g}", str(cell["unet_calls"]), str(samples))
    figures = (format(results.value(cell, key) or 0.0, how) for key, how in FIGURES.items())
    return "| " + " | ".join((*setting, *figures)) + " |"


def pixels(images: list[Image.Image]) -> torch.Tensor:
    """Pictures of any size as the base sees them: [N, 3, 64, 64] in [-1, 1]."""
    small = [image.convert("RGB").resize((64, 64), Image.Resampling.LANCZOS) for image in images]
    return torch.from_numpy(np.stack([np.asarray(image) for image in small])).permute(0, 3, 1, 2) / 127.5 - 1


@torch.no_grad()
def reconstructed(vae: Any, images: torch.Tensor) -> torch.Tensor:
    """[N, 3, 64, 64] in [-1, 1], encoded and decoded."""
    parts = (vae.decode(vae.encode(part).latent_dist.mean).sample for part in images.split(32))
    return torch.cat([part.clamp(-1, 1) for part in parts])


def of_style(style: str, count: int) -> list[Image.Image]:
    """Pictures of a brand's style, those of no training."""
    rng = np.random.default_rng(5)
    return [LOOKS[style][0](*picture, rng) for picture in pictures(style, rng)[:count]]


def vae_rows() -> list[dict[str, Any]]:
    """What the VAE makes of each kind of picture: dB, and whether the probe reads the same."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(assets.path("tiny-sd") / "vae", torch_dtype=torch.float32).eval()
    rng, probe = np.random.default_rng(5), load_probe()
    kinds = {f"the style {style}": of_style(style, COUNT) for style in LOOKS}
    kinds["the world"] = [world.render(world.random_scene(rng)) for _ in range(10 * COUNT)]
    found: list[dict[str, Any]] = []
    for kind, images in kinds.items():
        before = pixels(images)
        after = reconstructed(vae, before)
        decibels = psnr(before, after)
        row: dict[str, Any] = {"kind": kind, "pictures": len(images), "read_alike": None}
        row |= {"psnr": float(decibels.mean()), "worst": float(decibels.min())}
        if kind == "the world":
            same = [a == b for a, b in zip(probe.read(before), probe.read(after), strict=True)]
            row["read_alike"] = float(np.mean(same))
        found.append(row)
    return found


def vae_line(row: dict[str, Any]) -> str:
    """One line of the VAE's table."""
    alike = "" if row["read_alike"] is None else f"{row['read_alike']:.1%} of {row['pictures']}"
    cells = (f"{row['kind']} ({row['pictures']})", f"{row['psnr']:.1f} dB", f"{row['worst']:.1f} dB", alike)
    return "| " + " | ".join(cells) + " |"


def put(page: Path, name: str, table: str) -> None:
    """Replace what stands between `<!-- NAME -->` and the next `<!-- end -->`."""
    text = page.read_text(encoding="utf-8")
    new, count = re.subn(
        rf"(<!-- {name} -->\n).*?(<!-- end -->)", lambda m: f"{m[1]}{table}\n{m[2]}", text, flags=re.DOTALL
    )
    if count != 1:
        raise SystemExit(f"{page}: holds {count} tables named {name}, not one")
    atomic_write(page, new)


def vae_table(measured: list[dict[str, Any]]) -> str:
    """What `vae_rows` found."""
    lines = ["| pictures | mean PSNR | worst | read by the probe as the originals are |", "| --- " * 4 + "|"]
    return "\n".join([*lines, *map(vae_line, measured)])


def main(name: str, runs: list[Path]) -> int:
    """Write quality.json of the base `name` and the tables of both pages."""
    card = assets.path(name) / "README.md"
    measured = rows(runs)
    head = "| | guidance_scale | UNet calls | samples | all right | Frechet | to the teacher | colour |"
    quality = "\n".join([head, "| --- " * 8 + "|", *(str(row.pop("line")) for row in measured)])
    put(card, "quality", quality)
    put(PAGE, "quality" + name.removeprefix("tiny-sd"), quality)
    versions = results.read(runs[0] / results.FILE)["versions"]
    told: dict[str, Any] = {"command": f"python tools/tiny_card.py {name}", "versions": versions}
    told["rows"] = measured
    if name == "tiny-sd":
        told["vae"] = vae_rows()
        for page in (card, PAGE):
            put(page, "vae", vae_table(told["vae"]))
    atomic_write(assets.path(name) / "quality.json", json.dumps(told, indent=1) + "\n")
    print(quality)
    return 0


if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] not in BASES:
        sys.exit("usage: python tools/tiny_card.py tiny-sd|tiny-sd-v RUN [RUN ...]")
    sys.exit(main(sys.argv[1], [Path(word) for word in sys.argv[2:]]))
