"""The client: what is no answer of ours, and a token that goes to one server alone. No model is loaded."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from PIL import Image

import lcm_kit
from lcm_kit.api.client import Comparison
from lcm_kit.errors import UserError


class Answers(BaseHTTPRequestHandler):
    """Answers everything with `answer`, and remembers what it was asked."""

    answer: ClassVar[tuple[int, dict[str, str], bytes]]
    asked: ClassVar[list[tuple[str, dict[str, str], bytes]]]

    def _any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.asked.append((self.path, dict(self.headers), body))
        status, headers, content = self.answer
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_DELETE = _any

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def odd() -> Iterator[str]:
    Answers.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("status", "headers", "content", "said"),
    [
        (200, {}, b"<html>", "does not answer as `lcm-kit serve` does"),
        (200, {}, b"[]", "does not answer as `lcm-kit serve` does"),
        (200, {}, b"{}", "does not answer as `lcm-kit serve` does"),
        (200, {}, b'{"pictures": [{"base64": "!"}]}', "does not answer as `lcm-kit serve` does"),
        (200, {}, b'{"pictures": [{"base64": "QUJD"}]}', "does not answer as `lcm-kit serve` does"),
        (404, {}, b"<html>", "answers 404 Not Found, not as `lcm-kit serve` does"),
        (502, {}, b"[]", "answers 502 Bad Gateway, not as"),
        (429, {"Retry-After": "3"}, b'{"detail": "the queue is full"}', r"^the queue is full \(in 3 s\)$"),
        (422, {}, json.dumps({"detail": "2 things", "errors": ["a", "b"]}).encode(), "^2 things; a; b$"),
        (401, {}, json.dumps({"detail": "no\x1b[2J\ntoken"}).encode(), r"^no\\x1b\[2J\\ntoken$"),
    ],
)  # fmt: skip
def test_what_is_no_picture_is_a_sentence(
    odd: str, status: int, headers: dict[str, str], content: bytes, said: str
) -> None:
    Answers.answer = status, headers, content
    with pytest.raises(UserError, match=said):
        lcm_kit.Client(odd).draw("a")


def test_no_redirect_is_followed_and_the_token_stays(odd: str) -> None:
    Answers.answer = 302, {"Location": f"{odd}/elsewhere"}, b""
    for call in (lambda client: client.info(), lambda client: client.draw("a")):
        with pytest.raises(UserError, match="answers 302"):
            call(lcm_kit.Client(odd, "a-token"))
    assert [path for path, _, _ in Answers.asked] == ["/v1/info", "/v1/pictures"]
    assert all(headers["Authorization"] == "Bearer a-token" for _, headers, _ in Answers.asked)


def test_only_what_was_said_is_sent(odd: str) -> None:
    Answers.answer = 200, {}, b'{"pictures": []}'
    client = lcm_kit.Client(odd + "/")
    assert client.draw("a", seed=4, adapters={"one": None}) == []
    assert client.draw("a", negative_prompt="b", guidance_scale=2.0, width=64, adapters={}) == []
    sent = [json.loads(body) for _, _, body in Answers.asked]
    assert sent[0] == {"prompt": "a", "seed": 4, "count": 1, "adapters": {"one": None}}
    assert sent[1] == {
        "prompt": "a", "seed": 0, "count": 1, "negative_prompt": "b", "guidance_scale": 2.0, "width": 64,
        "adapters": {},
    }  # fmt: skip
    assert all("Authorization" not in headers for _, headers, _ in Answers.asked)


def test_an_odd_answer_is_a_sentence_whatever_was_asked(odd: str) -> None:
    client = lcm_kit.Client(odd)
    calls: list[tuple[Callable[[], Any], tuple[bytes, ...]]] = [
        (lambda: client.compare("a"), (b"{}", b"[]", b'{"left": {}, "right": {}}', b'{"left": 1}')),
        (lambda: client.vote(1, "tie"), (b"1", b"<html>")),
        (client.votes, (b"null", b"\xff")),
        (client.votes_csv, (b"\xff",)),
        (client.history, (b"{}", b'{"pictures": [1], "more": true}', b'{"pictures": [{}], "more": 1}')),
        (lambda: client.kept(1), (b"", b"GIF89a", b"\x89PNG\r\n\x1a\nand no more")),
    ]
    for call, contents in calls:
        for content in contents:
            Answers.answer = 200, {}, content
            with pytest.raises(UserError, match="does not answer as `lcm-kit serve` does"):
                call()


def test_what_is_asked_of_history_and_votes(odd: str) -> None:
    client = lcm_kit.Client(odd, "a-token")
    Answers.answer = 200, {}, b'{"pictures": [{"id": 9}], "more": true}'
    assert client.history(3) == [{"id": 9}] * 3
    Answers.answer = 200, {}, b'{"pictures": [], "more": true}'
    assert client.history(3) == []
    Answers.answer = 204, {}, b""
    client.forget(7)
    client.forget()
    Answers.answer = 200, {}, b'{"choice": "tie"}'
    assert client.vote(3, "tie") == {"choice": "tie"}
    assert [path for path, _, _ in Answers.asked] == [
        "/v1/history?limit=3", "/v1/history?limit=2&before=9", "/v1/history?limit=1&before=9",
        "/v1/history?limit=3", "/v1/history/7", "/v1/history", "/v1/votes",
    ]  # fmt: skip
    assert json.loads(Answers.asked[-1][2]) == {"comparison": 3, "choice": "tie"}
    assert all(headers["Authorization"] == "Bearer a-token" for _, headers, _ in Answers.asked)
    picture = Image.new("RGB", (1, 1))
    with pytest.raises(UserError, match="keeps no votes; start it with `lcm-kit serve --data FOLDER`"):
        client.vote(Comparison(None, picture, picture, "asked", {}), "tie")


def test_pictures_are_sent_as_the_files_that_they_are(odd: str, tmp_path: Path) -> None:
    """PIL's as a PNG with the turn that it says; a file is not read, so anything may be in it."""
    Answers.answer = 200, {}, b'{"pictures": []}'
    client = lcm_kit.Client(odd)
    (tmp_path / "a.jpg").write_bytes(b"anything")
    image = Image.new("RGBA", (3, 2), (1, 2, 3, 4))
    image.getexif()[0x0112] = 6
    asked: dict[str, Any] = {"feather": 1, "strength": 0.5, "seed": 3, "adapters": {}}
    assert client.edit("inpaint", tmp_path / "a.jpg", "b", mask=image, **asked) == []
    client.edit("outpaint", str(tmp_path / "a.jpg"), grow=(1, 2, 3, 4))
    sent = [json.loads(body) for _, _, body in Answers.asked]
    assert [path for path, _, _ in Answers.asked] == ["/v1/edits"] * 2
    with Image.open(io.BytesIO(base64.b64decode(sent[0].pop("mask")))) as mask:
        assert (mask.format, mask.size, mask.getpixel((0, 0))) == ("PNG", (3, 2), (1, 2, 3, 4))
        assert mask.getexif()[0x0112] == 6
    file = base64.b64encode(b"anything").decode()
    assert sent[0] == {"task": "inpaint", "picture": file, "prompt": "b", "count": 1, **asked}
    assert sent[1] == {
        "task": "outpaint", "picture": file, "prompt": "", "count": 1, "seed": 0, "grow": [1, 2, 3, 4],
    }  # fmt: skip
    with pytest.raises(UserError, match=r"^picture .*nowhere\.png cannot be read \("):
        client.edit("vary", tmp_path / "nowhere.png")
    with pytest.raises(UserError, match="^mask: .*CMYK.*; convert it to RGB$"):
        client.edit("inpaint", image, mask=Image.new("CMYK", (2, 2)))


def test_a_server_that_is_not_there_is_a_sentence(odd: str) -> None:
    with pytest.raises(
        UserError, match=r"http://127.0.0.1:9 cannot be reached \(.*\); does `lcm-kit serve` run"
    ):
        lcm_kit.Client("http://127.0.0.1:9").info()
    for url in ("127.0.0.1:8000", "file:///etc/passwd", "", "http://"):
        with pytest.raises(UserError, match="is no server's address"):
            lcm_kit.Client(url)
