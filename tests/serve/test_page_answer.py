"""The page as it is answered: one file, its policy and hashes, nothing from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path

import pytest

from lcm_kit.serve.adapters import Served
from lcm_kit.serve.limits import Limits
from lcm_kit.serve.page import SCRIPTS, page
from tests.serve.small import application, ask, get, going

SOURCES = sorted(Path(str(files("lcm_kit.serve.page"))).glob("*.*"))


class Parts(HTMLParser):
    """What stands in <style> and <script>, every attribute, and all ids."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.texts: dict[str, list[str]] = {"style": [], "script": []}
        self.attributes: list[tuple[str, str, str | None]] = []
        self._in = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._in = tag
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        self._in = ""

    def handle_data(self, data: str) -> None:
        if self._in in self.texts:
            self.texts[self._in].append(data)


def test_the_page_is_one_answer_whose_policy_names_what_is_in_it(tiny: Served) -> None:
    with application(tiny, going()) as app:
        answer, head = get(app, "/"), ask(app, {"method": "HEAD", "url": "/"})[0]
    assert answer.status_code == head.status_code == 200 and head.content == b""
    assert head.headers["content-length"] == answer.headers["content-length"] == str(len(answer.content))
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.headers["x-content-type-options"] == "nosniff"
    found = Parts(answer.text)
    policy = dict(
        part.strip().partition(" ")[::2] for part in answer.headers["content-security-policy"].split(";")
    )
    for kind in ("style", "script"):
        (text,) = found.texts[kind]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert policy[f"{kind}-src"] == f"'sha256-{digest}'"
    fixed = {
        "default-src": "'none'", "connect-src": "'self'", "img-src": "blob: data:",
        "frame-ancestors": "'none'", "base-uri": "'none'", "form-action": "'none'",
        "require-trusted-types-for": "'script'", "trusted-types": "'none'",
    }  # fmt: skip
    assert fixed.items() <= policy.items() and len(policy) == len(fixed) + 2


def test_nothing_is_loaded_from_elsewhere_and_no_handler_or_style_stands_in_the_html() -> None:
    found = Parts(page().html.decode())
    for tag, name, value in found.attributes:
        assert not name.startswith("on") and name != "style", (tag, name)
        if name in ("src", "href", "action", "data", "poster", "srcset"):
            assert (value or "").startswith(("#", "data:image/svg+xml,")), (tag, name, value)
    ids = [value for _, name, value in found.attributes if name == "id"]
    assert len(ids) == len(set(ids)) > 50
    for _, name, value in found.attributes:  # what a label, a tab or a sentence is for is there
        if name in ("for", "aria-controls", "aria-labelledby", "aria-describedby"):
            assert value in ids, (name, value)


def test_every_source_is_in_the_page_and_makes_no_html_of_text() -> None:
    assert {each.name for each in SOURCES} == {
        "__init__.py",
        "index.html",
        "style.css",
        *(f"{name}.js" for name in SCRIPTS),
    }
    html = page().html.decode()
    for name in SCRIPTS:
        source = next(each for each in SOURCES if each.name == f"{name}.js").read_text()
        assert source in html
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", source
        )
        assert not re.search(r"https?://|WebSocket|\.setAttribute\(\"(on|style)", source)
        for known in re.findall(r'\$\("([\w-]+)"\)', source):
            assert f'id="{known}"' in html, (name, known)


def test_the_page_counts_as_a_request_of_its_client(tiny: Served) -> None:
    with application(tiny, going(), Limits(rate=10)) as app:
        assert [get(app, "/").status_code for _ in range(2)] == [200, 429]


@pytest.mark.parametrize("name", [*SCRIPTS, "style"])
def test_sources_are_short(name: str) -> None:
    lines = (
        next(each for each in SOURCES if each.stem == name and each.suffix != ".py").read_text().splitlines()
    )
    assert len(lines) <= 350 and max(map(len, lines)) <= 160
