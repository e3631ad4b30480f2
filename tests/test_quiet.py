"""What the command line mutes of the libraries, and that all else of the same loggers is heard."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from lcm_kit.quiet import quiet

MUTED = {
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward from kernels-community: no module",
    "transformers.utils.import_utils": "CLIPImageProcessor requires torchvision; falling back",
}


@pytest.mark.parametrize("name", MUTED)
def test_one_message_is_muted_and_others_are_not(name: str, caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger(name)
    before, propagate = list(logger.filters), logger.propagate
    quiet()
    try:
        logger.addHandler(caplog.handler)
        logger.propagate = False
        logger.warning(MUTED[name])
        logger.warning("the weights are damaged")
    finally:
        logger.removeHandler(caplog.handler)
        logger.filters, logger.propagate = before, propagate
    assert [record.getMessage() for record in caplog.records] == ["the weights are damaged"]


def test_checking_a_config_says_nothing_of_the_kernels_that_bitsandbytes_lacks() -> None:
    """In a process of its own: bitsandbytes says it once, when it is imported."""
    pytest.importorskip("bitsandbytes")
    done = subprocess.run(
        [sys.executable, "-m", "lcm_kit", "check", "finetune/tiny_brand"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if not line.startswith("checking what ")]
    assert lines == [] and done.stdout.endswith("ok: finetune/tiny_brand\n")
