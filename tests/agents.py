"""Two of torchrun's agents on this machine: what two machines run, each with its one process."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from tests.recipes.small import environment

# How soon an agent that is gone is missed, in seconds; torchrun's own are 5 times 3, and 30
HASTE = "keep_alive_interval=1,keep_alive_max_attempt=3,last_call_timeout=1"


class Agents:
    """Agents that meet at one port; the first holds what they meet by, as the head of a cluster does."""

    def __init__(self, folder: Path, program: Sequence[object]) -> None:
        self.folder, self.program = folder, [*map(str, program)]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.started: list[subprocess.Popen[bytes]] = []
        self.orphans: list[psutil.Process] = []

    def launcher(self, head: bool) -> list[str]:
        """The module that starts processes, with its options. The head has the larger address: rank 1."""
        return [
            "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--max-restarts=3",
            "--monitor-interval=0.2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{self.port}",
            f"--rdzv-conf={HASTE},is_host={int(head)}", f"--local-addr=127.0.0.{2 if head else 1}",
        ]  # fmt: skip

    def start(self, head: bool, **variables: str) -> subprocess.Popen[bytes]:
        """Start another agent; its output lies in `folder`."""
        command = [sys.executable, "-m", *self.launcher(head)]
        with (self.folder / f"agent-{len(self.started)}.log").open("wb") as log:
            agent = subprocess.Popen(
                [*command, *self.program],
                env={**environment(1), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", **variables},
                stdout=log, stderr=log,
            )  # fmt: skip
        self.started.append(agent)
        return agent

    def said(self) -> str:
        """What all of them and their processes have printed."""
        logs = sorted(self.folder.glob("agent-*.log"))
        return "\n".join(f"-- {log.name}\n{log.read_text(errors='replace')}" for log in logs)

    def until(self, there: Callable[[], bool], seconds: float = 200) -> None:
        """Wait for what they bring about; fail with what they said where all end before."""
        end = time.monotonic() + seconds
        while not there():
            ended = all(agent.poll() is not None for agent in self.started)
            assert not ended and time.monotonic() < end, self.said()[-6000:]
            time.sleep(0.05)

    def run(self) -> None:
        """Start both and wait until they have ended; fail with what they said unless both ended well."""
        started = [self.start(head) for head in (True, False)]
        self.until(lambda: all(agent.poll() is not None for agent in started))
        assert [agent.returncode for agent in started] == [0, 0], self.said()[-6000:]

    def kill(self, agent: subprocess.Popen[bytes], *, alone: bool = False) -> None:
        """End an agent and its processes at once, as when a machine breaks down; `alone`: only itself."""
        processes = below(agent)
        agent.kill()
        agent.wait()
        self.orphans += processes
        if not alone:
            self.end()

    def end(self) -> None:
        """End what agents that were killed have left."""
        for process in self.orphans:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.orphans.clear()


class Accelerated(Agents):
    """The same by `accelerate launch`, whose machines are numbered: the head is 0."""

    def launcher(self, head: bool) -> list[str]:
        return [
            "accelerate.commands.launch", "--multi_gpu", "--num_machines=2", "--num_processes=2",
            f"--machine_rank={int(not head)}", "--main_process_ip=127.0.0.1",
            f"--main_process_port={self.port}",
        ]  # fmt: skip


@contextmanager
def agents(folder: Path, program: Sequence[object], kind: type[Agents] = Agents) -> Iterator[Agents]:
    """`Agents` whose logs lie in `folder`; none of them, nor any process of theirs, outlives the block."""
    made = kind(folder, program)
    try:
        yield made
    finally:
        for agent in made.started:
            made.kill(agent)
        made.end()


def freeze(agent: subprocess.Popen[bytes]) -> None:
    """Stop an agent and its processes as when a machine vanishes: nothing of it answers, or hangs up."""
    for process in [psutil.Process(agent.pid), *below(agent)]:
        process.suspend()


def below(agent: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The processes of an agent, if it lives."""
    return psutil.Process(agent.pid).children(recursive=True) if agent.poll() is None else []
