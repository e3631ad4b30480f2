"""Shared fixtures. Everything runs offline."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # figures are compared with the CPU's float32
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

from tests.bases import build_sd, build_sdxl


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums depend on their number in the last bits, and other processes have one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def sd_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`sd_base("epsilon")`: the folder of a small random base, built once for each prediction type."""

    @cache
    def build(prediction_type: str = "epsilon") -> Path:
        return build_sd(tmp_path_factory.mktemp("base") / prediction_type, prediction_type)

    return build


@pytest.fixture(scope="session")
def real_sd_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random base with all the blocks of SD1.5, narrow: 278 modules for an LCM-LoRA."""
    return build_sd(tmp_path_factory.mktemp("base") / "real-sd", real_blocks=True)


@pytest.fixture(scope="session")
def sdxl_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random base with all the blocks of SDXL, narrow: 788 modules for an LCM-LoRA."""
    return build_sdxl(tmp_path_factory.mktemp("base") / "sdxl")


@pytest.fixture(scope="session")
def ssd1b_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random base with the blocks of SSD-1B, narrow: SDXL with transformer blocks taken out."""
    return build_sdxl(tmp_path_factory.mktemp("base") / "ssd1b", pruned=True)


@pytest.fixture(scope="session")
def sd2_v_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random base with the blocks of SD2.1, narrow, that predicts v at zero terminal SNR."""
    folder = tmp_path_factory.mktemp("base") / "sd2-v"
    return build_sd(folder, "v_prediction", real_blocks=True, rescale_betas_zero_snr=True)
