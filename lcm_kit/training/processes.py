"""Which process this is, where `accelerate launch` or torchrun started several."""

from __future__ import annotations

import contextlib
import platform
import time
from collections.abc import Mapping
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

from lcm_kit import console
from lcm_kit.errors import UserError
from lcm_kit.io.files import signed
from lcm_kit.share import Share, started_together
from lcm_kit.training import peers

# How long processes wait for each other. One of them draws and encodes alone while the others wait, and
# torch's 10 minutes (NCCL) end a run there whose pictures take longer
PATIENCE = timedelta(hours=12)
_LATE = 10.0  # seconds after which a file that another machine wrote is there, if the folder is shared


def state() -> Any:
    """The `PartialState` of this process, patient. The first who makes one decides, so all call this."""
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    here = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=PATIENCE)
    if here.num_processes > 1:
        peers.listen()
    return here


def share() -> Share:
    """This process's share of work. accelerate is only imported where there are several processes."""
    if started_together() < 2:
        return Share()
    here = state()
    wait = here.wait_for_everyone
    return Share(here.process_index, here.num_processes, wait, require_shared, require_same)


def require_shared(folder: Path) -> None:
    """Raise `UserError`, on all processes, unless each sees in `folder` what the first one writes there.

    All must call it at the same place. A machine with a folder of its own by that name would write its part
    where nobody finds it, or train from another state than the others. Nothing stays in the folder; where
    the first process can write nothing there, nobody is asked.
    """
    import torch

    here = state()
    if here.num_processes == 1:
        return
    everyone: list[Any] = [None] * here.num_processes
    with signed(folder) if here.is_main_process else contextlib.nullcontext() as name:
        names = [name]
        torch.distributed.broadcast_object_list(names)
        seen = names[0] is None or _appears(folder / names[0])
        torch.distributed.all_gather_object(everyone, (seen, platform.node()))
    blind = [(rank, node) for rank, (sees, node) in enumerate(everyone) if not sees]
    if blind:
        rank, node = blind[0]
        raise UserError(
            f"{folder} is not one folder for all: process {rank} on {node} does not see what process 0 on "
            f"{everyone[0][1]} writes there; give a folder that all machines share, by the same path, or for "
            "the data.cache of a stream an address, as s3://bucket/cache"
        )


def require_same(facts: Mapping[str, object]) -> None:
    """Raise `UserError`, on all processes, unless `facts`, by name, are those of the first one on each.

    All must call it at the same place. Machines may have their own copies of base and pictures, and of the
    config; where these differ each would train or encode something else, in silence.
    """
    import torch

    if (world := state().num_processes) == 1:
        return
    everyone: list[Any] = [None] * world
    torch.distributed.all_gather_object(everyone, (dict(facts), platform.node()))
    first, place = everyone[0]
    for rank, (found, node) in enumerate(everyone):
        if wrong := [name for name in {**first, **found} if first.get(name) != found.get(name)]:
            raise UserError(
                f"process {rank} on {node} has another {wrong[0]} than process 0 on {place}; start all with "
                "the same config, the same base and the same pictures"
            )


def _appears(file: Path) -> bool:
    """Whether `file` is there, now or soon: file systems of several machines may take a moment."""
    until = time.monotonic() + _LATE
    while not file.exists():
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True


def largest(value: int) -> int:
    """The largest `value` of all processes, which all must ask for at the same place.

    Told from host to host: through the GPUs each would first wait for all that it was given to compute. Each
    step asks, so it is here that the death of another process is noticed: `UserError`.
    """
    import torch

    told, most = torch.tensor([value]), torch.distributed.ReduceOp.MAX
    try:
        torch.distributed.all_reduce(told, most, _hosts(torch.distributed.group.WORLD))
    except RuntimeError as error:
        if "gloo/transport" not in str(error):
            raise
        raise UserError(
            "another process of this run has ended, and so does this one; what it said is in its own output; "
            "the same command continues from the last state that was saved"
        ) from error
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
