"""Which process this is, where `accelerate launch` or torchrun started several."""

from __future__ import annotations

import os
from datetime import timedelta
from functools import cache
from typing import Any

from lcm_kit import console
from lcm_kit.share import Share

# How long processes wait for each other. One of them draws and encodes alone while the others wait, and
# torch's 10 minutes (NCCL) end a run there whose pictures take longer
PATIENCE = timedelta(hours=12)


def state() -> Any:
    """The `PartialState` of this process, patient. The first who makes one decides, so all call this."""
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=PATIENCE)


def share() -> Share:
    """This process's share of work. accelerate is only imported where there are several processes."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return Share()
    here = state()
    return Share(here.process_index, here.num_processes, here.wait_for_everyone)


def largest(value: int) -> int:
    """The largest `value` of all processes, which all must ask for at the same place.

    Told from host to host: through the GPUs each would first wait for all that it was given to compute.
    """
    import torch

    told = torch.tensor([value])
    torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX, _hosts(torch.distributed.group.WORLD))
    return int(told)


@cache
def _hosts(world: Any) -> Any:
    """A group of the processes of `world` that needs no GPU."""
    import torch

    return torch.distributed.new_group(backend="gloo", timeout=PATIENCE)


def say(accelerator: Any, text: object) -> None:
    """Print `text` once for all processes of a machine."""
    if accelerator.is_local_main_process:
        console.say(text)
