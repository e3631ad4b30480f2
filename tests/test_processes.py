"""Processes that were started together wait for each other for as long as one of them may draw alone."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

FIRST_OF_TWO = {
    "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29555",
    "ACCELERATE_USE_CPU": "true",
}  # fmt: skip


@pytest.mark.parametrize("who", ["processes.share()", "runtime.start(configure(TEMPLATE, 'run'))"])
def test_processes_are_joined_with_patience(who: str) -> None:
    """What torch is asked for, the group itself being left out: it would wait for the second process."""
    code = f"""
import sys
import torch.distributed
from lcm_kit.training import processes, runtime
from tests.recipes.small import TEMPLATE, configure

def asked(*args, timeout=None, **keys):
    print("hours", timeout.total_seconds() / 3600)
    sys.exit()

torch.distributed.init_process_group = asked
{who}
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | FIRST_OF_TWO, capture_output=True, text=True
    )
    assert done.stdout.split() == ["hours", "12.0"], done.stderr
