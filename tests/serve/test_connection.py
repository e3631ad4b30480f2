"""Connections over a real socket: who says or reads nothing is closed, and everyone gets the sentence."""

from __future__ import annotations

import io
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import uvicorn

import lcm_kit
from lcm_kit.errors import UserError
from lcm_kit.serve import connection, run
from lcm_kit.serve.adapters import Served
from lcm_kit.serve.limits import Limits
from tests.serve.small import PATIENCE, application, going, wait_for

MANY = 2**24  # bytes that no buffer of a kernel takes


@contextmanager
def listening(app: Any) -> Iterator[tuple[uvicorn.Server, int]]:
    """An ASGI application with the connections of `lcm-kit serve`."""
    with socket.create_server(("127.0.0.1", 0)) as place:
        server = uvicorn.Server(uvicorn.Config(app, **run._settings()))
        thread = threading.Thread(target=server.run, args=([place],))
        thread.start()
        try:
            wait_for(lambda: server.started, "it listens")
            yield server, place.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(PATIENCE)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections that are given up soon."""
    for name, seconds in (("_HEAD", 0.2), ("_READ", 0.2), ("_LOOKS", 0.02)):
        monkeypatch.setattr(connection, name, seconds)


def connected(port: int) -> socket.socket:
    line = socket.socket()
    line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    line.settimeout(PATIENCE)
    line.connect(("127.0.0.1", port))
    return line


def ended(line: socket.socket) -> bytes:
    """All that comes until it is closed."""
    found = b""
    try:
        while part := line.recv(65536):
            found += part
    except ConnectionResetError:
        pass
    return found


async def much(scope: Any, receive: Any, send: Any) -> None:
    """Answers a lot."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % MANY)]})
    for _ in range(MANY // 2**16):
        await send({"type": "http.response.body", "body": b"a" * 2**16, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


@pytest.mark.parametrize(
    "said",
    [b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: a\r\nX-A",
     b"GET / HTTP/1.1\r\nHost: a\r\n\r\nGET / HTTP/1.1\r\n"],
)  # fmt: skip
def test_who_does_not_say_what_is_wanted_is_closed(quick: None, tiny: Served, said: bytes) -> None:
    """Before a first request, and before a second one."""
    with application(tiny, going()) as app, listening(app.asgi) as (server, port), connected(port) as line:
        line.sendall(said)
        found = ended(line)
        assert found.count(b"HTTP/1.1 ") == said.count(b"\r\n\r\n")
        wait_for(lambda: not server.server_state.connections, "it is gone")


@pytest.mark.parametrize("whole", [False, True])
def test_who_does_not_read_is_closed(quick: None, whole: bool) -> None:
    """In the middle of an answer, and where all of it is written and the connection is to be closed."""

    async def at_once(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"a" * MANY})

    with listening(at_once if whole else much) as (server, port), connected(port) as line:
        line.sendall(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        wait_for(lambda: server.server_state.total_requests or server.server_state.tasks, "it is answered")
        wait_for(lambda: not server.server_state.connections, "it is gone")
        wait_for(lambda: not server.server_state.tasks, "nothing waits for it")
        assert len(ended(line)) < MANY


def test_who_reads_slowly_gets_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A look at each pause finds that something went on since the last one."""
    monkeypatch.setattr(connection, "_LOOKS", 0.0)
    monkeypatch.setattr(connection, "_READ", 5.0)
    with listening(much) as (_, port), connected(port) as line:
        line.sendall(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        assert ended(line).count(b"a") >= MANY


def test_silent_clients_take_no_place_of_others(monkeypatch: pytest.MonkeyPatch, tiny: Served) -> None:
    """The longest idle goes where all places are taken."""
    for where in (connection, run):
        monkeypatch.setattr(where, "MOST", 8)
    monkeypatch.setattr(connection, "_HEAD", 10.0 * PATIENCE)
    with application(tiny, going()) as app, listening(app.asgi) as (server, port):
        lines = [connected(port) for _ in range(30)]
        try:
            client = lcm_kit.Client(f"http://127.0.0.1:{port}")
            assert [client.info()["state"] for _ in range(20)] == ["ready"] * 20
            wait_for(lambda: len(server.server_state.connections) <= 8, "room")
            assert ended(lines[0]) == b""
        finally:
            for line in lines:
                line.close()


def asked(port: int, path: str, size: int, *headers: str) -> bytes:
    """The answer to a request whose body is sent whole before anything is read."""
    head = [
        f"POST {path} HTTP/1.1",
        f"Host: 127.0.0.1:{port}",
        "Connection: close",
        f"Content-Length: {size}",
    ]
    with connected(port) as line:
        line.sendall("\r\n".join([*head, *headers, "\r\n"]).encode())
        for _ in range(0, size, 2**20):
            line.sendall(b" " * 2**20)
        return ended(line)


JSON = "Content-Type: application/json"


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [("/v1/edits", [JSON], 413), ("/v1/pictures", [JSON], 413), ("/v1/edits", [], 415), ("/nothing", [], 404),
     ("/v1/info", [JSON], 405), ("/v1/edits", [JSON, "Origin: http://evil.example"], 403)],
)  # fmt: skip
def test_the_sentence_reaches_who_sends_first_and_reads_then(
    tiny: Served, path: str, headers: list[str], status: int
) -> None:
    """A connection that is closed on what it has not read is broken, and what was answered is lost."""
    with application(tiny, going()) as app, listening(app.asgi) as (_, port):
        for _ in range(3):
            head, _, body = asked(port, path, 2**25, *headers).partition(b"\r\n\r\n")
            assert head.split()[1] == str(status).encode() and json.loads(body)["status"] == status


def test_the_client_has_the_sentence_of_a_picture_that_is_too_large(tiny: Served) -> None:
    with application(tiny, going(), Limits(upload=2**20)) as app, listening(app.asgi) as (_, port):
        client = lcm_kit.Client(f"http://127.0.0.1:{port}")
        picture = io.BytesIO(b"\x89PNG\r\n\x1a\n" + b"a" * 2**23)
        with pytest.raises(UserError, match="^the body of this request is larger than 1,048,576 bytes$"):
            client._json("/v1/edits", {"task": "vary", "picture": picture.getvalue().decode("latin-1")})


def test_a_body_that_nobody_wants_is_not_waited_for_without_end(
    tiny: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lcm_kit.serve.watched._REST", 0.05)
    with application(tiny, going()) as app, listening(app.asgi) as (_, port), connected(port) as line:
        head = f"POST /nothing HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {2**30}\r\nConnection: close"
        line.sendall(f"{head}\r\n\r\n".encode())
        assert ended(line).startswith(b"HTTP/1.1 404 ")


def test_who_is_still_being_read_when_the_server_ends_is_told_so(
    tiny: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "_ANSWERS", 0)
    with application(tiny, going()) as app, listening(app.asgi) as (server, port), connected(port) as line:
        head = f"POST /v1/pictures HTTP/1.1\r\nHost: 127.0.0.1\r\n{JSON}\r\nContent-Length: 100\r\n\r\n{{"
        line.sendall(head.encode())
        wait_for(lambda: server.server_state.tasks, "it is read")
        server.should_exit = True
        said, _, body = ended(line).partition(b"\r\n\r\n")
        assert said.startswith(b"HTTP/1.1 503 ") and b"retry-after" in said.lower()
        assert json.loads(body)["detail"].startswith("this server was stopped before")
        wait_for(lambda: 'status="503"' in app.metrics.text().decode(), "it is counted")
    assert "failure" not in capsys.readouterr().err


def test_nothing_else_is_spoken(tiny: Served) -> None:
    """Whoever asks for a WebSocket, or for HTTP/2, is answered as if it had not."""
    told: Callable[[str], str] = lambda kind: (  # noqa: E731
        f"GET /v1/pictures HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: Upgrade, close\r\nUpgrade: {kind}\r\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    with application(tiny, going()) as app, listening(app.asgi) as (_, port):
        for kind in ("websocket", "h2c"):
            with connected(port) as line:
                line.sendall(told(kind).encode())
                assert ended(line).startswith(b"HTTP/1.1 405 "), kind
