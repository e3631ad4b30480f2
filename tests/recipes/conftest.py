"""One cache for all tests of a training recipe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.recipes.small import prepare


@pytest.fixture(scope="session")
def distill_keys(sd_base: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The keys of a small distillation config over an encoded cache, for `small.configure`."""
    return prepare(tmp_path_factory.mktemp("distill"), sd_base())
