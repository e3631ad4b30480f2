"""Spoiled bases at the door: a line that names the part, or the same base; more: tools/odd_bases.py."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lcm_kit.bases import inspect_base
from lcm_kit.errors import UserError
from tests import odd_bases


def seen(folder: Path) -> dict[str, Any]:
    """What the door says of a base, without where it lies and what only names its maker."""
    found = dataclasses.asdict(inspect_base(str(folder)))
    return {key: value for key, value in found.items() if key not in ("path", "folder", "scheduler_config")}


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_spoiled_base_is_refused_in_a_line_or_is_the_same(
    family: str, sd_base: Callable[..., Path], sdxl_base: Path, tmp_path: Path
) -> None:
    base = sd_base("epsilon") if family == "sd" else sdxl_base
    whole, counts = seen(base), Counter[str]()
    for case in odd_bases.some(base, 300):
        folder = odd_bases.spoil(base, case, tmp_path / "odd")
        try:
            found = seen(folder)
            assert found == whole or odd_bases.listed(case), case.name
            counts["same"] += 1
        except UserError as error:
            sentence = str(error)
            part = case.file.partition("/")[0]
            assert (part in sentence or case.field in sentence) and len(sentence) < 1500, sentence
            assert not re.search("[\x00-\x1f]", sentence), sentence
            counts["said"] += 1
        shutil.rmtree(folder)
    assert counts["said"] > 120 and counts["same"] > 60, counts  # else nothing was tried
