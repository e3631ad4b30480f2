"""Which process this is, where `accelerate launch` or torchrun started several."""

from __future__ import annotations

import os
from typing import Any

from lcm_kit import console
from lcm_kit.share import Share


def share() -> Share:
    """This process's share of work. accelerate is only imported where there are several processes."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return Share()
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    return Share(state.process_index, state.num_processes, state.wait_for_everyone)


def say(accelerator: Any, text: object) -> None:
    """Print `text` once for all processes of a machine."""
    if accelerator.is_local_main_process:
        console.say(text)
