"""How large pictures are drawn, as configs say it: a square is a whole number, however it is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lcm_kit.config.load import dump, load
from lcm_kit.config.resolution import height_width, plain, read, shown, width_height
from lcm_kit.config.sweep import GuidanceSweep
from lcm_kit.errors import UserError

SWEEP = "recipe: evaluation/guidance_sweep\nadapters: [a]\n"


def written(folder: Path, resolution: str) -> Path:
    path = folder / "sweep.yaml"
    path.write_text(f"{SWEEP}resolution: {resolution}\n")
    return path


@pytest.mark.parametrize(
    ("text", "found"),
    [("512", 512), ("[512, 512]", 512), ("[768, 512]", (768, 512)), ("null", None)],
)
def test_a_size_is_read_and_written_back(tmp_path: Path, text: str, found: Any) -> None:
    config = load(written(tmp_path, text))
    assert isinstance(config, GuidanceSweep) and config.resolution == found
    (tmp_path / "again.yaml").write_text(dump(config))
    assert load(tmp_path / "again.yaml") == config


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("100", "100 is not a multiple of 8; try 96"),
        ("[64, 100]", "100 is not a multiple of 8; try 96"),
        ("5000", "5000 pixels are out of range; give a number from 8 to 4096"),
        ("[0, 64]", "0 pixels are out of range"),
        ("true", "True is no size of pictures; give a whole number of pixels for squares, or"),
        ("[64, true]", r"\[64, True\] is no size of pictures"),
        ("[64]", r"\[64\] is no size of pictures"),
        ("64x32", "'64x32' is no size of pictures"),
        ("64.0", "64.0 is no size of pictures"),
    ],
)
def test_what_is_none_is_said(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UserError, match=f"resolution: {said}"):
        load(written(tmp_path, text))


def test_orders_of_its_sides() -> None:
    assert (width_height((768, 512)), height_width((768, 512)), width_height(64)) == (
        (768, 512),
        (512, 768),
        (64, 64),
    )
    assert (shown(64), shown((768, 512))) == ("64 × 64", "768 × 512")
    assert [read(plain(each)) for each in (64, (768, 512))] == [64, (768, 512)]
