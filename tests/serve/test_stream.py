"""Event streams: what happens in which order, what ends them, and what log and figures say of that."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
from collections.abc import Iterator
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import pytest
from PIL import Image

import lcm_kit
from lcm_kit.errors import UserError
from lcm_kit.serve import stream
from lcm_kit.serve.adapters import Served
from lcm_kit.serve.limits import Limits
from lcm_kit.serve.problems import MEDIA
from lcm_kit.serve.run import App
from tests.serve.small import (
    ADAPTER,
    PATIENCE,
    FakeDrawer,
    Process,
    application,
    ask,
    events,
    figure,
    get,
    going,
    logged,
    scope_of,
    wait_for,
)  # fmt: skip

STREAM = {"Accept": "text/event-stream"}
LONG = {"prompt": "a red circle", "steps": 50, "count": 4, "sampler": "ddim"}  # seconds, one by one
SECRET = "zanzibar"


def streamed(app: App, **asked: Any) -> Any:
    return ask(app, {"json": {"prompt": "a red circle", **asked}, "headers": STREAM})[0]


def test_each_step_each_picture_and_then_what_else_the_answer_says(
    tiny: Served, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three pictures, two at once: the steps are told twice, and no picture waits for the others."""
    with application(tiny, FakeDrawer(size=2)) as app:
        app.engine._drawer.may_go.set()  # type: ignore[attr-defined]
        answer = streamed(app, count=3, steps=2, seed=4)
        plain = ask(app, {"json": {"prompt": "a red circle", "count": 3, "steps": 2, "seed": 4}})[0].json()
        counted = get(app, "/metrics").text
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-store" and "content-length" not in answer.headers
    found = events(answer.text)
    step, picture = [("step", {"step": k, "steps": 2}) for k in (1, 2)], "picture"
    assert [name if name == picture else (name, data) for name, data in found[:-1]] == [
        *step, picture, picture, *step, picture,
    ]  # fmt: skip
    assert [data for name, data in found if name == picture] == plain.pop("pictures")
    name, done = found[-1]
    assert name == "done" and done.keys() == plain.keys()
    assert {**done, "seconds": 0} == {**plain, "seconds": 0} and done["batches"] == [2, 2, 1]
    first, second = logged(capsys)[:2]
    assert (first["status"], first["outcome"], first["seed"]) == (200, "done", 4)
    assert "outcome" not in second
    assert figure(counted, 'lcm_kit_requests_total{method="POST",route="/v1/pictures",status="200"}') == 2.0


def test_what_is_refused_before_anything_is_queued_is_a_problem_with_its_status(tiny: Served) -> None:
    drawer = FakeDrawer()
    with application(tiny, drawer, Limits(queue=2, count=3)) as app:
        for asked, status in (({"steps": 99}, 422), ({"prompt": 5}, 422), ({"count": 3}, 429)):
            answer = streamed(app, **asked)
            assert (answer.status_code, answer.headers["content-type"]) == (status, MEDIA)
        app.engine.drain()
        assert streamed(app).status_code == 503
    assert not drawer.batches


@pytest.mark.parametrize(
    ("error", "limits", "status", "said"),
    [
        (UserError("memory ran out while drawing; draw smaller ones"), {}, 503, "memory ran out"),
        (RuntimeError(f"cannot tokenize {SECRET}"), {}, 500, "something is wrong within this server"),
        (None, {"seconds": 0.3}, 504, "the time for this request is over"),
    ],
)  # fmt: skip
def test_what_goes_wrong_after_it_began_is_its_last_event(
    tiny: Served,
    capsys: pytest.CaptureFixture[str],
    error: Exception | None,
    limits: dict[str, Any],
    status: int,
    said: str,
) -> None:
    drawer = FakeDrawer() if error is None else going()  # the one that is never let go runs out of time
    drawer.error = error
    with application(tiny, drawer, Limits(**limits)) as app:
        answer = streamed(app)
        wait_for(lambda: app.engine.idle, "idle")
        counted = get(app, "/metrics").text
    assert answer.status_code == 200
    name, problem = events(answer.text)[-1]
    assert name == "problem" and problem["status"] == status and said in problem["detail"]
    assert problem["request"] == answer.headers["x-request-id"] and SECRET not in answer.text
    assert figure(
        counted, f'lcm_kit_requests_total{{method="POST",route="/v1/pictures",status="{status}"}}'
    ) == 1.0  # fmt: skip
    text = capsys.readouterr().err
    line = next(each for each in map(json.loads, text.splitlines()) if each["event"] == "request")
    assert (line["status"], line["outcome"]) == (status, "problem") and SECRET not in text
    assert ('"event": "failure"' in text) is (status == 500)


def test_a_stream_that_has_nothing_to_say_says_so(tiny: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "BEAT", 0.01)
    drawer = FakeDrawer()

    async def scene(app: App) -> str:
        asking = asyncio.get_running_loop().run_in_executor(None, lambda: streamed(app))
        await asyncio.sleep(0.3)
        drawer.may_go.set()
        return str((await asking).text)

    with application(tiny, drawer) as app:
        text = asyncio.run(scene(app))
    beats = [block for block in text.split("\n\n") if block.startswith(":")]
    assert len(beats) > 2 and events(text)[-1][0] == "done"


def test_a_client_that_leaves_or_does_not_read_is_drawn_for_no_further(
    tiny: Served, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through ASGI: one goes when it has its first event, the other takes none."""
    body = json.dumps({"prompt": "a", "count": 2, "steps": 3}).encode()
    headers = [(b"content-type", b"application/json"), (b"accept", b"text/event-stream")]
    monkeypatch.setattr(stream, "_LAST", 0.0)

    async def scene(app: App, drawer: FakeDrawer, reads: bool) -> list[dict[str, Any]]:
        sent: list[dict[str, Any]] = []
        coming = [{"type": "http.request", "body": body, "more_body": False}]
        gone = asyncio.Event()

        async def receive() -> dict[str, Any]:
            if coming:
                return coming.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)
            if len(sent) == 1:
                drawer.let_one_go()  # one batch of one picture
            if b"picture" in message.get("body", b""):
                gone.set()
            if len(sent) > 1 and not reads:
                await asyncio.Event().wait()

        await app.asgi(scope_of("http", "POST", "/v1/pictures", headers), receive, send)
        return sent

    for reads, limits in ((True, Limits()), (False, Limits(seconds=1.0))):
        drawer = FakeDrawer(size=1)
        with application(tiny, drawer, limits) as app:
            sent = asyncio.run(scene(app, drawer, reads))
            wait_for(lambda: app.engine.idle, "idle")  # noqa: B023
            counted = get(app, "/metrics").text
        assert not any(b"done" in message.get("body", b"") for message in sent)
        assert figure(counted, "lcm_kit_pictures_total") == 1.0
        line = logged(capsys)[0]
        assert (line["status"], line["outcome"]) == (499, "left")


# -- In a process of its own, with uvicorn and a socket ------------------------------------------------------


@pytest.fixture(scope="module")
def single() -> Iterator[Process]:
    """One that draws picture by picture, and takes no time to end."""
    found = Process.start("--adapter", ADAPTER, "--batch", "1", "--grace", "0")
    yield found
    found.end()


def opened(server: Process, asked: dict[str, Any], path: str = "/v1/pictures") -> socket.socket:
    place, body = urlsplit(server.url), json.dumps(asked).encode()
    line = socket.create_connection((place.hostname, place.port), timeout=PATIENCE)
    head = f"POST {path} HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Type: application/json\r\n"
    accept = "Accept: text/event-stream\r\nConnection: close\r\n"
    line.sendall(f"{head}{accept}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return line


def until(line: socket.socket, words: bytes) -> bytes:
    found = b""
    while words not in found:
        part = line.recv(65536)
        assert part, found
        found += part
    return found


def outcomes(server: Process) -> list[str]:
    lines = [json.loads(line) for line in list(server.lines) if line.startswith("{")]
    return [line["outcome"] for line in lines if line["event"] == "request" and "outcome" in line]


def test_a_stream_in_a_process(single: Process) -> None:
    """Steps come while it is drawn; who leaves ends it; one seed is one file, streamed or not."""
    line = opened(single, {**LONG, "prompt": SECRET})
    begun = until(line, b"event: step")
    assert b"HTTP/1.1 200" in begun and b"event: done" not in begun
    assert single.figure("lcm_kit_queue_pictures") > 0  # it is far from done
    line.close()
    wait_for(lambda: outcomes(single) == ["left"], "it is told of")
    wait_for(lambda: single.figure('lcm_kit_batches_total{outcome="stopped"}') == 1.0, "it ends")
    assert single.figure("lcm_kit_queue_pictures") == 0

    asked = {"prompt": f"a {SECRET}", "seed": 7, "steps": 3}
    lines = [opened(single, each) for each in (asked, {**asked, "seed": 8}, asked)]
    streams = [b"".join(iter(partial(each.recv, 65536), b"")) for each in lines]
    assert all(b"transfer-encoding: chunked" in each.lower() for each in streams)
    own = events(single.answer("/v1/pictures", asked, **STREAM)[1])
    assert [data for name, data in own if name == "step"] == [{"step": k, "steps": 3} for k in (1, 2, 3)]
    files = [each["base64"] for each in json.loads(single.answer("/v1/pictures", asked)[1])["pictures"]]
    assert files == [data["base64"] for name, data in own if name == "picture"]
    assert base64.b64decode(files[0]).startswith(b"\x89PNG")
    assert [files[0].encode() in each.replace(b"\r\n", b"") for each in streams] == [True, False, True]

    client = lcm_kit.Client(single.url)
    picture, mask = Image.new("RGB", (64, 64), "teal"), Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    first, second = (client.edit("inpaint", picture, f"a {SECRET}", mask=mask, steps=1) for _ in range(2))
    assert first[0].tobytes() == second[0].tobytes() and first[0].getpixel((40, 9)) == (0, 128, 128)
    assert first[0].getpixel((9, 9)) != (0, 128, 128)
    with pytest.raises(UserError, match="^inpaint needs a picture"):
        client.edit("inpaint")

    line = opened(single, LONG)
    until(line, b"event: step")
    single.signal(15)
    rest = b"".join(iter(partial(line.recv, 65536), b""))
    assert b"event: problem" in rest and b"this server was stopped before the picture was drawn" in rest
    assert single.ended() == 0
    wait_for(lambda: single.event("stopped"), "stopped")
    assert outcomes(single) == ["left", *["done"] * 4, "problem"]
    assert SECRET not in "".join(single.lines)
