"""What the apps make of LoRA files as the public trainers write them: the table of docs/lora-files.md.

    python tools/broken_files.py

No weights: the published structures, the LCM targets at rank 4, alpha 8 (strength 2).
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from lcm_kit import base_families
from lcm_kit.export import structure, verify, write
from lcm_kit.provenance import Provenance
from lcm_kit.quiet import quiet
from tests import broken
from tests.loras import random_lora

CASES = [
    ("sd1", "diffusers' SD1.5 LCM-LoRA script", broken.peft_wrapper),
    ("sdxl", "diffusers' SDXL LCM-LoRA script", broken.mixed_styles),
    ("sdxl", "its kohya conversion (diffusers spelling)", broken.kohya_diffusers_spelling),
    ("sdxl", "half converted (two spellings)", broken.kohya_two_spellings),
    ("sd1", "kohya style without alphas", broken.kohya_without_alphas),
]


def cell(row: verify.Row) -> str:
    """How many modules are loaded, and whether at the strength that they were trained for."""
    if row.ok:
        return "all"
    if row.loaded > row.right:
        return f"{row.loaded} of {row.of}, strength lost"
    return f"{row.right} of {row.of}" if row.loaded else "none"


def main() -> None:
    """Print the table."""
    quiet()
    titles = [verify.TITLES.get(app, app) for app in verify.ALL]
    print(f"| file | base | {' | '.join(titles)} |")
    print("| --- " * (len(titles) + 2) + "|")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "lora.safetensors"
        for generation, what, breaker in CASES:
            base = structure.known(generation)
            lora = random_lora(base)
            broken.save(file, breaker(lora, base))
            show(what, base, file)
        for base in map(structure.known, base_families.names()):
            for style in ("kohya", "diffusers"):
                write.write(file, random_lora(base), base, style, "float16", Provenance("lora"))
                show(f"this kit, {style} style", base, file)


def show(what: str, base: structure.Structure, file: Path) -> None:
    """One row; a file without alpha is held against the alpha that it was trained with."""
    report = verify.verify(file, verify.Against(base), alpha=8.0)
    found = {row.app: cell(row) for row in report.rows}
    cells = [found.get(app, "cannot load the base") for app in verify.ALL]
    print(f"| {what} | {base.label} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
