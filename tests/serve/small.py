"""Servers for tests: a drawer that needs no model, applications without a network, and real processes."""

from __future__ import annotations

import asyncio
import json
import os
import queue
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from lcm_kit.config.schema import Base
from lcm_kit.drawing.batches import AfterStep
from lcm_kit.drawing.how import PLAIN, How
from lcm_kit.serve.adapters import Served
from lcm_kit.serve.asked import EditKey, Key, Order, Wanted, settled
from lcm_kit.serve.drawer import Drawer, Piece
from lcm_kit.serve.engine import Engine
from lcm_kit.serve.limits import Limits
from lcm_kit.serve.log import Log
from lcm_kit.serve.problems import MEDIA
from lcm_kit.serve.run import App, Kept, Place
from tests.recipes.small import environment

PATIENCE = 120  # seconds after which a test has failed, however slow the machine
ADAPTER = "asset:tiny-lcm-lora"
USUAL = Limits()


@dataclass
class FakeDrawer:
    """Draws a colour for each (seed, number), a step at a time, when `may_go` is set."""

    size: int = 8
    may_go: threading.Event = field(default_factory=threading.Event)
    one: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    began: queue.Queue[list[Piece]] = field(default_factory=queue.Queue)
    batches: list[tuple[Key | EditKey, list[Piece]]] = field(default_factory=list)
    error: Exception | None = None
    place: str = "nowhere"
    fell_back: None = None
    how: How = PLAIN

    def open(self) -> None:
        pass

    def most(self, key: Key | EditKey) -> int:
        return self.size

    def let_one_go(self) -> None:
        """The batch that is being drawn, and no other."""
        self.one.release()

    def draw(self, key: Key | EditKey, pieces: Sequence[Piece], after_step: AfterStep) -> list[Image.Image]:
        self.batches.append((key, list(pieces)))
        self.began.put(list(pieces))
        while not self.may_go.wait(0.001) and not self.one.acquire(blocking=False):
            after_step([], 0, key.steps)
        for step in range(key.steps):
            after_step(range(len(pieces)), step + 1, key.steps)
        if self.error is not None:
            raise self.error
        return [colour(each.seed, each.number) for each in pieces]


def going() -> FakeDrawer:
    """One that waits for nothing."""
    drawer = FakeDrawer()
    drawer.may_go.set()
    return drawer


def colour(seed: int, number: int) -> Image.Image:
    return Image.new("RGB", (8, 8), (seed % 256, number, 7))


def served(base: str = "asset:tiny-sd", adapters: Sequence[str] = (ADAPTER,)) -> Served:
    return Served.of(Base(path=base), adapters)


def order(what: Served, limits: Limits = USUAL, **asked: Any) -> Order:
    return settled(Wanted(**{"prompt": "a red circle", **asked}), what, limits)


def wait_for(ready: Callable[[], Any], what: str) -> None:
    """Until it is so; `PATIENCE` bounds it, and no test hangs on how long it took."""
    for _ in range(PATIENCE * 100):
        if ready():
            return
        threading.Event().wait(0.01)
    raise AssertionError(f"never: {what}")


@contextmanager
def running(engine: Engine) -> Iterator[Engine]:
    """An engine that has loaded, and is stopped afterwards."""
    engine.start()
    try:
        wait_for(lambda: engine.state != "loading", "loaded")
        yield engine
    finally:
        engine.halt()


@contextmanager
def application(
    what: Served,
    drawer: Drawer | FakeDrawer | None = None,
    limits: Limits = USUAL,
    *,
    tokens: Path | None = None,
    prompts: bool = False,
    hosts: tuple[str, ...] = (),
    data: Path | None = None,
    history: int = 1000,
) -> Iterator[App]:
    """A whole application whose engine runs."""
    chosen = drawer or Drawer(what, limits.batch)
    place = Place(token_file=tokens, allowed_hosts=hosts)
    with Kept(data, history).store() as store:
        app = App(what, chosen, limits, place, Log(prompts), store)  # type: ignore[arg-type]
        with running(app.engine):
            yield app


def ask(app: App, *requests: dict[str, Any], together: bool = False) -> list[httpx.Response]:
    """Answers to requests (httpx's keywords; a POST of `json` to /v1/pictures by default)."""

    async def all_of_them() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app.asgi, raise_app_exceptions=False, client=("127.0.0.1", 5000))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:

            async def one(request: dict[str, Any]) -> httpx.Response:
                known = {"method": "POST", "url": "/v1/pictures", "timeout": PATIENCE}
                return await client.request(**{**known, **request})

            if together:
                return list(await asyncio.gather(*map(one, requests)))
            return [await one(request) for request in requests]

    return asyncio.run(all_of_them())


def scope_of(kind: str, method: str, path: str, headers: Sequence[tuple[bytes, bytes]]) -> dict[str, Any]:
    """ASGI's of a request to 127.0.0.1, for what no client library sends."""
    return {
        "type": kind, "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "path": path,
        "raw_path": path.encode(), "query_string": b"", "root_path": "", "scheme": "http",
        "headers": [(b"host", b"127.0.0.1"), *headers], "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }  # fmt: skip


def get(app: App, path: str, **more: Any) -> httpx.Response:
    return ask(app, {"method": "GET", "url": path, **more})[0]


def draw(app: App, **asked: Any) -> httpx.Response:
    return ask(app, {"json": {"prompt": "a red circle", **asked}})[0]


def detail(answer: httpx.Response, status: int = 422) -> str:
    """The sentence of a problem, which is one in all of its parts."""
    assert answer.status_code == status and answer.headers["content-type"] == MEDIA, answer.text
    found = answer.json()
    assert found["status"] == status and found["type"] == "about:blank" and found["title"]
    assert found["request"] == answer.headers["x-request-id"]
    return str(found["detail"])


def events(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Of a whole stream: the name and the data of each, without the lines that say nothing."""
    assert not text or text.endswith("\n\n"), text[-200:]
    found = []
    for block in text.split("\n\n")[:-1]:
        if block.startswith(":"):
            continue
        name, data = block.split("\n")
        assert name.startswith("event: ") and data.startswith("data: ")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


def logged(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    """The requests in the log since it was last read."""
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    return [line for line in lines if line["event"] == "request"]


def figure(text: str, name: str) -> float:
    """Of a page of metrics; 0 where it is not there yet."""
    return next(
        (float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name + " ")), 0.0
    )


def command(*options: str) -> list[str]:
    """That serves the embedded base."""
    return [sys.executable, "-m", "lcm_kit", "serve", "--base", "asset:tiny-sd", *options]


@dataclass
class Process:
    """A server in a process of its own, which has said that it listens."""

    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)
    url: str = ""

    @classmethod
    def start(cls, *options: str) -> Process:
        env = {**environment(1), "HF_HUB_OFFLINE": "1"}
        pipes: dict[str, Any] = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL, "text": True}
        found = cls(subprocess.Popen(command("--port", "0", *options), env=env, **pipes))
        threading.Thread(target=found._read, daemon=True).start()
        wait_for(lambda: found.event("ready") or found.process.poll() is not None, "ready")
        found.url = (found.event("listening") or {})["url"]
        return found

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)

    def event(self, name: str) -> dict[str, Any] | None:
        events = (json.loads(line) for line in list(self.lines) if line.startswith("{"))
        return next((event for event in events if event["event"] == name), None)

    def answer(self, path: str, body: Any = None, **headers: str) -> tuple[int, str]:
        content = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", **headers}
        request = urllib.request.Request(self.url + path, content, headers)
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as found:
                return found.status, found.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def figure(self, name: str) -> float:
        return figure(self.answer("/metrics")[1], name)

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def ended(self) -> int:
        return self.process.wait(PATIENCE)

    def end(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE)
