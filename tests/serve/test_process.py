"""Servers in processes of their own, with uvicorn and a socket: how they begin, and how they end."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

import lcm_kit
from lcm_kit.errors import UserError
from tests.recipes.small import environment
from tests.serve.small import ADAPTER, PATIENCE, Process, command, wait_for

LONG = {"prompt": "a red circle", "steps": 50, "count": 4, "sampler": "ddim"}  # a batch of 1: seconds
SECRET = "zanzibar"
STOPPED = 'lcm_kit_batches_total{outcome="stopped"}'


@pytest.fixture
def server(request: pytest.FixtureRequest) -> Iterator[Process]:
    found = Process.start("--adapter", ADAPTER, *getattr(request, "param", ()))
    yield found
    found.end()


def in_the_background(server: Process, body: Any) -> tuple[threading.Thread, list[tuple[int, str]]]:
    answers: list[tuple[int, str]] = []
    thread = threading.Thread(target=lambda: answers.append(server.answer("/v1/pictures", body)))
    thread.start()
    return thread, answers


@pytest.mark.parametrize("server", [("--batch", "1")], indirect=True)
def test_what_was_taken_is_finished_on_sigterm_and_what_is_new_refused(server: Process) -> None:
    thread, answers = in_the_background(server, LONG)
    wait_for(lambda: server.figure("lcm_kit_queue_pictures") > 0, "it is being drawn")
    server.signal(signal.SIGTERM)
    wait_for(lambda: server.event("stopping"), "stopping")
    status, said = server.answer("/v1/pictures", {"prompt": "a"})
    assert status == 503 and "it is being stopped" in json.loads(said)["detail"]
    assert server.answer("/readyz")[0] == 503 and server.answer("/healthz")[0] == 200
    thread.join(PATIENCE)
    assert answers[0][0] == 200 and len(json.loads(answers[0][1])["pictures"]) == 4
    assert server.ended() == 0
    wait_for(lambda: server.event("stopped"), "stopped")


@pytest.mark.slow
@pytest.mark.parametrize("server", [("--batch", "1", "--grace", "0")], indirect=True)
def test_the_time_to_finish_in_is_bounded(server: Process) -> None:
    thread, answers = in_the_background(server, LONG)
    wait_for(lambda: server.figure("lcm_kit_queue_pictures") > 0, "it is being drawn")
    server.signal(signal.SIGTERM)
    assert server.ended() == 0
    thread.join(PATIENCE)
    assert answers[0][0] == 503 and "stopped before the picture was drawn" in answers[0][1]


@pytest.mark.slow
def test_a_client_that_hangs_up_is_drawn_for_no_further_and_no_prompt_is_logged(server: Process) -> None:
    """By a socket of its own, closed without a word; then pictures for others, and Ctrl+C."""
    place = urlsplit(server.url)
    body = json.dumps({**LONG, "prompt": SECRET}).encode()
    with socket.create_connection((place.hostname, place.port), timeout=PATIENCE) as line:
        head = f"POST /v1/pictures HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Type: application/json\r\n"
        line.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    wait_for(lambda: server.figure(STOPPED) == 1.0, "the batch ends")

    client = lcm_kit.Client(server.url)
    first, second = (client.draw(f"a {SECRET}", seed=7, steps=1, count=2) for _ in range(2))
    assert [each.tobytes() for each in first] == [each.tobytes() for each in second]
    assert [each.size for each in first] == [(64, 64)] * 2 and first[0].tobytes() != first[1].tobytes()
    long = client.draw(
        f"a {SECRET} " + "and another " * 150, steps=1
    )  # which libraries would cut, and say so
    assert long[0].tobytes() != client.draw(f"a {SECRET}", steps=1)[0].tobytes()
    assert client.info()["adapters"][0]["name"] == "tiny-lcm-lora"
    with pytest.raises(UserError, match="^steps 77 is more than this server draws; give 1 to 50$"):
        client.draw(SECRET, steps=77)
    assert server.figure('lcm_kit_requests_total{method="POST",route="/v1/pictures",status="200"}') == 4.0
    assert server.figure('lcm_kit_requests_total{method="POST",route="/v1/pictures",status="499"}') == 1.0

    server.signal(signal.SIGINT)
    assert server.ended() == 0
    wait_for(lambda: server.event("stopped"), "stopped")
    assert SECRET not in "".join(server.lines)
    assert all(line.startswith("{") for line in server.lines), server.lines


def websocket(path: str, token: str | None = None) -> bytes:
    """A handshake."""
    told = "" if token is None else f"Authorization: Bearer {token}\r\n"
    return (
        f"GET {path} HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n{told}"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    ).encode()


def test_raw_requests_that_are_no_http_end_nothing(tmp_path: Path) -> None:
    """Tricks that no client library sends, at a server with a token."""
    (tmp_path / "tokens").write_text("a-token-of-some-length\n")
    server = Process.start("--token-file", str(tmp_path / "tokens"), "--host", "0.0.0.0")
    try:
        port = urlsplit(server.url).port
        tricks = [
            b"GET /healthz/../v1/info HTTP/1.1\r\nHost: a\r\n\r\n",
            b"GET //v1/info HTTP/1.1\r\nHost: a\r\n\r\n",
            b"GET http://a/v1/info HTTP/1.1\r\nHost: a\r\n\r\n", b"GET /v1/info HTTP/9.9\r\nHost: a\r\n\r\n",
            b"GET /healthz%2e%2e%2fv1/info HTTP/1.1\r\nHost: a\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc",
            b"POST /healthz HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
            b"GET /v1/info HTTP/1.1\r\nHost: a\r\n\r\n",
            b"GET /v1/info HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n",
            *map(websocket, ("/", "/healthz", "/v1/pictures", "/v1/edits", "/metrics", "/nothing")),
            # with the token there is none either
            *(websocket(path, "a-token-of-some-length") for path in ("/healthz", "/v1/pictures")),
        ]  # fmt: skip
        for trick in tricks:
            with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as line:
                line.sendall(trick)
                line.shutdown(socket.SHUT_WR)
                answer = b""
                while part := line.recv(65536):
                    answer += part
            assert b'"adapters":' not in answer and b" 101 " not in answer, trick
            said = {b"400", b"401", b"403", b"405"}
            if b"websocket" in trick and trick.split()[1] in (b"/", b"/healthz"):
                said = {b"200"}  # as if no WebSocket had been asked for
            assert not answer or answer.split(b" ")[1] in said, (trick, answer)
        server.url = f"http://127.0.0.1:{port}"
        assert server.answer("/healthz")[0] == 200 and server.answer("/v1/info")[0] == 401
        assert lcm_kit.Client(server.url, "a-token-of-some-length").info()["adapters"] == []
        with pytest.raises(UserError, match="does not know this token"):
            lcm_kit.Client(server.url, "another-token-of-length").info()
    finally:
        server.end()


@pytest.mark.slow  # each loads the library; tests/serve/test_gate.py and test_asked.py hold the sentences
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--host", "0.0.0.0"], "error: --host 0.0.0.0 can be reached from other machines"),
        (["--adapter", "nowhere.safetensors"], "error: adapter 'nowhere.safetensors' is not a run's folder"),
        (["--adapter", f"{ADAPTER}=heavy"], "'heavy' is no weight"),
        (["--max-count", "9", "--queue", "8"], "do not fit into a --queue of 8"),
        (["--seconds", "nan"], "--seconds nan is out of range"),
        (["--port", "70000"], "--port 70000 is out of range"),
        (["--device", "warp"], "error: device 'warp' cannot be used"),
    ],
)  # fmt: skip
def test_what_cannot_be_served_ends_with_a_sentence(options: list[str], said: str) -> None:
    given = command("--port", "0", *options)
    done = subprocess.run(given, capture_output=True, text=True, env=environment(1), timeout=PATIENCE)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr, done.stderr


@pytest.mark.slow
def test_a_port_that_is_taken_is_a_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        given = command("--port", port)
        done = subprocess.run(given, capture_output=True, text=True, env=environment(1), timeout=PATIENCE)
    assert done.returncode == 2 and f"error: cannot listen at 127.0.0.1 port {port}" in done.stderr
