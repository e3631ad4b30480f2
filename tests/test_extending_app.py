"""docs/extending/app.md, followed: its rules for a toy app judge files, with counts known from elsewhere."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lcm_kit.lora import structure, verify
from lcm_kit.lora.apps import APPS, TITLES
from tests.app_files import of
from tests.loras import lcm_modules, text_modules

PAGE = Path(__file__).parents[1] / "docs" / "extending" / "app.md"
BASE = structure.known("sd1")


@pytest.fixture
def follow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], verify.Report]:
    """Write style.safetensors with a LoRA of these modules, and run the page's Python beside it."""
    monkeypatch.chdir(tmp_path)
    for table in (APPS, TITLES):
        monkeypatch.setitem(table, "sketcher", None)  # so that it is taken out again afterwards

    def run(modules: list[str]) -> verify.Report:
        file = {
            key: tensor if tensor.ndim == 0 else torch.ones(tensor.shape)
            for key, tensor in of(BASE, modules).items()
        }
        save_file(file, "style.safetensors")
        names: dict[str, Any] = {}
        for block in re.findall(r"^```python\n(.*?)^```", PAGE.read_text("utf-8"), re.DOTALL | re.MULTILINE):
            exec(block, names)
        return names["report"]

    return run


def test_a_lora_of_the_unet_is_loaded_completely(
    follow: Callable[[list[str]], verify.Report], capsys: pytest.CaptureFixture[str]
) -> None:
    """The sentence that the page promises, and 278: the modules that LCM-LoRA adapts in SD1.5."""
    (row,) = follow(lcm_modules(BASE)).rows
    assert (row.loaded, row.right, row.of, row.ok) == (278, 278, 278, True)
    printed = capsys.readouterr().out.strip()
    assert printed == "Sketcher: 278 of 278 modules at the right strength; ok"
    assert f"`{printed}`" in PAGE.read_text("utf-8")


def test_what_the_toy_app_ignores_is_counted_and_named(
    follow: Callable[[list[str]], verify.Report],
) -> None:
    """SD1.5's text encoder has 12 layers of q, k, v, out, fc1 and fc2."""
    text = text_modules(BASE)
    (row,) = follow([*lcm_modules(BASE), *text]).rows
    assert len(text) == 72 and (row.right, row.of) == (278, 350)
    assert row.wrong and row.verdict == f"drops 72 modules, such as {text[0]}"
