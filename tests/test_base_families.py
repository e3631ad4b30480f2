"""The table of families: nobody else names one, and each entry is recognised by what it says of itself."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lcm_kit import families
from lcm_kit.lora import structure

ROOT = Path(__file__).parents[1]
NAMES = {
    *families.FAMILIES,
    *families.GENERATIONS,
    *(g.configs for g in families.GENERATIONS.values()),
}
# Where a name may stand as a literal, and why
ALLOWED = {
    "lcm_kit/families/sd.py": "its entry",
    "lcm_kit/families/sdxl.py": "its entry",
    "lcm_kit/config/evaluation.py": "the default of a benchmark's `structure`",
    "lcm_kit/lora/apps/invokeai.py": "InvokeAI's own list of bases, by the width that it finds in a file",
}


def literals(path: Path) -> Iterator[str]:
    """The string constants of a Python file, and all quoted words of a template."""
    if path.suffix == ".j2":
        text = path.read_text(encoding="utf-8")
        yield from (name for name in NAMES for quote in "\"'" if f"{quote}{name}{quote}" in text)
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_a_familys_name_stands_in_its_own_entry_only() -> None:
    tops = ("lcm_kit", "train", "evaluation")
    files = [path for top in tops for kind in ("*.py", "*.j2") for path in (ROOT / top).rglob(kind)]
    found = {str(path.relative_to(ROOT)) for path in files if NAMES & set(literals(path))}
    assert found == set(ALLOWED)


def test_the_tables_cost_nothing_to_import() -> None:
    show = "import sys, lcm_kit.families, lcm_kit.samplers; print(sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", show], capture_output=True, text=True, check=True).stdout
    assert not any(f"'{heavy}'" in loaded for heavy in ("torch", "diffusers", "pydantic", "numpy"))


@pytest.mark.parametrize("generation", families.GENERATIONS.values(), ids=lambda each: each.name)
def test_each_model_is_recognised_by_what_it_says_of_itself(generation: families.Generation) -> None:
    whole = generation.pruned_from or generation.name
    small = {**generation.unet, "cross_attention_dim": 48}
    assert families.by_unet(generation.unet).name == families.by_unet(small).name == whole
    parts = [part for part in generation.family.parts if part != "scheduler"]
    assert families.by_pipeline("Whatever", parts) is generation.family
    names = [f"{prefix}x" for prefixes in generation.checkpoint.values() for prefix in prefixes]
    middle = [] if generation.checkpoint_lacks else ["model.diffusion_model.middle_block.1.norm.weight"]
    linear = bool(generation.unet.get("use_linear_projection"))
    assert families.by_checkpoint(names + middle, linear) is generation
    assert [*generation.text] == [*generation.family.text_parts] == [*generation.family.kohya_prefixes][1:]
    base = structure.known(generation.name)
    assert base.generation.name == whole and base.published and base.blocks is generation
    repository = generation.repositories[-1]
    assert families.by_repository(repository) is generation


def test_what_is_supported_is_listed_from_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    assert families.listed() == "SD1.x, SD2.x or SDXL"
    fewer = {name: each for name, each in families.GENERATIONS.items() if name != "sd2"}
    monkeypatch.setattr(families, "GENERATIONS", fewer)  # a copy: the order of the table counts
    assert families.listed("and") == "SD1.x and SDXL"


def test_the_widths_are_those_of_the_text_encoders() -> None:
    for generation in families.GENERATIONS.values():
        assert generation.width == sum(clip.width for clip in generation.text.values())
    assert [generation.pooled for generation in families.GENERATIONS.values()] == [0, 0, 1280, 1280]
