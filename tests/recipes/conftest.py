"""Caches that tests of the training recipes share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lcm_kit import bases
from lcm_kit.data.images import encode
from lcm_kit.lora import structure
from tests import broken
from tests.loras import fuse, lcm_modules, random_lora
from tests.recipes.small import configure, prepare


@pytest.fixture(scope="session")
def distill_keys(sd_base: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The keys of a small distillation config over an encoded cache, for `small.configure`."""
    return prepare(tmp_path_factory.mktemp("distill"), sd_base())


@pytest.fixture(scope="session")
def mixed(
    sd_base: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Any]:
    """Keys of pictures with as many general ones and a styled teacher, and its UNet, fused."""
    folder, base = tmp_path_factory.mktemp("mixed"), sd_base("epsilon")
    keys = prepare(folder, base)
    general = folder / "general"
    general.mkdir()
    for file in sorted((folder / "images").iterdir()):
        (general / file.name).write_bytes(file.read_bytes())
    for i, file in enumerate(sorted(general.glob("*.png"))):
        Image.new("RGB", (64, 64), (20 * i, 255 - 20 * i, 90)).save(file)
    place = structure.of_base(str(base))
    style = random_lora(place, lcm_modules(place), ranks=(4,), alphas=(4.0,), size=0.1)
    broken.save(folder / "style.safetensors", broken.kohya_diffusers_spelling(style, place))
    data = {**keys["data"], "cache": str(folder / "both"), "regularization": str(general)}
    keys = {**keys, "data": data, "teacher": {"adapters": [str(folder / "style.safetensors")]}}
    encode(configure(keys, folder / "none"), progress=False)
    return keys, fuse(bases.load_unet(bases.inspect_base(str(base))), style)
