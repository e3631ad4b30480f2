"""Shared fixtures. Everything runs offline."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # figures are compared with the CPU's float32
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from tests.bases import build_sd


@pytest.fixture(scope="session")
def sd_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`sd_base("epsilon")`: the folder of a small random base, built once for each prediction type."""

    @cache
    def build(prediction_type: str = "epsilon") -> Path:
        return build_sd(tmp_path_factory.mktemp("base") / prediction_type, prediction_type)

    return build
