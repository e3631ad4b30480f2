"""Whether the other machines are still there, where a run has several.

A process that dies closes its connections, and who waits for it is told at once. A machine that loses its
power or its network closes none: what the others wait for would be waited for until `processes.PATIENCE`
ends, which is long, since one process may draw alone for hours. So each says every `BEAT` seconds that it is
alive, in the store through which they met, and listens to the next one: in a ring, so that it costs the same
however many they are. Who hears nothing for `SILENCE` seconds ends, and with it, connection by connection,
all others; torchrun starts them again where it may (`--max-restarts`), from the last state.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import secrets
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any

from lcm_kit import console
from lcm_kit.share import started_together

BEAT, SILENCE = 10.0, 300.0  # seconds
_LEFT = 1 << 40  # more beats than anybody lives: it has ended as it should


@dataclass
class Listener:
    """One process of the ring: its own beats and what it has heard of the next one."""

    store: Any  # `add(key, n)` -> the sum, as torch's TCPStore
    rank: int
    world: int
    life: str = ""  # of all of them together: a store may outlive processes that are started again
    heard: int = -1  # beats of the next one
    silent: int = 0  # turns in which there was none
    over: bool = False  # nobody is left to listen to

    def exchange(self) -> None:
        """Beat, and hear whether the next one did."""
        self.store.add(self._key(self.rank), 1)
        beats = self.store.add(self._key((self.rank + 1) % self.world), 0)
        if beats >= _LEFT:
            self.over = True
        if beats != self.heard:
            self.heard, self.silent = beats, 0

    def is_lost(self) -> bool:
        """Whether the next one has been silent for too long. To be asked once in `BEAT` seconds.

        Turns are counted, not seconds: a process that was itself put to sleep has heard nobody.
        """
        self.silent += 1
        return not self.over and self.silent > SILENCE / BEAT

    def leave(self) -> None:
        """Say that this process ends as it should; the others may still have work to do."""
        with contextlib.suppress(RuntimeError):  # the store may have ended before
            self.store.add(self._key(self.rank), _LEFT)

    def _key(self, rank: int) -> str:
        return f"lcm-kit/alive/{self.life}/{rank}"


@cache
def listen() -> None:
    """From now on end this process where another machine is lost. Does nothing where all are on one.

    To be called by all processes at the same place, when they have met.
    """
    world = started_together()
    if world == int(os.environ.get("LOCAL_WORLD_SIZE", world)) or "MASTER_ADDR" not in os.environ:
        return
    from torch.distributed import TCPStore, broadcast_object_list

    life = [secrets.token_hex(4)]
    broadcast_object_list(life)
    store = TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, wait_for_workers=False,
        timeout=timedelta(seconds=SILENCE),
    )  # fmt: skip
    listener = Listener(store, int(os.environ["RANK"]), world, life[0])
    atexit.register(listener.leave)
    for task in (_exchange, _judge):
        threading.Thread(target=task, args=(listener,), daemon=True, name=f"peers{task.__name__}").start()


def _exchange(listener: Listener) -> None:
    while True:
        try:
            listener.exchange()  # may hang, if the store's machine is the one that is lost
        except RuntimeError:  # the store's process has ended, which everybody else notices too
            listener.over = True
            return
        time.sleep(BEAT)


def _judge(listener: Listener) -> None:
    while not listener.is_lost():
        time.sleep(BEAT)
    other = (listener.rank + 1) % listener.world
    console.say(
        f"error: process {other} of this run, on another machine, has not been heard of for {SILENCE:.0f} s; "
        f"process {listener.rank} ends; the same command continues from the last state that was saved",
        err=True,
    )
    os._exit(1)  # the main thread waits within a library, for the machine that is lost
