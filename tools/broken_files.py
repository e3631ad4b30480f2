"""What the apps make of LoRA files as the public trainers write them: the table of docs/lora-files.md.

    python tools/broken_files.py

No weights: the published structures, the LCM targets at rank 4, alpha 8 (strength 2).
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from lcm_kit import families
from lcm_kit.lora import structure, verify, write
from lcm_kit.lora.apps import APPS
from lcm_kit.lora.in_diffusers import DIFFUSERS
from lcm_kit.lora.provenance import Provenance
from lcm_kit.lora.rows import Row, title_of
from lcm_kit.quiet import quiet
from tests import broken
from tests.loras import random_lora

CASES = [
    ("sd1", "diffusers' SD1.5 script", broken.peft_wrapper),
    ("sdxl", "diffusers' SDXL script", broken.mixed_styles),
    ("sdxl", "its kohya conversion", broken.kohya_diffusers_spelling),
    ("sdxl", "half converted", broken.kohya_two_spellings),
    ("sd1", "kohya format without alphas", broken.kohya_without_alphas),
]
COLUMNS = (DIFFUSERS, *APPS)
# Short titles, so that a row of the page is at most 120 characters long
SHORT = {"Stable Diffusion 1.x": "SD1.x", "Stable Diffusion 2.x": "SD2.x", "stable-diffusion.cpp": "sd.cpp"}


def cell(row: Row) -> str:
    """How many modules are loaded, with an asterisk where their strength is lost."""
    if row.ok:
        return "all"
    if row.loaded > row.right:
        return f"{row.loaded}\\*"
    return str(row.right) if row.loaded else "none"


def main() -> None:
    """Print the table."""
    quiet()
    titles = [title_of(app) for app in COLUMNS]
    titles = [SHORT.get(title, title) for title in titles]
    print(f"| file | base (modules) | {' | '.join(titles)} |")
    print("| --- " * (len(titles) + 2) + "|")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "lora.safetensors"
        for generation, what, breaker in CASES:
            base = structure.known(generation)
            lora = random_lora(base)
            broken.save(file, breaker(lora, base))
            show(what, base, file)
        for base in map(structure.known, families.names()):
            for style in ("kohya", "diffusers"):
                write.write(file, random_lora(base), base, style, "float16", Provenance("lora"))
                show(f"this kit, {style} format", base, file)


def show(what: str, base: structure.Structure, file: Path) -> None:
    """One row; a file without alpha is held against the alpha that it was trained with."""
    report = verify.verify(file, verify.Against(base), apps=COLUMNS, alpha=8.0)
    found = {row.app: cell(row) for row in report.rows}
    cells = [found.get(app, "no base") for app in COLUMNS]
    label = f"{SHORT.get(base.label, base.label)} ({report.rows[0].of})"
    print(f"| {what} | {label} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
