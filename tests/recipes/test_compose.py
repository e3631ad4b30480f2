"""Composing a style and an acceleration: the cells are what plain diffusers draws, the best pair is found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from pydantic import TypeAdapter

from lcm_kit import sample
from lcm_kit.config import shipped
from lcm_kit.config.sweep import Compose
from lcm_kit.errors import UserError
from lcm_kit.evaluation.measure import Figure
from lcm_kit.evaluation.metrics.distance import rms
from lcm_kit.evaluation.pairs import Pair, choose
from lcm_kit.lora import reading
from tests.loras import random_lora
from tests.recipes.test_sweep import save, tiny

SMALL: dict[str, Any] = {
    "recipe": "evaluation/compose", "base": "asset:tiny-sd", "count": 3, "images_per_prompt": 2,
    "pictures": 2, "batch_size": 8, "resamples": 100, "teacher_steps": 2, "teacher_guidance": 3.0,
    "steps": 1, "sampler": "ddim", "style_weights": [0.5, 1.0], "speed_weights": [0.0, 0.5],
    "brand": "asset:brand", "control": "asset:general",
}  # fmt: skip


@pytest.mark.slow
def test_the_grid_and_what_it_writes(tmp_path: Path) -> None:
    style = save(random_lora(tiny(), size=0.03, seed=1), tmp_path / "style.safetensors")
    speed = save(random_lora(tiny(), size=0.03, seed=2), tmp_path / "speed.safetensors")
    keys = {**SMALL, "style": str(style), "speed": str(speed), "output": str(tmp_path / "out")}
    config = TypeAdapter(Compose).validate_python(keys)
    results = json.loads(shipped.load_recipe("evaluation/compose").main(config).read_text())
    assert [cell["id"] for cell in results["cells"]] == [
        "styled-ddim-2-g3-style1",
        *(f"pair-ddim-1-g1-style{a}-speed{b}" for a in ("0.5", "1") for b in ("0", "0.5")),
    ]

    # the figures of one pair, drawn by hand with both adapters
    pipe = sample.pipeline("asset:tiny-sd")
    texts = [prompt for prompt in results["prompts"]["main"]["texts"] for _ in range(2)]
    sample.load_adapter(pipe, style, name="a")
    teacher = sample.latents(pipe, texts, sampler="ddim", steps=2, guidance_scale=3.0)
    sample.load_adapter(pipe, speed, name="b")
    pipe.set_adapters(["a", "b"], [1.0, 0.5])
    pair = sample.latents(pipe, texts, sampler="ddim", steps=1)
    found = {cell["id"]: cell["metrics"] for cell in results["cells"]}["pair-ddim-1-g1-style1-speed0.5"]
    assert found["latent_distance"]["value"] == pytest.approx(float(rms(pair, teacher).mean()), rel=1e-4)

    # the merged file is both at the recommended weights
    use = json.loads((tmp_path / "out/recommended.json").read_text())
    merged = reading.read(tmp_path / "out/merged_diffusers.safetensors", tiny()).lora
    parts = [reading.read(file, tiny()).lora for file in (style, speed)]
    weights = (use["style_weight"], use["lora_weight"])
    for name, layer in merged.layers.items():
        wanted = sum(
            w * part.layers[name].scale * part.layers[name].up.flatten(1) @ part.layers[name].down.flatten(1)
            for w, part in zip(weights, parts, strict=True)
        )
        product = layer.scale * layer.up.flatten(1).float() @ layer.down.flatten(1).float()
        assert torch.allclose(product, torch.as_tensor(wanted), atol=2e-4)
    for name in ("map.png", "teacher-and-pair.png"):
        with Image.open(tmp_path / "out" / name) as picture:
            assert picture.width > 100
    assert (tmp_path / "out/results.csv").read_text().count("\n") == 6

    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(style.read_bytes()[:-100])
    with pytest.raises(UserError, match="broken"):
        shipped.load_recipe("evaluation/compose").main(
            TypeAdapter(Compose).validate_python({**keys, "style": str(broken)})
        )


def figures(adherence: float, kernel: float, brand: float, noise: float = 0.01) -> dict[str, Figure]:
    rounds = noise * torch.randn(500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def figure(value: float, seed: int) -> Figure:
        own = torch.randn(500, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return Figure(value, value + rounds + noise * own)

    return {
        "prompt_adherence": figure(adherence, 1 + int(1000 * adherence)),
        "kernel_teacher": figure(kernel, 2 + int(1000 * kernel)),
        "brand_similarity": figure(brand, 3 + int(1000 * brand)),
    }


def test_the_pair_that_is_chosen() -> None:
    """Prompts first, then nearness to the styled teacher, then to its style where that cannot tell."""

    def pair(style: float, speed: float) -> Pair:
        return Pair("student", "pair", "lcm", 4, 1.0, speed, style_weight=style)

    cells = {
        Pair("teacher", None, "ddim", 50, 5.0): figures(1.0, 0.0, 0.9),
        pair(1.0, 0.6): figures(0.5, 0.10, 0.9),  # off its prompts
        pair(1.0, 0.8): figures(0.95, 0.30, 0.3),
        pair(1.0, 1.0): figures(0.96, 0.31, 0.5),  # as near as the one above, more like the teacher's style
        pair(1.1, 0.8): figures(0.95, 0.30, 1.9),  # as near, and more look than the teacher has
        pair(1.2, 1.0): figures(0.96, 0.60, 0.8),  # far from the teacher
    }
    chosen, reasons = choose(cells, 0.95)
    assert (chosen.style_weight, chosen.lora_weight) == (1.0, 1.0)
    assert reasons[0] == "1 of 5 pairs follow their prompts less than the best one (0.96)"
    # a look costs prompts: where the styled teacher follows fewer, pairs may too, but no fewer than it
    (teacher,) = (cell for cell in cells if cell.kind == "teacher")
    strong = {**cells, teacher: figures(0.5, 0.0, 0.9), pair(1.4, 1.0): figures(0.2, 0.01, 1.0)}
    chosen, reasons = choose(strong, 0.95)
    assert (chosen.style_weight, chosen.lora_weight) == (1.0, 0.6)
    assert reasons[0] == "1 of 6 pairs follow their prompts less than the styled teacher (0.5)"
    plain = {cell: {k: v for k, v in f.items() if k == "kernel_teacher"} for cell, f in cells.items()}
    assert choose(plain, 0.95)[0].lora_weight == 0.6
