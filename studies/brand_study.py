"""The brand study of docs/brand-study.md: which way to a style at few steps serves when.

    python -m studies.brand_study                       # all of it; what is done is not done again
    python -m studies.brand_study lumo-60 neon          # the cells whose names begin so
    python -m studies.brand_study --tables              # the tables and the plot, from what there is

A cell is a style, a number of pictures and a seed. In each, by the configs of configs/study: the styled
teacher; one LoRA distilled from it, with and without the base as the teacher of general pictures, that starts
as the style, as the style and the base's LCM-LoRA together, or as the latter; latent
consistency fine-tuning without and with a teacher; the style beside the LCM-LoRA at the usual and at searched
weights, and the latter merged at rank 16. Several processes may work at once (OMP_NUM_THREADS=1 for each):
each takes a cell that no other has.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lcm_kit.config import shipped
from lcm_kit.config.load import load
from lcm_kit.data import prior, sources
from lcm_kit.evaluation import results
from lcm_kit.export.run import export_run
from lcm_kit.lora import merge_files
from lcm_kit.lora.locate import adapter_file
from lcm_kit.quiet import quiet
from tools.brand_looks import LOOKS, caption, pictures, unseen

ROOT = Path(__file__).resolve().parent.parent
RUNS, CACHE = ROOT / "runs" / "brand-study", ROOT / "cache" / "brand-study"
SPEED = "asset:tiny-lcm-lora"
SIZES, SEEDS = {"lumo": (20, 60, 120), "neon": (60,)}, (0, 1, 2)
USUAL = 0.8, 1.0  # weights of style and acceleration in published advice
RANK, STRONG = 16, 1.05  # of the style in its teacher, as in the story


def cells() -> Iterator[str]:
    """Names of all cells, those that say most first."""
    for seed in SEEDS:
        for look, sizes in SIZES.items():
            yield from (f"{look}-{count}-{seed}" for count in sorted(sizes, key=lambda n: n != 60))


def draw_set(look: str, count: int, seed: int) -> Path:
    """A folder of `count` pictures with captions, and prompts.txt: 12 unseen objects, then 12 new pairs."""
    folder = CACHE / f"{look}-{count}-{seed}" / "pictures"
    if (folder / "prompts.txt").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    shown, (draw, _) = pictures(look, rng), LOOKS[look]
    for index, (name, tone, size) in enumerate(shown[:count]):
        stem = folder / f"{index:03d}-{name}"
        draw(name, tone, size, rng).save(stem.with_suffix(".png"))
        stem.with_suffix(".txt").write_text(caption(name, tone, size, look) + "\n")
    asked = [*(p for k, p in enumerate(unseen(look)) if k % 3 != seed % 3), *shown[max(SIZES[look]) :][:12]]
    (folder / "prompts.txt").write_text("\n".join(caption(*p, look) for p in asked) + "\n")
    return folder


def run(config: str, **overrides: Any) -> Path:
    """Run a config of configs/study with overrides, its cache and its export included."""
    given = [f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in overrides.items()]
    loaded = load(shipped.config_path(f"study/{config}"), given)
    recipe = shipped.load_recipe(loaded.recipe)
    if not loaded.recipe.startswith("train/"):
        return recipe.main(loaded)
    folder = Path(loaded.output)
    if not (folder / "export").is_dir():
        sources.encode(loaded, progress=False)
        recipe.main(loaded)
        export_run(folder)
    return folder


def own() -> Path:
    """A folder of pictures that the base drew, so that training keeps what it can draw."""
    config = load(
        shipped.config_path("study/style"),
        [f"data.cache={json.dumps(str(CACHE / 'own'))}", "prior.prompts=asset:general", "prior.count=120"],
    )
    prior.encode(config, progress=False)
    return CACHE / "own-prior" / "pictures"


def measure(folder: Path, name: str, adapter: Path, style: Path, brand: Path, seed: int) -> None:
    """Write `folder/NAME/brand.json`; what the base and the styled teacher draw is drawn once a cell."""
    output = folder / name
    for kind in ("brand", "control"):
        common, here = folder / "drawn" / kind, output / "brand" / kind
        common.mkdir(parents=True, exist_ok=True)
        here.parent.mkdir(parents=True, exist_ok=True)
        if not here.is_symlink():
            here.symlink_to(common)
    if not (output / results.BRAND_FILE).is_file():
        run("brand", run=str(adapter), style=str(style), brand=str(brand), prompts=str(brand / "prompts.txt"),
            output=str(output), base="asset:tiny-sd", seed=seed)  # fmt: skip


def do(cell: str) -> None:
    """Everything of one cell."""
    look, count, seed = cell.split("-")[0], *map(int, cell.split("-")[1:])
    folder, brand = RUNS / cell, draw_set(look, count, seed)
    data = {"data__path": str(brand), "data__cache": str(CACHE / cell / "latents"), "seed": seed,
            "data__regularization": str(own())}  # fmt: skip
    style = run("style", output=str(folder / "style"), **data)
    parts = adapter_file(style), adapter_file(SPEED)

    def merged(name: str, weights: tuple[float, float], rank: int | None = None) -> Path:
        if not (folder / f"{name}_diffusers.safetensors").is_file():
            both = list(zip(parts, weights, strict=True))
            merge_files.merge(both, folder / name, style="diffusers", rank=rank, base="asset:tiny-sd")
        return folder / f"{name}_diffusers.safetensors"

    def distilled(name: str, start: Path, rank: int, **more: Any) -> None:
        ways[name] = run(
            "styled", output=str(folder / name), teacher__adapters=[{"path": str(style)}],
            adapter__start=str(start), adapter__rank=rank, adapter__alpha=rank, **more, **data,
        )  # fmt: skip

    def by_default(name: str, *others: str, **more: Any) -> None:
        strong = {"path": str(style), "weight": STRONG}
        ways[name] = run(
            "distilled", output=str(folder / name), teacher__adapters=[strong],
            adapter__start=[strong, *others], **more, **data,
        )  # fmt: skip

    ways: dict[str, Path] = {}
    starts = {"both": merged("start", (1.0, 1.0)), "style": style}
    every_way = count == 60 and seed == 0  # elsewhere five ways are left out, to save hours
    if every_way:
        starts["speed"] = adapter_file(SPEED)
    for name, start in starts.items():
        distilled(f"styled-{name}", start, 2 * RANK if name == "both" else RANK)
    by_default("base-style")
    by_default("base-both", SPEED)
    for weight in (0.0, 0.5) if every_way else (0.0,):
        scales = {"guidance__min": 4.0, "guidance__max": 6.0} if weight else {}
        ways[f"lcf-{weight:g}"] = run(
            "lcf", output=str(folder / f"lcf-{weight:g}"), teacher__weight=weight, **scales, **data
        )
    found = run("compose", style=str(style), speed=SPEED, output=str(folder / "compose"),
                brand=str(brand), prompts=str(brand / "prompts.txt"), seed=seed + 100)  # fmt: skip
    best = results.read(found)["recommended"]
    searched = best["style_weight"], best["lora_weight"]
    ways["usual"] = merged("usual", USUAL)
    ways["searched"], ways["reduced"] = merged("searched", searched), merged("reduced", searched, RANK)
    if every_way:
        distilled("styled-searched", ways["searched"], 2 * RANK)
        distilled("styled-longer", style, RANK, steps=480, optimizer__lr=1e-3, checkpoint__every=480)
        by_default("base-adapters", teacher__regularization="adapters")
    for name, adapter in ways.items():
        measure(folder / "measured", name, adapter, style, brand, seed)
    (folder / "done").touch()


def take(cell: str) -> bool:
    """Whether this process is the one that does `cell`; a claim of a process that is gone is taken over."""
    folder = RUNS / cell
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "done").is_file():
        return False
    claim = folder / "claim"
    try:
        descriptor = os.open(claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        owner = claim.read_text()
        if owner and Path(f"/proc/{owner}").exists():
            return False
        claim.write_text(str(os.getpid()))
        return True
    with os.fdopen(descriptor, "w") as handle:
        handle.write(str(os.getpid()))
    return True


def main(words: Sequence[str]) -> int:
    """Run the cells that `words` name, or all; or write the tables."""
    if list(words) == ["--tables"]:
        from studies.brand_tables import write

        write(RUNS, ROOT / "docs")
        return 0
    quiet()
    for cell in cells():
        if (not words or any(cell.startswith(word) for word in words)) and take(cell):
            print(f"== {cell}", flush=True)
            do(cell)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
