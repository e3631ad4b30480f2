"""The process of a server: a socket, uvicorn, and how it stops.

SIGTERM and Ctrl+C: what was taken is finished, new requests get 503, and after a bounded time the process
ends with code 0. A second one ends it at once.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import uvicorn

from lcm_kit.config.schema import Base
from lcm_kit.drawing.how import How
from lcm_kit.errors import UserError, first_line
from lcm_kit.serve.adapters import Served
from lcm_kit.serve.connection import MOST, Connection
from lcm_kit.serve.drawer import Drawer
from lcm_kit.serve.engine import Batch, Engine
from lcm_kit.serve.gate import LOCAL, Gate, Rate, Tokens, is_local
from lcm_kit.serve.limits import Limits
from lcm_kit.serve.log import Log, Uvicorn
from lcm_kit.serve.metrics import Metrics
from lcm_kit.serve.parts import Parts
from lcm_kit.serve.routes import application
from lcm_kit.serve.store import Store
from lcm_kit.serve.watched import Watched

_ANSWERS = 5  # seconds for the last answers to go out


@dataclass(frozen=True)
class Place:
    """Where a server listens, and who may come."""

    host: str = "127.0.0.1"
    port: int = 8000  # 0: any that is free
    token_file: Path | None = None
    allowed_hosts: tuple[str, ...] = ()  # besides its own

    def tokens(self) -> Tokens | None:
        """Raises `UserError` as `Tokens.of`, and where one is needed and there is none."""
        if self.token_file is not None:
            return Tokens.of(self.token_file)
        if not is_local(self.host):
            raise UserError(
                f"--host {self.host} can be reached from other machines, where everybody could draw; give "
                "--token-file FILE with a token a line, or leave out --host"
            )
        return None

    def hosts(self) -> frozenset[str]:
        """Those that a request may name; of a server for other machines, which a token guards, any."""
        own = (*LOCAL, self.host) if is_local(self.host) else ()
        return frozenset(name.lower() for name in (*own, *self.allowed_hosts))

    def listening(self) -> socket.socket:
        """The socket. Raises `UserError` if there is none to be had."""
        kind = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        try:
            found = socket.create_server((self.host, self.port), family=kind, backlog=256)
        except (OSError, OverflowError) as error:
            raise UserError(
                f"cannot listen at {self.host} port {self.port} ({first_line(error)}); give another --port "
                "or --host"
            ) from error
        # its connections have it too: asyncio asks for it where a socket's protocol is told, which is not so
        # here, and without it an answer's second packet waits for the first one's receipt, 40 ms
        found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return found


@dataclass(frozen=True)
class Drawn:
    """What draws: as `sample_images` has these settings."""

    device: str | None = None
    dtype: torch.dtype | None = None
    decoder: str | None = None
    tiling: bool = False


@dataclass(frozen=True)
class Kept:
    """Where pictures and votes are kept; without a folder nowhere."""

    folder: Path | None = None
    pictures: int = 1000  # at most

    def store(self) -> AbstractContextManager[Store | None]:
        """The store, or None. Raises `UserError` as `Store.opened`."""
        return nullcontext() if self.folder is None else Store.opened(self.folder, self.pictures)


@dataclass
class App:
    """A server without its process: `asgi` is the whole application, `engine` is yet to be started."""

    served: Served
    drawer: Drawer
    limits: Limits
    place: Place
    log: Log
    store: Store | None = None
    engine: Engine = field(init=False)
    gate: Gate = field(init=False)
    asgi: Watched = field(init=False)
    metrics: Metrics = field(init=False)

    def __post_init__(self) -> None:  # noqa: D105
        tokens = self.place.tokens()
        self.engine = Engine(self.drawer, self.limits, self._told)
        self.metrics = Metrics(lambda: self.engine.waiting, lambda: self.engine.state == "ready")
        parts = Parts(
            self.served, self.engine, self.limits, self.log, self.metrics, tokens is not None,
            self.drawer.how, self.store,
        )  # fmt: skip
        self.gate = Gate(
            application(parts), tokens, self.place.hosts(), Rate(self.limits.rate),
            most=self.limits.queue + self.limits.batch,
        )  # fmt: skip
        self.asgi = Watched(self.gate, self.log, self.metrics)

    def _told(self, batch: Batch) -> None:
        self.metrics.batch(batch)
        self.log.say("batch", pictures=batch.size, seconds=round(batch.seconds, 4), outcome=batch.outcome)


class Server(uvicorn.Server):
    """uvicorn's, which finishes what was taken before it closes."""

    def __init__(self, config: uvicorn.Config, app: App) -> None:  # noqa: D107
        super().__init__(config)
        self._app, self._told_ready = app, False
        self._until: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to stop; stop at once where that has begun."""
        self._until = time.monotonic() + self._app.limits.grace if self._until is None else 0.0

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second."""
        engine, log = self._app.engine, self._app.log
        if not self._told_ready and engine.state == "ready":
            self._told_ready = True
            drawer = self._app.drawer
            log.say("ready", device=drawer.place, instead_of_gpu=drawer.fell_back)
        if engine.failure is not None:
            self.should_exit = True
        elif self._until is not None and not self.should_exit:
            if engine.state in ("loading", "ready"):
                engine.drain()
                log.say("stopping", waiting=engine.waiting)
            if engine.idle or time.monotonic() >= self._until:
                await asyncio.to_thread(engine.halt)
                self.should_exit = True
        return await super().on_tick(counter)


def serve(
    base: Base,
    adapters: list[str],
    place: Place,
    limits: Limits,
    drawn: Drawn,
    kept: Kept,
    *,
    log_prompts: bool = False,
) -> None:
    """Serve pictures until told to stop. Raises `UserError` for what cannot be served, before it listens."""
    for name in ("count", "frames"):
        if (most := getattr(limits, name)) > limits.queue:
            raise UserError(
                f"--max-{name} {most} pictures of a request do not fit into a --queue of {limits.queue}"
            )
    place.tokens()  # what costs nothing to check goes first
    log = Log(log_prompts)
    with kept.store() as store:
        served = Served.of(base, adapters)
        how = How.of(served.base, drawn.decoder, drawn.tiling, False)
        drawer = Drawer(served, limits.batch, drawn.device, drawn.dtype, how)
        _run(App(served, drawer, limits, place, log, store))


def _run(app: App) -> None:
    log, served = app.log, app.served
    with app.place.listening() as listening:
        host, port = listening.getsockname()[:2]
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        log.say("listening", url=url, base=served.base.path, adapters=[each.name for each in served.adapters])
        _quiet_uvicorn(log)
        app.engine.start()
        Server(uvicorn.Config(app.asgi, **_settings()), app).run([listening])
    if app.engine.failure is not None:
        raise app.engine.failure
    log.say("stopped")


def _settings() -> dict[str, Any]:
    """Of uvicorn: nothing of its own is printed, no header of a proxy is believed, nothing else spoken."""
    return {
        "log_config": None, "access_log": False, "proxy_headers": False, "server_header": False,
        "lifespan": "off", "timeout_graceful_shutdown": _ANSWERS, "limit_concurrency": MOST,
        "http": Connection, "ws": "none",
    }  # fmt: skip


def _quiet_uvicorn(log: Log) -> None:
    for name in ("uvicorn", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = ([Uvicorn(log)] if name == "uvicorn" else []), name != "uvicorn"
        logger.setLevel(logging.INFO)
