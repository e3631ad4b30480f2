"""Encoding on a Ray cluster: each worker makes the parts of some shards of a stream (`ray_worker.py`).

The driver, which is this process, finds out what is missing, hands it out by Ray Data a shard at a time, and
writes the list when all has come. It sends a config and names, no code and no pictures.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import signal
import socket
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from lcm_kit import __version__, console
from lcm_kit.config.load import dump
from lcm_kit.config.schema import Training
from lcm_kit.data import vae_precision
from lcm_kit.data.ray_tries import Tries
from lcm_kit.data.ray_worker import Job, Worker, tried_precision
from lcm_kit.data.stream_images import folder_of
from lcm_kit.data.streams import SourceShard, identities
from lcm_kit.errors import UserError, first_line
from lcm_kit.io.files import signed
from lcm_kit.share import started_together

_PATIENCE = 20  # seconds that a cluster has to answer in


@dataclass
class RayEngine:
    """The workers of a cluster, as a context: connected when they are first needed, until its end.

    `address` and what is None is as Ray has it: `RAY_ADDRESS`, a cluster that runs on this machine, or one
    that is started here for as long as it takes. A program that is connected already keeps its connection.
    Raises `UserError` where it cannot work.
    """

    address: str | None = None
    workers: int | None = None  # None: all that fit
    gpus: float | None = None  # of a worker; None: one, where the cluster has any
    _ray: Any = None
    _end: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    _said: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:  # noqa: D105
        if self.workers is not None and self.workers < 1:
            raise UserError(f"workers {self.workers} is out of range; give 1 or more")
        if self.gpus is not None and not 0 <= self.gpus <= 64:
            raise UserError(f"gpus {self.gpus} is out of range; give a number from 0 to 64")
        if started_together() > 1:
            raise UserError(
                "engine ray has workers of its own, and this is one process of several (WORLD_SIZE is "
                f"{started_together()}); start it without torchrun or accelerate, or leave --engine out"
            )
        if importlib.util.find_spec("ray") is None:
            raise UserError("engine ray needs the package ray; install it with `pip install 'lcm-kit[ray]'`")

    def __enter__(self) -> RayEngine:  # noqa: D105
        return self

    def __exit__(  # noqa: D105
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._ray = None
        self._end.close()

    def precision(self, config: Training) -> str:
        """As `stream_images.Elsewhere`: the VAE's, as one worker finds it for all."""
        ray, gpus = self._connected(), self._gpus_each()
        if not gpus:
            return vae_precision.FULL
        with self._mark(config) as mark, _errors(ray):
            task = ray.remote(num_cpus=1, num_gpus=gpus)(tried_precision)
            told = ray.get(task.remote(Job(dump(config), os.getcwd(), mark)))
        return str(self._heard(told)["value"])

    def make(
        self,
        config: Training,
        sources: Sequence[SourceShard],
        settings: Mapping[str, Any],
        advance: Callable[[], None],
    ) -> None:
        """As `stream_images.Elsewhere`."""
        ray, gpus = self._connected(), self._gpus_each()
        workers = min(self._room(gpus), len(sources))
        by_node: Counter[str] = Counter()
        rows = [{"source": name, "identity": identity} for name, identity in identities(config.data, sources)]
        with self._mark(config) as mark, _errors(ray), _quiet_data():
            job = Job(dump(config), os.getcwd(), mark, settings, _tries(ray))
            made = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
                Worker, fn_constructor_args=(job,), batch_size=1, num_cpus=1, num_gpus=gpus or None,
                # one at a time: a shard takes minutes, and what waits at one worker no other takes
                compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=1),
            )  # fmt: skip
            for batch in made.iter_batches(batch_size=1, prefetch_batches=0):
                by_node[self._heard(str(batch["answer"][0]))["node"]] += 1
                advance()
        counts = ", ".join(str(count) for _, count in by_node.most_common())
        console.say(f"Ray workers: {workers}; shards that each node made: {counts}")

    def _connected(self) -> Any:
        if self._ray is not None:
            return self._ray
        import ray

        if ray.is_initialized():
            if self.address is not None:
                raise UserError(
                    f"address {self.address!r}: this program is connected to a Ray cluster already; leave "
                    "the address out, or call ray.shutdown() before"
                )
        else:
            self._connect(ray)
        _require_kit(ray)
        self._ray = ray
        return ray

    def _connect(self, ray: Any) -> None:
        address = self.address or os.environ.get("RAY_ADDRESS") or ""
        if address.startswith("ray://"):
            raise UserError(
                f"Ray address {address!r} is for Ray's client, through which Ray Data does not work; run "
                "this on a machine of the cluster, as with `ray job submit`"
            )
        before = signal.getsignal(signal.SIGTERM)
        try:
            _require_answer(address)
            with _environment(RAY_USAGE_STATS_ENABLED="0", RAY_BACKEND_LOG_LEVEL="fatal"), _no_stderr():
                ray.init(
                    self.address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR
                )
        except (OSError, RuntimeError, ValueError) as error:
            raise UserError(
                f"Ray cluster {address or 'of this machine'} cannot be used ({first_line(error)}); check the "
                "address (--address, RAY_ADDRESS) and that it runs, with `ray status`"
            ) from error
        self._end.callback(ray.shutdown)
        self._end.enter_context(_ended_by_sigterm(before))

    def _gpus_each(self) -> float:
        if self.gpus is not None:
            return self.gpus
        return 1.0 if self._ray.cluster_resources().get("GPU", 0) else 0.0

    def _room(self, gpus: float) -> int:
        """Workers to start: as many as are asked for, or fit. Raises `UserError` where not one fits."""
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        fit = sum(
            int(min(node.get("CPU", 0), node.get("GPU", 0) / gpus if gpus else node.get("CPU", 0)))
            for node in nodes
        )
        if not fit:
            needs = f"1 CPU, {gpus:g} GPU" if gpus else "1 CPU"
            raise UserError(
                f"no node of the Ray cluster has room for a worker ({needs}); "
                "start nodes with more, or give gpus 0 to encode on CPUs"
            )
        free = self._ray.available_resources()
        if free.get("CPU", 0) < 1 or free.get("GPU", 0) < gpus:
            console.say("the Ray cluster is busy; waiting until a worker has room", err=True)
        return self.workers or fit

    @contextlib.contextmanager
    def _mark(self, config: Training) -> Iterator[str]:
        """A file in the cache by which workers know that they see the same one."""
        folder = folder_of(config.data)
        if not folder.is_remote:
            with signed(Path(folder.place)) as found:
                if found is None:
                    raise UserError(f"data.cache {folder.shown} cannot be written here; give another folder")
                yield found
            return
        name = f".ray-{uuid.uuid4().hex}"
        folder.write(name, f"{socket.gethostname()} encodes on a Ray cluster\n")
        try:
            yield name
        finally:
            folder.delete(name)

    def _heard(self, answer: str) -> dict[str, Any]:
        """What a worker answered; what it said is printed, each line once. Raises its `UserError`."""
        told: dict[str, Any] = json.loads(answer)
        for line in told["said"]:
            if line not in self._said:
                self._said.add(line)
                console.say(line, err=True)
        if "error" in told:
            raise UserError(*told["error"])
        return told


def _require_kit(ray: Any) -> None:
    """Raise `UserError` naming a node that has no lcm-kit, or another one."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def version() -> str | None:  # within a function, so that Ray sends it, and not its name
        try:
            import lcm_kit
        except ImportError:
            return None
        return lcm_kit.__version__

    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    there = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in nodes]
    asked = [ray.remote(num_cpus=0, scheduling_strategy=each)(version).remote() for each in there]
    for node, found in zip(nodes, ray.get(asked), strict=True):
        if found != __version__:
            has = "no lcm-kit" if found is None else f"lcm-kit {found}"
            raise UserError(
                f"Ray node {node['NodeManagerHostname']} has {has}, and this is {__version__}; install the "
                "same version with the extra `ray` on every node"
            )


def _tries(ray: Any) -> Any:
    """A `Tries` on this machine, which is there as long as the driver is."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    settings = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1}
    return ray.remote(**settings, scheduling_strategy=here)(Tries).remote()


def _require_answer(address: str) -> None:
    """Raise `OSError` if nobody listens at `address`, HOST:PORT: Ray would go on trying for many minutes."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_PATIENCE).close()


@contextlib.contextmanager
def _errors(ray: Any) -> Iterator[None]:
    """What Ray gives up on, in a sentence; what is a mistake of the kit's own keeps its traceback."""
    try:
        yield
    except ray.exceptions.RayError as error:
        if isinstance(error, ray.exceptions.RayTaskError):
            raise
        raise UserError(
            f"the Ray cluster gave up ({first_line(error)}); what is done is kept, and the same command goes "
            "on with the rest"
        ) from error


@contextlib.contextmanager
def _quiet_data() -> Iterator[None]:
    """Ray Data without its bars, its accounts, and its warning that there are no bars."""
    from ray.data import DataContext

    context, log = DataContext.get_current(), logging.getLogger("ray.data")
    bars, level = context.enable_progress_bars, log.level
    context.enable_progress_bars = False
    log.setLevel(logging.CRITICAL)  # what ends it is raised as well
    try:
        yield
    finally:
        context.enable_progress_bars = bars
        log.setLevel(level)


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Variables that Ray reads when it connects; what the user has set stays."""
    new = {key: value for key, value in values.items() if key not in os.environ}
    os.environ.update(new)
    try:
        yield
    finally:
        for key in new:
            os.environ.pop(key, None)


@contextlib.contextmanager
def _no_stderr() -> Iterator[None]:
    """Without what Ray's C++ side writes to stderr while it connects, whatever its log level."""
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@contextlib.contextmanager
def _ended_by_sigterm(before: Any) -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does, where Ray's handler aborts; then it acts as `before`."""
    main = threading.current_thread() is threading.main_thread()  # no other gets signals

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    if main:
        signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        if main:
            signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
