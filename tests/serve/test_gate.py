"""Who comes in: no trick leads past the token, pages of elsewhere and too many requests stay outside."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from lcm_kit.errors import UserError
from lcm_kit.serve import gate
from lcm_kit.serve.adapters import Served
from lcm_kit.serve.gate import Rate, Tokens, is_local
from lcm_kit.serve.limits import Limits
from lcm_kit.serve.run import App, Place
from tests.serve.small import PATIENCE, application, ask, get, going, scope_of

TOKEN = "a-token-of-some-length"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tokens"
    path.write_text(f"# ours\n{TOKEN}\nanother-token-of-length\n")
    return path


def raw(
    app: App, kind: str, method: str, path: str, headers: list[tuple[bytes, bytes]]
) -> list[dict[str, Any]]:
    """What the application sends for a request whose path no client has tidied."""
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        known = {"type": "http.request", "body": b"", "more_body": False}
        return {"type": "websocket.connect"} if kind == "websocket" else known

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(app.asgi(scope_of(kind, method, path, headers), receive, send))
    return sent


PATHS = [
    "/v1/pictures", "/v1/info", "/metrics", "/openapi.json", "/docs", "//", "/?", "/ ", "/.", "/index.html",
    "", "*", "/V1/info", "//v1/info", "/v1//info", "/v1/info/", "/healthz/", "//healthz",
    "/healthz/../v1/info", "/healthz/../metrics",
    "/./v1/info", "/HEALTHZ", "/healthz;/v1/info", "/healthz%2f..%2fv1/info",
    "/readyz/v1/info", "/healthz\x00",
    "/readyz?x", "/%68ealthz", "/v1/info#/healthz", "http://127.0.0.1/healthz", "/v1/pictures/healthz",
]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_every_other_spelling_of_a_path_needs_the_token(tiny: Served, file: Path, path: str) -> None:
    drawer = going()
    with application(tiny, drawer, tokens=file) as app:
        for method in ("GET", "POST", "HEAD", "OPTIONS", "PUT", "get", "TRACE", "CONNECT", "X"):
            sent = raw(app, "http", method, path, [(b"content-type", b"application/json")])
            assert sent[0]["status"] == 401, (method, path)
            assert (b"www-authenticate", b'Bearer realm="lcm-kit"') in [
                (name.lower(), value) for name, value in sent[0]["headers"]
            ]
        sent = raw(app, "websocket", "GET", path, [])
        assert sent == [{**sent[0], "type": "websocket.close", "code": 1008}]
    assert not drawer.batches


@pytest.mark.parametrize("path", [*PATHS, "/v1/edits", "/healthz", "/readyz"])
def test_there_are_no_websockets_with_a_token_either(tiny: Served, file: Path, path: str) -> None:
    drawer = going()
    with application(tiny, drawer, tokens=file) as app:
        for headers in ([], [(b"authorization", b"Bearer " + TOKEN.encode())]):
            sent = raw(app, "websocket", "GET", path, headers)
            assert [each["type"] for each in sent] == ["websocket.close"], path
    assert not drawer.batches


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "X"])
@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/"])
def test_the_open_paths_do_nothing_by_other_methods(tiny: Served, file: Path, path: str, method: str) -> None:
    drawer = going()
    with application(tiny, drawer, tokens=file) as app:
        assert get(app, path).status_code == 200
        assert ask(app, {"method": method, "url": path})[0].status_code == 405
        sent = raw(app, "websocket", "GET", path, [])
        assert [each["type"] for each in sent] == ["websocket.close"]
    assert not drawer.batches


@pytest.mark.parametrize(
    "given",
    [
        [], [b"Bearer"], [b"Bearer "], [b"Basic " + TOKEN.encode()], [TOKEN.encode()],
        [b"Bearer " + TOKEN.encode()[:-1]], [b"Bearer " + TOKEN.encode() + b"x"],
        [b"Bearer " + TOKEN.upper().encode()], [b"Bearer # ours"], [b"Bearer \xff\xfe"],
        [b"Bearer " + TOKEN.encode() + b" x"],
        [b"Bearer " + TOKEN.encode()] * 2, [b"", b"Bearer " + TOKEN.encode()],
    ],
)  # fmt: skip
def test_what_is_no_token_is_refused(tiny: Served, file: Path, given: list[bytes]) -> None:
    drawer = going()
    with application(tiny, drawer, tokens=file) as app:
        sent = raw(app, "http", "GET", "/v1/info", [(b"authorization", value) for value in given])
        assert sent[0]["status"] == 401


@pytest.mark.parametrize("token", [TOKEN, "another-token-of-length"])
@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_a_token_lets_in(tiny: Served, file: Path, token: str, scheme: str) -> None:
    drawer = going()
    with application(tiny, drawer, tokens=file) as app:
        headers = {"Authorization": f"{scheme} {token}"}
        assert get(app, "/v1/info", headers=headers).status_code == 200
        answer = ask(app, {"json": {"prompt": "a"}, "headers": headers})[0]
        assert answer.status_code == 200 and len(drawer.batches) == 1


def test_tokens_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hashes of one length, each of them, whichever fits."""
    compared: list[tuple[bytes, bytes]] = []
    real = gate.hmac.compare_digest
    monkeypatch.setattr(gate.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or real(a, b))
    tokens = Tokens(["one", "two", "three"])
    assert [tokens.place(each) for each in (b"one", b"three", b"four")] == [0, 2, None]
    assert len(compared) == 9 and {len(side) for pair in compared for side in pair} == {32}


@pytest.mark.parametrize(
    ("content", "said"),
    [("", "holds no token"), ("# only this\n", "holds no token"), ("short\n", "token 1 is not 16 or more"),
     (f"{TOKEN}\nwith space in the middle\n", "token 2 is not"), ("\u00e4" * 20, "token 1 is not")],
)  # fmt: skip
def test_a_token_file_that_guards_nothing_is_refused(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "tokens"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=said):
        Tokens.of(path)
    with pytest.raises(UserError, match="nowhere"):
        Tokens.of(tmp_path / "nowhere")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "", "example.org", "127.0.0.1.example.org"])
def test_no_other_machine_is_served_without_a_token(file: Path, host: str) -> None:
    assert not is_local(host)
    with pytest.raises(UserError, match="give --token-file"):
        Place(host).tokens()
    assert Place(host, token_file=file).tokens() is not None and not Place(host).hosts()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.5.5.5", "LocalHost"])
def test_this_machine_is(host: str) -> None:
    assert is_local(host) and Place(host).tokens() is None and host.lower() in Place(host).hosts()


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200), ("127.0.0.1:8000", 200), ("localhost:1", 200), ("LOCALHOST", 200),
        ("[::1]:8000", 200),
        ("evil.example", 421), ("127.0.0.1.evil.example", 421), ("localhost.evil.example:8000", 421),
        ("evil.example:127.0.0.1", 421), ("[::2]", 421), ("studio.lan", 200), ("", 421),
        ("localhost:8000@evil.example", 421), ("localhost:evil.example", 421), ("[::1]evil.example", 421),
        ("localhost:8000:8000", 421), ("localhost:", 200), ("localhost/evil.example", 421),
    ],
)  # fmt: skip
def test_a_name_that_was_made_to_lead_here_is_refused(tiny: Served, host: str, status: int) -> None:
    drawer = going()
    with application(tiny, drawer, hosts=("studio.lan",)) as app:
        for path in ("/v1/info", "/healthz"):
            assert get(app, path, headers={"Host": host}).status_code == status


@pytest.mark.parametrize(
    ("origin", "status"),
    [(None, 200), ("http://127.0.0.1:8000", 200), ("http://evil.example", 403), ("null", 403),
     ("http://127.0.0.1:9000", 403), ("http://[::1", 403), ("http://[no]/", 403), ("", 403)],
)  # fmt: skip
def test_a_page_of_elsewhere_is_refused(tiny: Served, origin: str | None, status: int) -> None:
    drawer = going()
    headers = {"Host": "127.0.0.1:8000"} | ({} if origin is None else {"Origin": origin})
    with application(tiny, drawer) as app:
        answer = ask(app, {"json": {"prompt": "a"}, "headers": headers})[0]
        assert answer.status_code == status and len(drawer.batches) == (status == 200)
        assert not [name for name in answer.headers if name.startswith("access-control")]
        # what a page may send without asking first is none of our JSON
        plain = {"content": '{"prompt": "a"}', "headers": {"Content-Type": "text/plain"}}
        assert ask(app, plain)[0].status_code == 415


def test_a_client_that_asks_too_often_waits_and_others_do_not() -> None:
    """A bucket of 6 s: 60 a minute are 6 at once, then one a second."""
    now = 0.0
    rate = Rate(60.0, lambda: now)
    assert [rate.wait("a") for _ in range(6)] == [0.0] * 6
    assert rate.wait("a") == 1.0 and rate.wait("b") == 0.0
    now = 0.25
    assert rate.wait("a") == 0.75
    now = 1.0
    assert [rate.wait("a"), rate.wait("a")] == [0.0, 1.0]
    now = 1000.0
    assert [rate.wait("a") for _ in range(7)] == [0.0] * 6 + [1.0]


def test_the_memory_for_clients_is_bounded() -> None:
    rate = Rate(60.0, lambda: 0.0)
    for number in range(3 * gate._CLIENTS):
        rate.wait(f"client {number}")
    assert len(rate._buckets) == gate._CLIENTS


def test_too_many_requests_are_429_with_retry_after(tiny: Served) -> None:
    with application(tiny, going(), Limits(rate=20.0)) as app:
        answers = ask(app, *[{"method": "GET", "url": "/v1/info"}] * 3)
        assert [each.status_code for each in answers] == [200, 200, 429]
        assert 1 <= int(answers[2].headers["retry-after"]) <= 3
        assert answers[2].json()["detail"].startswith("too many requests: this server takes 20 a minute")
        assert [get(app, path).status_code for path in ("/healthz", "/readyz", "/metrics")] == [200] * 3


def test_the_bucket_is_the_tokens_where_there_is_one(tiny: Served, file: Path) -> None:
    with application(tiny, going(), Limits(rate=10.0), tokens=file) as app:
        one, other = ({"Authorization": f"Bearer {each}"} for each in (TOKEN, "another-token-of-length"))
        found = [get(app, "/v1/info", headers=each).status_code for each in (one, one, other, {})]
    assert found == [200, 429, 200, 401]


def test_tokens_are_not_guessed_without_end_and_guesses_take_nothing_of_others(
    tiny: Served, file: Path
) -> None:
    """Of one address, whose page and whose tokens have rates of their own."""
    with application(tiny, going(), Limits(rate=20.0), tokens=file) as app:
        guess = {"Authorization": "Bearer a-token-of-some-lengtH"}
        found = [get(app, "/v1/info", headers=guess) for _ in range(3)]
        assert [each.status_code for each in found] == [401, 401, 429]
        assert int(found[2].headers["retry-after"]) >= 1
        assert get(app, "/v1/info").status_code == 429
        good = {"Authorization": f"Bearer {TOKEN}"}
        assert [get(app, "/v1/info", headers=good).status_code, get(app, "/").status_code] == [200, 200]


def test_a_client_has_a_bounded_number_of_requests_at_once(tiny: Served, file: Path) -> None:
    """Those that are read count as those that are drawn; another client is let in, and so are watchers."""
    limits = Limits(queue=4, batch=1, window=0.0)
    one, other = ({"Authorization": f"Bearer {each}"} for each in (TOKEN, "another-token-of-length"))
    with application(tiny, going(), limits, tokens=file) as app:

        async def scene() -> list[httpx.Response]:
            transport = httpx.ASGITransport(app.asgi, client=("127.0.0.1", 5000))
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
                never = asyncio.Event()

                async def slow() -> AsyncIterator[bytes]:
                    yield b'{"prompt": '
                    await never.wait()
                    yield b'"a", "nothing of this": 1}'

                head = {**one, "Content-Type": "application/json"}
                post = partial(client.post, "/v1/pictures", headers=head, timeout=PATIENCE)
                reading = [asyncio.create_task(post(content=slow())) for _ in range(5)]
                while sum(app.gate._answering.values()) < 5:
                    await asyncio.sleep(0.001)
                asked = [("/v1/info", one), ("/v1/info", other), ("/healthz", {}), ("/metrics", one)]
                found = [await client.get(path, headers=headers) for path, headers in asked]
                never.set()
                found += await asyncio.gather(*reading)
                return [*found, await client.get("/v1/info", headers=one)]

        found = asyncio.run(scene())
        assert [each.status_code for each in found] == [429, 200, 200, 200, *[422] * 5, 200]
        assert found[0].headers["retry-after"] == "1"
        assert found[0].json()["detail"].startswith("too many requests at once: 5 of this client")
        assert not app.gate._answering


def test_the_addresses_of_an_ipv6_network_are_one_client() -> None:
    places = [gate._address({"client": (each, 1)}) for each in ("2001:db8::1", "2001:db8::ffff", "10.0.0.1")]
    assert places == ["2001:db8::/64", "2001:db8::/64", "10.0.0.1"]


def test_no_packet_of_an_answer_waits_for_the_receipt_of_another() -> None:
    """Nagle's algorithm is off on a connection, which asyncio does of sockets that it makes itself alone."""
    with (
        Place(port=0).listening() as listening,
        socket.create_connection(listening.getsockname()),
        listening.accept()[0] as connection,
    ):
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0
