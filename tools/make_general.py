"""Draw the general pictures that go beside a narrow brand set: 384 real renders of tiny-sd's world.

    python tools/make_general.py

A brand set shows few of the things that a base can draw; distilled on it alone, the adapter forgets the
others (its plain backgrounds, say, cost the patterns). Every third picture is plain with its object in the
middle, as the brand's captions are: what tells the two apart is the style's name alone. Writes
lcm_kit/assets/general/NNN.png and metadata.jsonl. None of the prompts in lcm_kit/assets/tiny-sd/prompts.txt
is among the captions.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lcm_kit import assets
from lcm_kit.tiny import world

SEED, COUNT = 11, 384


def main() -> int:
    """Write the set anew."""
    output, held_out = assets.path("general"), set(assets.prompts("asset:tiny-sd"))
    output.mkdir(parents=True, exist_ok=True)
    for old in output.glob("*.png"):
        old.unlink()
    rng = np.random.default_rng(SEED)
    lines: list[str] = []
    while len(lines) < COUNT:
        scene = world.random_scene(rng)
        if len(lines) % 3 == 0:
            scene = replace(scene, pattern="plain", place="in the middle")
        if scene.prompt in held_out:
            continue
        name = f"{len(lines):03d}.png"
        world.render(scene).save(output / name, optimize=True)
        lines.append(json.dumps({"file_name": name, "text": world.caption(scene, rng)}))
    (output / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
